"""How candidates with experts used them, as measured during scoring."""

from __future__ import annotations

from evomerge.recipes.use import ExpertUse, together
from evomerge.store import CandidateRow, Store
from evomerge.store.events import ExpertsUsed
from evomerge.store.rows import ListedCandidate


def uses_of(store: Store, row: CandidateRow | ListedCandidate) -> dict[str, ExpertUse]:
    """The use of experts by evaluator name, over all attempts at a candidate; empty for models without experts.

    A candidate that reuses the scores of another has the use of that one.
    """
    number = row.number if row.same_as is None else row.same_as
    told = [event.read(ExpertsUsed).tasks for event in store.events(kinds=(ExpertsUsed.kind,), candidate=number)]
    names = dict.fromkeys(name for tasks in told for name in tasks)
    found = {name: together(tasks[name] for tasks in told if name in tasks) for name in names}
    return {name: use for name, use in found.items() if use is not None}
