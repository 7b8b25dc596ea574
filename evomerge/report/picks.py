"""What a search has chosen so far, its gain in every objective, and the conclusions.

With one objective, or several that a scalarisation combines, the choice is the best, which is called the winner once it
is chosen on held-out items. A front has no winner: the choices are the best at each objective, and the knee.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from evomerge.report.confirmed import Confirmed
from evomerge.report.entries import SOURCE, ConfirmedEntry, Entry, Gap, Scalar, gap_text, kind_of
from evomerge.search.driving.candidates import START
from evomerge.search.estimation.preference import BEST, KNEE
from evomerge.store.rows import Estimate

if TYPE_CHECKING:
    from evomerge.report.search_status import SearchStatus


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


def is_front(status: SearchStatus) -> bool:
    """Whether there are several objectives without a scalarisation."""
    return len(status.directions) > 1 and status.scalarisation is None


def conclusions(status: SearchStatus) -> list[str]:
    """The conclusions in sentences: baselines that could not be scored, objectives in which no merge beats a source,
    the choices of a front, and how merges combine several skills.
    """
    return [
        *(baseline.text for baseline in status.unscored),
        *_unsaid(status),
        *(_front(status) if is_front(status) else _best(status)),
        *(composition.sentence for composition in status.compositions),
    ]


def _unsaid(status: SearchStatus) -> Iterator[str]:
    """Why there are fewer conclusions than people may expect."""
    choice = status.choice
    if choice is None:
        return
    if choice.made and not status.confirmed:
        yield (
            "Nothing that the search found is confirmed: no candidate beyond the baselines was scored on every item "
            f"{'and keeps all constraints' if status.constraints else 'of the search split'}."
        )
    if choice.too_few and choice.made:
        yield f"One held-out item of {', '.join(choice.too_few)} says nothing of how good a model is: no winner by it."


def _best(status: SearchStatus) -> Iterator[str]:
    pick = next((pick for pick in status.picks if pick.role == BEST), None)
    if pick is None or not pick.label or pick.origin == START:
        return
    objective = f"its {status.scalar.name}" if status.scalar is not None else next(iter(status.directions))
    if pick.split == "search":
        yield f"So far nothing is better in {objective} than {pick.kind}."
    elif pick.origin == SOURCE:
        yield f"No merge is better in {objective} than {pick.kind}: the winner is that source itself, unmerged."
    else:
        yield f"Nothing that the search found is better in {objective} than {pick.kind}: that is the winner."


def _front(status: SearchStatus) -> Iterator[str]:
    if not status.picks:
        return
    where = "held-out" if status.picks[0].split == "held_out" else "search"
    yield f"A front has no one winner. By {where} items:"
    for pick in status.picks:
        yield f"  {pick.role}: {_offered(pick, status)}"


def _offered(pick: Pick, status: SearchStatus) -> str:
    """A candidate on a front: its description, and its values or gains in every objective."""
    if pick.origin == SOURCE and pick.role != KNEE:
        return f"{pick.called}; no merge is better at it"
    values = []
    for name, value in pick.objectives.items():
        gain = pick.gains.get(name)
        values.append(f"{name} {value.mean:.3f}" + (f", {gap_text(gain)} over {gain.to}" if gain is not None else ""))
    return f"{pick.called}: {'; '.join(values)}"


def roles_of(status: SearchStatus, candidate: str, split: Literal["search", "held_out"]) -> list[str]:
    """The roles of a candidate on a split, as named in tables: the winner, the best, the knee.

    The best on the search split stays the best there, whatever is chosen on held-out items.
    """
    if split == "held_out":
        if not is_front(status):
            return ["winner"] if candidate == status.winner else []
        return [pick.role for pick in status.picks if pick.id == candidate and pick.split == split]
    if not is_front(status):
        return [BEST] if status.best is not None and status.best.id == candidate else []
    return [role for role, id_ in status.best_by_role.items() if id_ == candidate]
