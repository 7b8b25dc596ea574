"""What a search has chosen so far, with what that gains in every objective, and what is to be said of it.

With one objective, or several that a scalarisation makes one of, that is the best, which is called the winner once it
is chosen on held-out items. A front has no winner: the best at each objective is chosen, and the knee.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from evomerge.report.confirmed import Confirmed
from evomerge.report.entries import ConfirmedEntry, Entry, Gap, Value, gap_text
from evomerge.search.estimation.preference import BEST, KNEE, Preference
from evomerge.store import CandidateRow

if TYPE_CHECKING:
    from evomerge.report.status import SearchStatus

SOURCE = "source"
"""The origin of a model that a search began with and did not merge."""


class Pick(BaseModel):
    """A candidate that is chosen for something.

    Attributes:
        role: "best", or of a front "best at" an objective or "knee"; ``--candidate`` takes these words.
        id: of the candidate.
        label: of a landmark.
        origin: "source" where it is a model that was not merged.
        split: that it is chosen on and its values are of: "held_out" as soon as it is, before "search".
        objectives: its values.
        gains: by objective, over the source that is best in it; none of a landmark, nor on the search split.
    """

    role: str
    id: str
    label: str
    origin: str
    split: Literal["search", "held_out"]
    objectives: dict[str, Value]
    gains: dict[str, Gap]

    @property
    def called(self) -> str:
        """Its id, and what it is where it has a name: c0001 (source maths)."""
        return f"{self.id} ({kind_of(self)})" if self.label else self.id


def kind_of(shown: Entry | Pick | CandidateRow) -> str:
    """What a landmark is, in words: source maths, uniform average."""
    return f"{SOURCE} {shown.label}" if shown.origin == SOURCE else shown.label


def picks_of(
    on_search: Mapping[str, Entry], held: Confirmed, directions: Mapping[str, str], sources: Sequence[str]
) -> list[Pick]:
    """What is chosen: on held-out items where that is done, else on the search split.

    Args:
        on_search: what is chosen on the search split, by role.
        held: what is known from the held-out split.
    """
    if not held.chosen:
        too_few = held.choice is not None and held.choice.made  # then nothing is chosen by the search split instead
        return [] if too_few else [_pick(role, entry, "search", {}) for role, entry in on_search.items()]
    shown = {entry.id: entry for entry in [*held.baselines, *held.entries]}
    best = {name: best_source(held.baselines, sources, name, way) for name, way in directions.items()}
    return [_pick(role, shown[id_], "held_out", _gains(shown[id_], best)) for role, id_ in held.chosen.items()]


def _pick(role: str, entry: Entry, split: Literal["search", "held_out"], gains: dict[str, Gap]) -> Pick:
    values = {name: Value(mean=v.mean, stderr=v.stderr, n=v.n) for name, v in entry.objectives.items()}
    return Pick(role=role, id=entry.id, label=entry.label, origin=entry.origin, split=split, objectives=values,
                gains=gains)  # fmt: skip


def _gains(entry: Entry, best: Mapping[str, str]) -> dict[str, Gap]:
    if not isinstance(entry, ConfirmedEntry):
        return {}
    found = {name: gain_in(entry, name, best[name]) for name in entry.objectives}
    return {name: gap for name, gap in found.items() if gap is not None}


def gain_in(entry: ConfirmedEntry, objective: str, source: str) -> Gap | None:
    """A confirmed candidate's difference to a source in an objective; None where it was not compared."""
    return next((gap for gap in entry.objectives[objective].difference if gap.to == source), None)


def best_source(entries: Sequence[Entry], sources: Sequence[str], objective: str, way: str) -> str:
    """The label of the source that is best in an objective; empty while none is known."""
    means = {
        entry.label: entry.objectives[objective].mean
        for entry in entries
        if entry.label in sources and objective in entry.objectives
    }
    return (max if way == "maximize" else min)(means, key=means.__getitem__, default="")


def is_front(status: SearchStatus) -> bool:
    """Whether several objectives are weighed against each other by nobody."""
    return len(status.directions) > 1 and status.scalarisation is None


def preference_of(status: SearchStatus) -> Preference:
    """How the search chooses among models."""
    return Preference.of({name: way == "maximize" for name, way in status.directions.items()}, status.scalarisation)


def conclusions(status: SearchStatus) -> list[str]:
    """What was found, in sentences: of what no merge is better at than a source, and of what a front offers."""
    return [*_unsaid(status), *(_front(status) if is_front(status) else _best(status))]


def _unsaid(status: SearchStatus) -> Iterator[str]:
    """Why there is less to say than people expect."""
    choice = status.choice
    if choice is None:
        return
    if choice.made and not status.confirmed:
        yield (
            "Nothing that the search found is confirmed: no candidate beyond the landmarks was scored on every item "
            f"{'and keeps all constraints' if status.constraints else 'of the search split'}."
        )
    if choice.too_few and choice.made:
        yield f"One held-out item of {', '.join(choice.too_few)} says nothing of how good a model is: no winner by it."


def _best(status: SearchStatus) -> Iterator[str]:
    pick = next((pick for pick in status.picks if pick.role == BEST), None)
    if pick is None or not pick.label:
        return
    objective = next(iter(status.directions)) if len(status.directions) == 1 else "all objectives together"
    if pick.split == "search":
        yield f"So far nothing is better in {objective} than {kind_of(pick)}."
    elif pick.origin == SOURCE:
        yield f"No merge is better in {objective} than {kind_of(pick)}, which so is the winner itself, unmerged."
    else:
        yield f"Nothing that the search found is better in {objective} than {kind_of(pick)}, which so is the winner."


def _front(status: SearchStatus) -> Iterator[str]:
    if not status.picks:
        return
    where = "held-out" if status.picks[0].split == "held_out" else "search"
    yield f"A front has no one winner. By {where} items:"
    for pick in status.picks:
        yield f"  {pick.role}: {_offered(pick, status)}"


def _offered(pick: Pick, status: SearchStatus) -> str:
    """One candidate of a front: what it is, and its values or gains in every objective."""
    if pick.origin == SOURCE and pick.role != KNEE:
        return f"{pick.called}; no merge is better at it"
    told = []
    for name, value in pick.objectives.items():
        gain = pick.gains.get(name)
        told.append(f"{name} {value.mean:.3f}" + (f", {gap_text(gain)} over {gain.to}" if gain is not None else ""))
    return f"{pick.called}: {'; '.join(told)}"


def roles_of(status: SearchStatus, candidate: str, split: Literal["search", "held_out"]) -> list[str]:
    """What a candidate is chosen for on a split, in the words of tables: the winner, the best, the knee.

    The best on the search split stays the best there, whatever held-out items choose.
    """
    if split == "held_out":
        if not is_front(status):
            return ["winner"] if candidate == status.winner else []
        return [pick.role for pick in status.picks if pick.id == candidate and pick.split == split]
    if not is_front(status):
        return [BEST] if status.best is not None and status.best.id == candidate else []
    return [role for role, id_ in status.best_by_role.items() if id_ == candidate]
