"""The statements that a driver repeats for every candidate, made once: making one takes longer than running it.

Their ``of_...`` parameters say which rows; the columns to write are the other keys of what they are executed with.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from sqlalchemy import BindParameter, Insert, Table, Update, bindparam, delete, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from evomerge.store import tables
from evomerge.store.rows import Status

NEW_CANDIDATE = insert(tables.candidate)
NEW_RECIPE = insert(tables.recipe)
NEW_EVENT = insert(tables.event)
NEW_OBJECTIVE = insert(tables.objective)
NEW_ANSWER = insert(tables.answer)

OLD_ANSWER = delete(tables.answer).where(
    *(
        tables.answer.c[name] == bindparam(f"of_{name}")
        for name in ("search_id", "candidate", "evaluator", "split", "attempt")
    )
)

DROP_ANSWERS = tuple(
    delete(table).where(
        table.c.search_id == bindparam("of_search_id"),
        table.c.candidate == bindparam("of_candidate"),
        table.c.split == "search",
    )
    for table in (tables.answer, tables.drawing)
)
"""What a candidate answered to search items, and drew of them."""

CHANGE_SEARCH = update(tables.search).where(tables.search.c.id == bindparam("of_search_id"))

CHANGE_LEASE = update(tables.lease).where(
    *(tables.lease.c[name] == bindparam(f"of_{name}") for name in ("search_id", "epoch"))
)
"""The lease as long as it is of this epoch."""

CHANGE_OF = select(tables.candidate.c.change).where(
    tables.candidate.c.search_id == bindparam("of_search_id"), tables.candidate.c.number == bindparam("of_number")
)

ON_FRONT = select(tables.candidate.c.number).where(
    tables.candidate.c.search_id == bindparam("of_search_id"), tables.candidate.c.on_front
)


def put_score(dialect: str) -> Insert:
    """New scores, or others in place of those that a candidate has by an evaluator on a split."""
    return _put(tables.score, dialect)


def put_drawing(dialect: str) -> Insert:
    """New drawings, or others in place of those that a candidate has of the same items."""
    return _put(tables.drawing, dialect)


@cache
def _put(table: Table, dialect: str) -> Insert:
    new = (sqlite.insert if dialect == "sqlite" else postgresql.insert)(table)
    key = [column.name for column in table.primary_key]
    others = {column.name: column for column in new.excluded if column.name not in key}
    return new.on_conflict_do_update(index_elements=key, set_=others)


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
        # Not IN, of which SQLAlchemy writes the text anew each time.
        ours = ours.where(or_(*(columns.status == status for status in statuses)))
    attempt: BindParameter[int] = bindparam("of_attempt")
    if attempts == "any":
        return ours
    return ours.where(columns.attempts == attempt if attempts == "this" else columns.attempts < attempt)
