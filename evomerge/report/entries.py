"""What people are told of one candidate: its objectives, constraints and features, with errors, on either split."""

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
"""The origin of a model that a search began with and did not merge."""

EARLIER_WINNER = "earlier winner"
"""The origin of a merge that an earlier search found and that the paths of this one go through, beside its sources."""


class Gap(BaseModel):
    """The paired difference to another model on the same items; positive is better, whichever way the metric goes.

    Interval and two-sided ``p`` are corrected for all comparisons of the confirmation in this objective. They are None
    where there is one item.
    """

    to: str
    mean: float
    low: NullableFloat
    high: NullableFloat
    p: NullableFloat


class ConfirmedEstimate(Estimate):
    """A value on the held-out split, with its differences to every source and the uniform average."""

    difference: list[Gap]


class Scalar(Estimate):
    """The number by which a scalarisation decides between several objectives, over ``n`` items of all of them.

    On the search split its error is not reckoned: it hangs on how objectives vary together there.
    """

    name: str


class ConfirmedScalar(Scalar):
    """The same on the held-out split, with its error and its differences."""

    difference: list[Gap]


class Constraint(BaseModel):
    """What a candidate must keep: a mean of at least ``threshold`` where ``at_least``, of at most that otherwise."""

    threshold: float
    at_least: bool

    @property
    def text(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.threshold:g}"

    def violation(self, mean: float) -> float:
        """By how much a mean misses the threshold, as a share of it; 0 where it is kept."""
        return violation(mean, self.threshold, at_least=self.at_least)

    def is_kept(self, value: Estimate) -> bool:
        """Whether the mean keeps it; its error is not looked at."""
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
        """Which bin a value is in, for people who count from 1: bin 3 of 10."""
        return f"bin {Feature('', self.low, self.high, self.bins).bin(mean) + 1} of {self.bins}"


class Entry(BaseModel):
    """A candidate with its objectives, constraints and features on one split, as far as they are known.

    On the search split, fewer items than the search wants of a measure make its value an estimate. ``feasible``: no
    known value misses its constraint. ``origin`` says where it comes from: "source" is a model that was not merged.
    ``scalar`` is the number of a scalarisation where the search has one and all objectives are known.
    ``parameters`` are those of the search space by name, choices by theirs; empty where the space holds no such point.
    ``change`` is how far its weights are from those of the search's base, as a share of their norm.
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
        """An objective, a constraint, a feature or the scalarisation's number by name; None where it is not known."""
        if self.scalar is not None and self.scalar.name == name:
            return self.scalar
        return self.objectives.get(name) or self.constraints.get(name) or self.features.get(name)


class ConfirmedEntry(Entry):
    """A candidate of the shortlist, on the held-out split."""

    objectives: dict[str, ConfirmedEstimate]
    scalar: ConfirmedScalar | None = None

    def gaps(self, name: str) -> list[Gap]:
        """Its differences in an objective, or in the number of the scalarisation, by name."""
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
    """A row of the store in the words of people."""
    return entry_of(row, row.objectives, record)


def origin_of(row: ListedCandidate, sources: Collection[str]) -> str:
    """Where a candidate comes from, in a search of these sources: the store has an earlier winner among them."""
    return EARLIER_WINNER if row.origin == SOURCE and row.label not in sources else row.origin


def kind_of(origin: str, label: str) -> str:
    """What a baseline is, in words: source maths, uniform average; "" of a candidate without a name."""
    if origin == EARLIER_WINNER:
        return f"{label}, the {EARLIER_WINNER}"
    return f"{SOURCE} {label}" if origin == SOURCE else label


def entry_of(row: CandidateRow, estimates: Mapping[str, Estimate], record: SearchRecord) -> Entry:
    """A candidate with estimates of its measures by name; what is not a measure of the search is left out."""
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
    """A share, of what is not known a dot, in at most five characters: 3.2%, 0.04%, <.01%."""
    if not share:
        return "·" if share is None else "0%"
    if share < 0.01:
        return f"{share:.2%}" if share >= 0.0001 else "<.01%"
    return f"{share:.1%}" if share < 0.9995 else f"{share:.0%}"


def measure_text(mean: float, stderr: float | None) -> str:
    """A mean with its standard error: 0.620 ± 0.024. Of one item it is "-"; a count, such as of layers, has none."""
    if stderr is not None and not math.isnan(stderr):
        return f"{mean:.3f} ± {stderr:.3f}"
    return f"{mean:,.0f}" if mean > 1 and mean.is_integer() else f"{mean:.3f} ± -"


def value_text(value: Estimate) -> str:
    """A value with its standard error, as ``measure_text``; the number of a scalarisation alone where its error is not
    known, and nothing where the mean is not.
    """
    if math.isnan(value.mean):
        return ""
    if isinstance(value, Scalar) and value.stderr is None:
        return f"{value.mean:.3f}"
    return measure_text(value.mean, value.stderr)


def interval_text(low: float | None, high: float | None) -> str:
    """An interval: [+0.250, +0.390]; "-" where there is none."""
    return "-" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"


def gap_text(gap: Gap) -> str:
    """A difference with its interval: +0.320 [+0.250, +0.390]; alone where one item gives no interval."""
    count = gap.low is None and abs(gap.mean) >= 1 and gap.mean.is_integer()
    mean = f"{gap.mean:+,.0f}" if count else f"{gap.mean:+.3f}"
    return mean if gap.low is None else f"{mean} {interval_text(gap.low, gap.high)}"


def is_exact(measure: Measure, record: SearchRecord) -> bool:
    """Whether a measure is counted and not sampled, such as layers: one item of it says all."""
    name = record.evaluators[measure.evaluator].name
    return name == "change" or (name == "cost" and measure.metric in COUNTED)
