"""The conclusions that a search allows, in sentences, and the roles that its candidates have in tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from evomerge.report.entries import SOURCE, gap_text
from evomerge.report.picks import Pick
from evomerge.report.search_status import SearchStatus
from evomerge.search.driving.candidates import START
from evomerge.search.estimation.preference import BEST, KNEE


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
