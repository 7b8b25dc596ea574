"""Listing the searches of a database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, inspect, select

from evomerge.store import tables
from evomerge.store.fence import Holder, live_holder
from evomerge.store.reading import ReadStore

# No JSON columns, so that a damaged search does not hide the others.
_SHOWN = ("name", "state", "why", "created_at", "spent_s")


@dataclass(frozen=True, slots=True)
class ListedSearch:
    """A search in a list. ``state`` and ``why`` were last written by its driver; ``driver`` says whether it runs.

    ``created_at`` is in seconds since 1970, ``spent_s`` is how long drivers were running in seconds, and ``asked`` is
    the number of candidates so far.
    """

    name: str
    state: str
    why: str
    created_at: float
    spent_s: float
    asked: int
    driver: Holder | None


def searches(place: str | Path) -> list[ListedSearch]:
    """The searches in a database, newest first; an empty list for an empty database.

    Raises:
        InputError: there is no file or server, or the store was written by a newer program.
    """
    asked = (
        select(tables.candidate.c.search_id, func.count().label("asked"))
        .group_by(tables.candidate.c.search_id)
        .subquery()
    )
    query = (
        select(
            *(tables.search.c[name] for name in _SHOWN), tables.lease, func.coalesce(asked.c.asked, 0).label("asked")
        )
        .outerjoin(tables.lease, tables.lease.c.search_id == tables.search.c.id)
        .outerjoin(asked, asked.c.search_id == tables.search.c.id)
        .order_by(tables.search.c.created_at.desc(), tables.search.c.id.desc())
    )
    with ReadStore.connect_existing(place) as store:
        with store.transaction() as connection:
            if not inspect(connection).has_table("search"):
                return []
            formats = list(connection.execute(select(tables.search.c.schema_version)).scalars())
        store.ensure_current_format(max(formats, default=tables.SCHEMA_VERSION))
        with store.transaction() as connection:
            rows: Sequence[Any] = connection.execute(query).all()
            return [
                ListedSearch(
                    row.name, row.state, row.why, row.created_at, row.spent_s, row.asked, live_holder(connection, row)
                )
                for row in rows
            ]
