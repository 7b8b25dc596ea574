"""A candidate as shown to people: its objectives, constraints and features, with errors, on either split."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from pydantic import BaseModel

from evaluators.cost import COUNTED
from evomerge.optimizers import Feature
from evomerge.report.parameters import parameters_of
from evomerge.search.preparing.setup import violation
from evomerge.store import CandidateRow, Estimate, SearchRecord
from evomerge.store.record import Measure
from evomerge.store.rows import ListedCandidate, NullableFloat

SOURCE = "source"
"""The origin of an unmerged source model."""

EARLIER_WINNER = "earlier winner"
"""The origin of a merge from an earlier search that paths of this search may use like a source."""


class Gap(BaseModel):
    """The paired difference from another model on the same items; positive is better, whatever the metric's direction.

    The interval and the two-sided ``p`` are corrected for all comparisons of the confirmation in this objective. They
    are None if there is a single item.
    """

    to: str
    mean: float
    low: NullableFloat
    high: NullableFloat
    p: NullableFloat


class ConfirmedEstimate(Estimate):
    """A value on the held-out split, with its differences from every source and the uniform average."""

    difference: list[Gap]


class Scalar(Estimate):
    """The value of a scalarisation of several objectives, over ``n`` items of all of them.

    Its error is not computed on the search split, because it depends on how objectives vary together there.
    """

    name: str


class ConfirmedScalar(Scalar):
    """The same on the held-out split, with its error and its differences."""

    difference: list[Gap]


class Constraint(BaseModel):
    """A condition on candidates: a mean of at least ``threshold`` if ``at_least``, otherwise at most ``threshold``."""

    threshold: float
    at_least: bool

    @property
    def text(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.threshold:g}"

    def violation(self, mean: float) -> float:
        """How far a mean misses the threshold, relative to it; 0 if the constraint is satisfied."""
        return violation(mean, self.threshold, at_least=self.at_least)

    def is_kept(self, value: Estimate) -> bool:
        """Whether the mean satisfies the constraint; its error is ignored."""
        return value.mean >= self.threshold if self.at_least else value.mean <= self.threshold


class FeatureRange(BaseModel):
    """How the range of a feature is divided into ``bins`` of equal width."""

    low: float
    high: float
    bins: int

    @property
    def width(self) -> float:
        """The width of a bin."""
        return (self.high - self.low) / self.bins

    def text(self, mean: float) -> str:
        """The bin of a value, counted from 1 for people: bin 3 of 10."""
        return f"bin {Feature('', self.low, self.high, self.bins).bin(mean) + 1} of {self.bins}"


class Entry(BaseModel):
    """A candidate with its known objectives, constraints and features on one split.

    On the search split, a value is an estimate if it has fewer items than the search wants. ``feasible`` means that no
    known value violates its constraint. ``origin`` says where it comes from; "source" is an unmerged model. ``scalar``
    is the value of the scalarisation, if the search has one and all objectives are known. ``parameters`` are those of
    the search space by name, with choices by name; empty if the candidate is not a point of the space. ``change`` is
    the distance of its weights from those of the search's base, relative to the base's norm.
    """

    id: str
    label: str
    origin: str = ""
    objectives: Mapping[str, Estimate]
    scalar: Scalar | None = None
    constraints: dict[str, Estimate] = {}
    features: dict[str, Estimate] = {}
    feasible: bool = True
    parameters: dict[str, float | int | str] = {}
    change: float | None = None

    def value(self, name: str) -> Estimate | None:
        """An objective, constraint, feature or the scalarisation by name; None if unknown."""
        if self.scalar is not None and self.scalar.name == name:
            return self.scalar
        return self.objectives.get(name) or self.constraints.get(name) or self.features.get(name)


class ConfirmedEntry(Entry):
    """A candidate on the shortlist, on the held-out split."""

    objectives: dict[str, ConfirmedEstimate]
    scalar: ConfirmedScalar | None = None

    def gaps(self, name: str) -> list[Gap]:
        """Its differences in an objective, or in the scalarisation, by name."""
        value = self.value(name)
        return value.difference if isinstance(value, ConfirmedEstimate | ConfirmedScalar) else []


def constraints_of(record: SearchRecord) -> dict[str, Constraint]:
    """The constraints of a search by name."""
    return {c.name: Constraint(threshold=c.threshold, at_least=c.maximise) for c in record.constraints}


def features_of(record: SearchRecord) -> dict[str, FeatureRange]:
    """The features of a search by name."""
    return {
        feature.name: FeatureRange(low=feature.low, high=feature.high, bins=feature.bins) for feature in record.features
    }


def entry(row: CandidateRow, record: SearchRecord) -> Entry:
    """The entry of a candidate's row on the search split."""
    return entry_of(row, row.objectives, record)


def origin_of(row: ListedCandidate, sources: Collection[str]) -> str:
    """The origin of a candidate in a search over these sources; the store counts an earlier winner as a source."""
    return EARLIER_WINNER if row.origin == SOURCE and row.label not in sources else row.origin


def kind_of(origin: str, label: str) -> str:
    """A baseline in words: source maths, uniform average; empty for a candidate without a name."""
    if origin == EARLIER_WINNER:
        return f"{label}, the {EARLIER_WINNER}"
    return f"{SOURCE} {label}" if origin == SOURCE else label


def entry_of(row: CandidateRow, estimates: Mapping[str, Estimate], record: SearchRecord) -> Entry:
    """A candidate with estimates of its measures by name; others are left out."""
    constraints = constraints_of(record)
    kept = {name: estimates[name] for name in constraints if name in estimates}
    return Entry(
        id=row.id,
        label=row.label,
        origin=row.origin,
        objectives={o.name: estimates[o.name] for o in record.objectives if o.name in estimates},
        constraints=kept,
        features={f.name: estimates[f.name] for f in record.features if f.name in estimates},
        feasible=all(constraints[name].is_kept(value) for name, value in kept.items()),
        parameters=dict(parameters_of(row.genome, record.parameters)),
        change=row.change,
    )


def percent(share: float | None) -> str:
    """A share in at most five characters: 3.2%, 0.04%, <.01%; a dot if it is unknown."""
    if not share:
        return "·" if share is None else "0%"
    if share < 0.01:
        return f"{share:.2%}" if share >= 0.0001 else "<.01%"
    return f"{share:.1%}" if share < 0.9995 else f"{share:.0%}"


def measure_text(mean: float, stderr: float | None) -> str:
    """A mean with its standard error: 0.620 ± 0.024. The error of a single item is "-"; a count has none."""
    if stderr is not None and not math.isnan(stderr):
        return f"{mean:.3f} ± {stderr:.3f}"
    return f"{mean:,.0f}" if mean > 1 and mean.is_integer() else f"{mean:.3f} ± -"


def value_text(value: Estimate) -> str:
    """A value with its standard error, as in ``measure_text``. A scalarisation without a known error is shown alone; an
    unknown mean is empty.
    """
    if math.isnan(value.mean):
        return ""
    if isinstance(value, Scalar) and value.stderr is None:
        return f"{value.mean:.3f}"
    return measure_text(value.mean, value.stderr)


def count_text(number: int, noun: str) -> str:
    """A number with its noun in the right form: 1 candidate, 2 candidates."""
    return f"{number} {noun}{'s' * (number != 1)}"


def interval_text(low: float | None, high: float | None) -> str:
    """An interval: [+0.250, +0.390]; "-" if there is none."""
    return "-" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"


def gap_text(gap: Gap) -> str:
    """A difference with its interval: +0.320 [+0.250, +0.390]; without one for a single item."""
    count = gap.low is None and abs(gap.mean) >= 1 and gap.mean.is_integer()
    mean = f"{gap.mean:+,.0f}" if count else f"{gap.mean:+.3f}"
    return mean if gap.low is None else f"{mean} {interval_text(gap.low, gap.high)}"


def is_exact(measure: Measure, record: SearchRecord) -> bool:
    """Whether a measure is counted and not sampled, such as layers, so that one item is enough."""
    name = record.evaluators[measure.evaluator].name
    return name == "change" or (name == "cost" and measure.metric in COUNTED)
