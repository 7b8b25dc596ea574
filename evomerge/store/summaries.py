"""Light queries over many candidates, for pages and pictures: no recipe is decompressed, and no row made in vain.

They cost milliseconds where ``Store.candidates`` takes seconds: 10,000 candidates of 200 parameters in 20 to 60 ms.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, func, select

from evomerge.store import tables
from evomerge.store.events import event_rows
from evomerge.store.outage import ride_out
from evomerge.store.reading import ReadStore
from evomerge.store.rows import Estimate, EventRow, Status

_BRIEF = (
    "number", "step", "origin", "label", "status", "same_as", "attempts", "worker", "eligible", "on_front",
    "niche", "elite",
    "timings", "failure", "asked_at", "finished_at",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Brief:
    """A candidate as a list shows it; fields as in ``CandidateRow``. ``seconds`` is the sum of its timings."""

    number: int
    step: int
    origin: str
    label: str
    status: Status
    same_as: int | None
    attempts: int
    worker: str
    eligible: bool
    on_front: bool
    niche: list[int] | None
    elite: bool
    seconds: float
    failure: dict[str, Any] | None
    asked_at: float
    finished_at: float | None
    objectives: dict[str, Estimate]


@dataclass(frozen=True, slots=True)
class Order:
    """How a list of candidates is sorted: by number, or by an objective, where only those that have a value are in it.

    Of equals those on the front come first, then those of lower number. ``after`` is where the list goes on: the number
    of the last one seen, or its mean, whether it is on the front (1 or 0), and its number.
    """

    objective: str | None = None
    descending: bool = False
    after: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """An objective of all candidates that have a value, by number: ``numbers`` int64 [n], the others float64 [n].

    ``items`` are how many each mean is of; a mean that is not known, NaN, is left out.
    """

    numbers: NDArray[np.int64]
    means: NDArray[np.float64]
    errors: NDArray[np.float64]
    items: NDArray[np.int64]


def columns(store: ReadStore, names: Sequence[str]) -> dict[str, list[Any]]:
    """These columns of ``tables.candidate``, each a list over all candidates by number.

    Raises:
        KeyError: there is no such column.
    """
    wanted = [tables.candidate.c[name] for name in names]
    rows = _all(store, select(*wanted).where(*_of(store)).order_by(tables.candidate.c.number))
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def measured(store: ReadStore, objective: str) -> Measured:
    """What all candidates are worth in one objective or constraint."""
    table = tables.objective.c
    query = select(table.candidate, table.mean, table.stderr, table.n)
    query = query.where(table.search_id == store.search_id, table.name == objective, table.mean.is_not(None))
    rows = _all(store, query.order_by(table.candidate))
    return Measured(
        numbers=np.array([row[0] for row in rows], dtype=np.int64),
        means=np.array([row[1] for row in rows], dtype=np.float64),
        errors=np.array([np.nan if row[2] is None else row[2] for row in rows], dtype=np.float64),
        items=np.array([row[3] for row in rows], dtype=np.int64),
    )


def genomes(store: ReadStore) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Every genome: numbers int64 [n] of the candidates that have one, and genomes float64 [n, parameters]."""
    table = tables.recipe.c
    query = select(table.candidate, table.genome).where(table.search_id == store.search_id, table.genome.is_not(None))
    rows = _all(store, query.order_by(table.candidate))
    numbers = np.array([row[0] for row in rows], dtype=np.int64)
    return numbers, np.stack([row[1] for row in rows]) if rows else np.empty((0, 0))


def genomes_of(store: ReadStore, numbers: Collection[int]) -> dict[int, NDArray[np.float64]]:
    """The genomes of these candidates, float64 [parameters] each, by number; of those that have one."""
    table = tables.recipe.c
    query = select(table.candidate, table.genome).where(table.search_id == store.search_id, table.genome.is_not(None))
    return {row[0]: row[1] for row in _all(store, query.where(table.candidate.in_(list(numbers))))}


def best_so_far(store: ReadStore, objective: str, *, maximise: bool) -> list[tuple[int, float]]:
    """The candidates that were the best when they came, and their means: those eligible, in the order of number."""
    table, candidates = tables.objective.c, tables.candidate.c
    query = select(candidates.number, table.mean).join_from(
        tables.objective,
        tables.candidate,
        (table.search_id == candidates.search_id) & (table.candidate == candidates.number),
    )
    query = query.where(*_of(store), candidates.eligible, table.name == objective, table.mean.is_not(None))
    rows = _all(store, query.order_by(candidates.number))
    improvements: list[tuple[int, float]] = []
    for number, mean in rows:
        if not improvements or (mean > improvements[-1][1] if maximise else mean < improvements[-1][1]):
            improvements.append((number, mean))
    return improvements


def best(store: ReadStore, objective: str, *, maximise: bool) -> Brief | None:
    """The best eligible candidate in one objective; of equals one on the front, and the one with the lowest number."""
    table, candidates = tables.objective.c, tables.candidate.c
    its = (table.search_id == candidates.search_id) & (table.candidate == candidates.number)
    query = select(candidates.number).join(tables.objective, its)
    query = query.where(*_of(store), candidates.eligible, candidates.same_as.is_(None))
    query = query.where(table.name == objective, table.mean.is_not(None))
    order = (table.mean.desc() if maximise else table.mean, candidates.on_front.desc(), candidates.number)
    rows = _all(store, query.order_by(*order).limit(1))
    return briefs(store, [rows[0].number])[0] if rows else None


def briefs(store: ReadStore, numbers: Collection[int]) -> list[Brief]:
    """These candidates, by number; those that there are."""
    return _briefs(store, _brief().where(*_of(store), tables.candidate.c.number.in_(list(numbers))))


def baselines(store: ReadStore) -> list[Brief]:
    """The candidates that were asked first, before any of the optimizer's."""
    return _briefs(store, _brief().where(*_of(store), tables.candidate.c.step == 0))


def page(
    store: ReadStore,
    order: Order,
    limit: int,
    *,
    statuses: Collection[Status] = (),
    origin: str | None = None,
    front: bool = False,
) -> list[Brief]:
    """At most ``limit`` candidates that fit, from where ``order.after`` says: a page of a list, at the same price
    wherever it is.
    """
    candidates, table = tables.candidate.c, tables.objective.c
    query = _brief().where(*_of(store))
    if statuses:
        query = query.where(candidates.status.in_(list(statuses)))
    if origin is not None:
        query = query.where(candidates.origin == origin)
    if front:
        query = query.where(candidates.on_front)
    number, mean = candidates.number, table.mean
    if order.objective is None:
        if order.after:
            query = query.where(number < order.after[-1] if order.descending else number > order.after[-1])
        query = query.order_by(number.desc() if order.descending else number)
    else:
        its = (table.search_id == candidates.search_id) & (table.candidate == candidates.number)
        query = query.join(tables.objective, its).where(table.name == order.objective, table.mean.is_not(None))
        if order.after:
            last, on_front, last_number = order.after
            query = query.where(mean <= last if order.descending else mean >= last)  # which the index can begin at
            later = number > last_number
            if on_front:
                query = query.where((mean != last) | ~candidates.on_front | later)
            else:
                query = query.where((mean != last) | (~candidates.on_front & later))
        query = query.order_by(mean.desc() if order.descending else mean, candidates.on_front.desc(), number)
    return _briefs(store, query.limit(limit), sort=False)


def events_after(store: ReadStore, seq: int, limit: int) -> list[EventRow]:
    """The first ``limit`` events after the one with this seq, oldest first."""
    table = tables.event.c
    query = select(table.seq, table.time, table.kind, table.candidate, table.attempt, table.payload)
    query = query.where(table.search_id == store.search_id, table.seq > seq).order_by(table.seq).limit(limit)

    def read() -> list[EventRow]:
        with store.transaction() as connection:
            return event_rows(connection.execute(query))

    return ride_out(read)


def last_event(store: ReadStore) -> int:
    """The seq of the newest event; it grows with everything that is written to the search."""
    query = select(func.max(tables.event.c.seq)).where(tables.event.c.search_id == store.search_id)
    return int(_all(store, query)[0][0] or 0)


def _of(store: ReadStore) -> tuple[Any, ...]:
    return (tables.candidate.c.search_id == store.search_id,)


def _brief() -> Select[Any]:
    return select(*(tables.candidate.c[name] for name in _BRIEF))


def _all(store: ReadStore, query: Select[Any]) -> Sequence[Any]:
    def read() -> Sequence[Any]:
        with store.transaction() as connection:
            return connection.execute(query).all()

    return ride_out(read)


def _briefs(store: ReadStore, query: Select[Any], *, sort: bool = True) -> list[Brief]:
    rows = _all(store, query.order_by(tables.candidate.c.number) if sort else query)
    table = tables.objective.c
    values = select(table.candidate, table.name, table.mean, table.stderr, table.n).where(
        table.search_id == store.search_id, table.candidate.in_([row.number for row in rows])
    )
    known: dict[int, dict[str, Estimate]] = {}
    for number, name, mean, stderr, n in _all(store, values):
        estimate = Estimate(
            mean=np.nan if mean is None else mean, stderr=np.nan if stderr is None else stderr, n=n
        )  # as the store's own rows have them
        known.setdefault(number, {})[name] = estimate
    return [_as_brief(row, known.get(row.number, {})) for row in rows]


def _as_brief(row: Any, objectives: dict[str, Estimate]) -> Brief:
    values = row._asdict()
    seconds = sum((values.pop("timings") or {}).values())
    return Brief(**values, seconds=seconds, objectives=objectives)
