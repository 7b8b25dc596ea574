"""What a search has chosen so far, and its gain in every objective.

With one objective, or several that a scalarisation combines, the choice is the best, which is called the winner once it
is chosen on held-out items. A front has no winner: the choices are the best at each objective, and the knee.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel

from evomerge.report.confirmed import Confirmed
from evomerge.report.entries import ConfirmedEntry, Entry, Gap, Scalar, kind_of
from evomerge.store.rows import Estimate


class Pick(BaseModel):
    """A candidate that is chosen for a role.

    Attributes:
        role: "best", or for a front "best at" an objective or "knee"; ``--candidate`` accepts these words.
        id: the candidate's id.
        label: the label of a baseline, or of a candidate from an earlier search.
        origin: "source" for an unmerged model.
        split: the split of the choice and of the values: "held_out" once chosen there, before that "search".
        objectives: its values.
        scalar: the value of the scalarisation, if the search has one.
        gains: by objective, the gain over the source that is best in it; empty for baselines and on the search split.
        scalar_gain: the same in the scalarisation.
    """

    role: str
    id: str
    label: str
    origin: str
    split: Literal["search", "held_out"]
    objectives: dict[str, Estimate]
    gains: dict[str, Gap]
    scalar: Scalar | None = None
    scalar_gain: Gap | None = None

    @property
    def values(self) -> dict[str, Estimate]:
        """All values that it is judged by: the scalarisation, then the objectives."""
        return self.objectives if self.scalar is None else {self.scalar.name: self.scalar, **self.objectives}

    @property
    def all_gains(self) -> dict[str, Gap]:
        """The known gains in these values."""
        if self.scalar is None or self.scalar_gain is None:
            return self.gains
        return {self.scalar.name: self.scalar_gain, **self.gains}

    @property
    def called(self) -> str:
        """Its id, and its description if it has a name: c0001 (source maths)."""
        return f"{self.id} ({self.kind})" if self.label else self.id

    @property
    def kind(self) -> str:
        """The description of a baseline: source maths, uniform average."""
        return kind_of(self.origin, self.label)


def picks_of(
    on_search: Mapping[str, Entry], held: Confirmed, numbers: Mapping[str, str], sources: Sequence[str]
) -> list[Pick]:
    """The choices on held-out items if they are made, otherwise those on the search split.

    Args:
        on_search: the choices on the search split, by role.
        held: the results on the held-out split.
        numbers: the numbers that candidates are judged by, and their directions.
    """
    if not held.chosen:
        too_few = held.choice is not None and held.choice.made  # then the search split must not decide instead
        return [] if too_few else [_pick(role, entry, "search", {}) for role, entry in on_search.items()]
    shown = {entry.id: entry for entry in [*held.baselines, *held.entries]}
    best = {name: best_source(held.baselines, sources, name, way) for name, way in numbers.items()}
    return [_pick(role, shown[id_], "held_out", _gains(shown[id_], best)) for role, id_ in held.chosen.items()]


def _pick(role: str, entry: Entry, split: Literal["search", "held_out"], gains: dict[str, Gap]) -> Pick:
    scalar_gain = None if entry.scalar is None else gains.pop(entry.scalar.name, None)
    return Pick(
        role=role, id=entry.id, label=entry.label, origin=entry.origin, split=split, objectives=dict(entry.objectives),
        gains=gains, scalar=entry.scalar, scalar_gain=scalar_gain,
    )  # fmt: skip


def _gains(entry: Entry, best: Mapping[str, str]) -> dict[str, Gap]:
    if not isinstance(entry, ConfirmedEntry):
        return {}
    gaps = {name: gain_in(entry, name, source) for name, source in best.items()}
    return {name: gap for name, gap in gaps.items() if gap is not None}


def gain_in(entry: ConfirmedEntry, number: str, source: str) -> Gap | None:
    """A confirmed candidate's difference from a source in an objective or the scalarisation; None if not compared."""
    return next((gap for gap in entry.gaps(number) if gap.to == source), None)


def best_source(entries: Sequence[Entry], sources: Sequence[str], number: str, way: str) -> str:
    """The label of the source that is best in an objective or in the scalarisation; empty if unknown."""
    means = {
        entry.label: value.mean
        for entry in entries
        if entry.label in sources and (value := entry.value(number)) is not None
    }
    return (max if way == "maximize" else min)(means, key=means.__getitem__, default="")
