"""What people are told of one candidate: its objectives and constraints, with errors, on either split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from evomerge.store import CandidateRow, Estimate

Measure = Mapping[str, Any]
"""An objective or a constraint as a search's fingerprints say it."""


class Value(BaseModel):
    """A measure of a candidate: the mean over ``n`` items and its standard error, as the metric gives it."""

    mean: float
    stderr: float
    n: int


class Gap(BaseModel):
    """The paired difference to another model on the same items; positive is better, whichever way the metric goes.

    Interval and two-sided ``p`` are corrected for all comparisons of the confirmation in this objective.
    """

    to: str
    mean: float
    low: float
    high: float
    p: float


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

    def is_kept(self, value: Value) -> bool:
        """Whether the mean keeps it; its error is not looked at."""
        return value.mean >= self.threshold if self.at_least else value.mean <= self.threshold


class Entry(BaseModel):
    """A candidate with its objectives and constraints on one split, as far as they are known.

    On the search split, fewer items than the search wants of a measure make its value an estimate. ``feasible``: no
    known value misses its constraint.
    """

    id: str
    label: str
    objectives: Mapping[str, Value]
    constraints: dict[str, Value] = {}
    feasible: bool = True


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
        objectives={o["name"]: values[o["name"]] for o in fingerprints["objectives"] if o["name"] in values},
        constraints=kept,
        feasible=all(constraints[name].is_kept(value) for name, value in kept.items()),
    )
