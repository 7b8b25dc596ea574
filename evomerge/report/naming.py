"""Resolving the name of a candidate: an id, a source's name, or a role."""

from __future__ import annotations

import difflib
from collections.abc import Collection

import numpy as np

from evomerge.errors import InputError
from evomerge.front import knee
from evomerge.report.conclusions import is_front
from evomerge.report.entries import SOURCE
from evomerge.report.status import status_of
from evomerge.search.estimation.preference import BEST, KNEE
from evomerge.store import Store
from evomerge.store.rows import candidate_id, number_of


def candidate_number(text: str, store: Store, names: Collection[str] = ()) -> int:
    """The number of the candidate with this id, number, or baseline label.

    Args:
        names: other valid names, which are resolved elsewhere; used for suggestions.

    Raises:
        InputError: there is none; the message suggests the nearest name.
    """
    labels = {row.label: row.number for row in store.candidates(step=0)}
    if text in labels:
        return labels[text]
    digits = text.removeprefix("c")
    if digits.isdecimal() and int(digits) < sum(store.counts().values()):
        return int(digits)
    near = difflib.get_close_matches(text, [*labels, *names], n=1)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    hint = f"{meant}`evomerge top` lists them; a source is called by its name."
    raise InputError(text, "is not a candidate of this search", hint)


def chosen(store: Store, candidate: str) -> int:
    """The number of the candidate with this id, source name, or role.

    "best" is the winner of the confirmation, or the best on the search split while there is none; for a front, it is
    the knee, the best compromise. "best at maths" is the best in one of several objectives.

    Raises:
        InputError: there is no such candidate, or none has been scored.
    """
    status = status_of(store)
    chosen_for = {pick.role: pick.id for pick in status.picks}
    if candidate == KNEE and not status.front:
        raise InputError(store.place, "has no front yet", "There is one as soon as a candidate is scored.")
    if candidate == KNEE and not is_front(status):
        return _knee(store)
    if candidate == BEST:
        id_ = chosen_for.get(BEST, chosen_for.get(KNEE, None if status.best is None else status.best.id))
        if id_ is None:
            problem = "has no candidate yet that was scored on every item and keeps all constraints"
            raise InputError(store.place, problem, "`evomerge top DIR --all` lists every candidate by its id.")
        return number_of(id_)
    if candidate in chosen_for:
        return number_of(chosen_for[candidate])
    return candidate_number(candidate, store, [BEST, KNEE, *chosen_for])


def exported(store: Store, candidate: str) -> int:
    """Like ``chosen``, for a model to be written: a source is written only if it is named as such, not as "best".

    Raises:
        InputError: there is no such candidate, or the chosen one is an unmerged source.
    """
    number = chosen(store, candidate)
    status = status_of(store)
    names = store.search().record.sources  # an earlier winner is not among them, because it is a merge
    source = next((e.label for e in status.baselines if e.id == candidate_id(number) and e.label in names), "")
    if not source or candidate not in {BEST, KNEE, *(pick.role for pick in status.picks)}:
        return number
    merges = [e.id for e in [*status.confirmed, *status.front_entries] if e.origin != SOURCE]
    other = f"; for a merge, --candidate {merges[0]} or another of `evomerge top DIR`" if merges else ""
    raise InputError(
        candidate_id(number),
        f"is the source {source} itself, unmerged, and it is the {candidate}: a copy of it is not a merge",
        f"For the copy, say --candidate {source}{other}.",
    )


def _knee(store: Store) -> int:
    """The best compromise on the front of the search split, whatever the preference."""
    front = store.front()
    return front[knee(np.array([row.losses for row in front], dtype=np.float64))].number
