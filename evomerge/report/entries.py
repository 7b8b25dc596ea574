"""What people are told of one candidate: its objectives and constraints, with errors, on either split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator

from evaluators.cost import COUNTED
from evomerge.report.parameters import parameters_of
from evomerge.search.preparing.setup import violation
from evomerge.store import CandidateRow, Estimate

Measure = Mapping[str, Any]
"""An objective or a constraint as a search's fingerprints say it."""


def _none_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


Known = Annotated[float | None, BeforeValidator(_none_if_nan)]
"""A number that may not be known: NaN, which JSON has no word for, is null."""


class Value(BaseModel):
    """A measure of a candidate: the mean over ``n`` items and its standard error, as the metric gives it.

    One item says nothing of how far its mean may be off: its error is None.
    """

    mean: float
    stderr: Known
    n: int


class Gap(BaseModel):
    """The paired difference to another model on the same items; positive is better, whichever way the metric goes.

    Interval and two-sided ``p`` are corrected for all comparisons of the confirmation in this objective. They are None
    where there is one item.
    """

    to: str
    mean: float
    low: Known
    high: Known
    p: Known


class ConfirmedValue(Value):
    """A value on the held-out split, with its differences to every source and the uniform average."""

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

    def is_kept(self, value: Value) -> bool:
        """Whether the mean keeps it; its error is not looked at."""
        return value.mean >= self.threshold if self.at_least else value.mean <= self.threshold


class Entry(BaseModel):
    """A candidate with its objectives and constraints on one split, as far as they are known.

    On the search split, fewer items than the search wants of a measure make its value an estimate. ``feasible``: no
    known value misses its constraint. ``origin`` says where it comes from: "source" is a model that was not merged.
    ``parameters`` are those of the search space by name, choices by theirs; empty where the space holds no such point.
    """

    id: str
    label: str
    origin: str = ""
    objectives: Mapping[str, Value]
    constraints: dict[str, Value] = {}
    feasible: bool = True
    parameters: dict[str, float | int | str] = {}


class ConfirmedEntry(Entry):
    """A candidate of the shortlist, on the held-out split."""

    objectives: dict[str, ConfirmedValue]


def candidate_id(number: int) -> str:
    """How a candidate is named to people: c0042."""
    return f"c{number:04d}"


def constraints_of(fingerprints: Mapping[str, Any]) -> dict[str, Constraint]:
    """The constraints of a search by name."""
    return {
        c["name"]: Constraint(threshold=c["threshold"], at_least=c["maximise"]) for c in told_constraints(fingerprints)
    }


def told_constraints(fingerprints: Mapping[str, Any]) -> Sequence[Measure]:
    """The constraints of a search as its fingerprints say them; older programs said nothing of them."""
    found: Sequence[Measure] = fingerprints.get("constraints", [])
    return found


def measures_of(fingerprints: Mapping[str, Any]) -> list[Measure]:
    """The objectives and constraints of a search as its fingerprints say them."""
    return [*fingerprints["objectives"], *told_constraints(fingerprints)]


def entry(row: CandidateRow, fingerprints: Mapping[str, Any]) -> Entry:
    """A row of the store in the words of people."""
    return entry_of(row, row.objectives, fingerprints)


def entry_of(row: CandidateRow, estimates: Mapping[str, Estimate], fingerprints: Mapping[str, Any]) -> Entry:
    """A candidate with estimates of its measures by name; what is not a measure of the search is left out."""
    constraints = constraints_of(fingerprints)
    values = {name: Value(**found) for name, found in estimates.items()}
    kept = {name: values[name] for name in constraints if name in values}
    return Entry(
        id=candidate_id(row.number),
        label=row.label,
        origin=row.origin,
        objectives={o["name"]: values[o["name"]] for o in fingerprints["objectives"] if o["name"] in values},
        constraints=kept,
        feasible=all(constraints[name].is_kept(value) for name, value in kept.items()),
        parameters=dict(parameters_of(row.genome, fingerprints["parameters"])),
    )


def measure_text(mean: float, stderr: float | None) -> str:
    """A mean with its standard error: 0.620 ± 0.024. Of one item it is "-"; a count, such as of layers, has none."""
    if stderr is not None and not math.isnan(stderr):
        return f"{mean:.3f} ± {stderr:.3f}"
    return f"{mean:,.0f}" if mean > 1 and mean.is_integer() else f"{mean:.3f} ± -"


def interval_text(low: float | None, high: float | None) -> str:
    """An interval: [+0.250, +0.390]; "-" where there is none."""
    return "-" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"


def gap_text(gap: Gap) -> str:
    """A difference with its interval: +0.320 [+0.250, +0.390]; alone where one item gives no interval."""
    count = gap.low is None and abs(gap.mean) >= 1 and gap.mean.is_integer()
    mean = f"{gap.mean:+,.0f}" if count else f"{gap.mean:+.3f}"
    return mean if gap.low is None else f"{mean} {interval_text(gap.low, gap.high)}"


def is_exact(measure: Measure, fingerprints: Mapping[str, Any]) -> bool:
    """Whether a measure is counted and not sampled, such as layers: one item of it says all."""
    evaluator = fingerprints["evaluators"][measure["evaluator"]]["name"]
    return evaluator == "cost" and measure["metric"] in COUNTED
