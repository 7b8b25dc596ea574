"""The statements that a driver repeats for every candidate, built once, because building takes longer than running.

Their ``of_...`` parameters select the rows; all other keys that they are executed with are columns to write.
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
"""Delete a candidate's answers to search items, and its drawings of them."""

CHANGE_SEARCH = update(tables.search).where(tables.search.c.id == bindparam("of_search_id"))

CHANGE_LEASE = update(tables.lease).where(
    *(tables.lease.c[name] == bindparam(f"of_{name}") for name in ("search_id", "epoch"))
)
"""Update the lease if it still has this epoch."""

CHANGE_OF = select(tables.candidate.c.change).where(
    tables.candidate.c.search_id == bindparam("of_search_id"), tables.candidate.c.number == bindparam("of_number")
)

ON_FRONT = select(tables.candidate.c.number).where(
    tables.candidate.c.search_id == bindparam("of_search_id"), tables.candidate.c.on_front
)


def put_score(dialect: str) -> Insert:
    """Insert scores, or replace those of the same candidate, evaluator and split."""
    return _put(tables.score, dialect)


def put_drawing(dialect: str) -> Insert:
    """Insert drawings, or replace those of the same candidate and items."""
    return _put(tables.drawing, dialect)


@cache
def _put(table: Table, dialect: str) -> Insert:
    new = (sqlite.insert if dialect == "sqlite" else postgresql.insert)(table)
    key = [column.name for column in table.primary_key]
    others = {column.name: column for column in new.excluded if column.name not in key}
    return new.on_conflict_do_update(index_elements=key, set_=others)


@cache
def change_candidate(statuses: tuple[Status, ...] = (), attempts: Literal["any", "this", "fewer"] = "any") -> Update:
    """Update a candidate if it has one of these statuses (by default any) and this number of attempts.

    Args:
        attempts: any number, exactly ``of_attempt``, or fewer than ``of_attempt``.
    """
    columns = tables.candidate.c
    ours = update(tables.candidate).where(
        columns.search_id == bindparam("of_search_id"), columns.number == bindparam("of_number")
    )
    if statuses:
        # Not IN, whose text SQLAlchemy generates anew each time.
        ours = ours.where(or_(*(columns.status == status for status in statuses)))
    attempt: BindParameter[int] = bindparam("of_attempt")
    if attempts == "any":
        return ours
    return ours.where(columns.attempts == attempt if attempts == "this" else columns.attempts < attempt)
