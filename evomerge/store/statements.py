"""The statements that a driver repeats for every candidate, made once: making one takes longer than running it.

Their ``of_...`` parameters say which rows; the columns to write are the other keys of what they are executed with.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from sqlalchemy import BindParameter, Update, bindparam, delete, insert, select, update

from evomerge.store import tables
from evomerge.store.rows import Status

NEW_CANDIDATE = insert(tables.candidate)
NEW_RECIPE = insert(tables.recipe)
NEW_EVENT = insert(tables.event)
NEW_OBJECTIVE = insert(tables.objective)
NEW_SCORE = insert(tables.score)
NEW_ANSWER = insert(tables.answer)

OLD_SCORE = delete(tables.score).where(
    *(tables.score.c[name] == bindparam(f"of_{name}") for name in ("search_id", "candidate", "evaluator", "split"))
)

OLD_ANSWER = delete(tables.answer).where(
    *(
        tables.answer.c[name] == bindparam(f"of_{name}")
        for name in ("search_id", "candidate", "evaluator", "split", "attempt")
    )
)

CHANGE_SEARCH = update(tables.search).where(tables.search.c.id == bindparam("of_search_id"))

CHANGE_LEASE = update(tables.lease).where(
    *(tables.lease.c[name] == bindparam(f"of_{name}") for name in ("search_id", "epoch"))
)
"""The lease as long as it is of this epoch."""

ON_FRONT = select(tables.candidate.c.number).where(
    tables.candidate.c.search_id == bindparam("of_search_id"), tables.candidate.c.on_front
)


@cache
def change_candidate(statuses: tuple[Status, ...] = (), attempts: Literal["any", "this", "fewer"] = "any") -> Update:
    """A candidate as long as it is in one of these statuses, none being all, and has had so many attempts.

    Args:
        attempts: any number of them, ``of_attempt``, or fewer than ``of_attempt``.
    """
    columns = tables.candidate.c
    ours = update(tables.candidate).where(
        columns.search_id == bindparam("of_search_id"), columns.number == bindparam("of_number")
    )
    if statuses:
        ours = ours.where(columns.status.in_(statuses))
    attempt: BindParameter[int] = bindparam("of_attempt")
    if attempts == "any":
        return ours
    return ours.where(columns.attempts == attempt if attempts == "this" else columns.attempts < attempt)
