"""Opening and reading a store, which any number of processes may do while the driver writes.

Counts, the front and the best are short index queries, so the cost of a status page does not grow with the search.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sqlalchemy import Connection, Engine, Row, ScalarSelect, Select, exists, func, inspect, select, union
from sqlalchemy.exc import DBAPIError

from evomerge.errors import InputError
from evomerge.store import tables
from evomerge.store.columns import DamagedValueError, decoding, parse_json
from evomerge.store.engine import (
    ServerAwayError,
    begin,
    connect,
    damaged,
    for_reading,
    is_lost,
    parse_place,
    plain_errors,
)
from evomerge.store.events import SelectScored, StepEvent, event_rows
from evomerge.store.outage import retrying, with_retries
from evomerge.store.rows import (
    STATUSES,
    AnyCandidate,
    CandidateRow,
    Estimate,
    EventRow,
    OptimizerStep,
    Scores,
    SearchRow,
    Status,
)

SYNC_EVERY_S = 1.0
"""A write is synced to disk if this much time has passed since the last sync."""

_PAGE = 10_000  # events per query, because a search may have millions


class NoSearchError(InputError):
    """The database has no search, or none with this name."""


@dataclass
class _Snapshot:
    """The transaction of a snapshot, and the search as read in it, once requested."""

    connection: Connection
    search: SearchRow | None = None


class ReadStore:
    """Everything that can be done with a store without being its driver. Use it through ``Store``.

    Every method reads one consistent state, retries while the database server is unavailable (``outage``), and raises
    InputError if the database is locked, damaged or unavailable for too long.
    """

    def __init__(self, engine: Engine, place: str, search_id: int) -> None:
        self.place = place
        self.search_id = search_id
        self.epoch: int | None = None  # the epoch of the lease, while this process holds it
        self.writes = 0  # the driver's writes in this epoch
        self._turn = threading.Lock()
        self._engine = engine
        self._reader = for_reading(engine)
        self._writer = engine.execution_options(writes=True)
        self._synced_writer = engine.execution_options(writes=True, synced=True)
        self._synced_at = -math.inf
        self._file: int | None = None  # a descriptor of the file, to notice if it is deleted or replaced
        self._lost: tuple[float, str] | None = None  # when the connection was lost, and why, until an event says so
        self._snapshot: _Snapshot | None = None

    @classmethod
    def open(cls, place: str | Path, *, name: str | None = None) -> Self:
        """Open a search for reading. ``name`` selects one if a database server has several.

        Raises:
            InputError: there is no search, there are several and no name, a newer format, or a damaged file.
        """
        store = cls.connect_existing(place)
        try:
            store.search_id = store._find(name)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def connect_existing(cls, place: str | Path) -> Self:
        """Connect to a database without selecting a search. Raises InputError if its file is missing."""
        url = parse_place(place)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise InputError(str(place), "holds no search", "Check the folder.")  # connecting would create the file
        store = cls._connect(place)
        if url.get_backend_name() == "sqlite" and hasattr(os, "O_PATH"):
            # Closing any other descriptor of the file would release SQLite's locks on it.
            store._file = os.open(url.database or "", os.O_PATH)
        return store

    @classmethod
    def _connect(cls, place: str | Path) -> Self:
        url = parse_place(place)
        shown = url.database if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)
        return cls(connect(url), str(shown), search_id=0)

    def _find(self, name: str | None) -> int:
        # Columns by name, because the table of a newer program may have others.
        query = select(tables.search.c.id, tables.search.c.name, tables.search.c.schema_version)
        with self.transaction() as connection:
            searches = connection.execute(query).all() if inspect(connection).has_table("search") else []
        rows = [row for row in searches if name in (None, row.name)]
        if not rows:
            raise NoSearchError(self.place, f"holds no search{f' named {name!r}' if name else ''}", "Check the folder.")
        if len(rows) > 1:
            raise InputError(self.place, f"holds {len(rows)} searches", "Name the one that you mean.")
        self.ensure_current_format(rows[0].schema_version)
        return int(rows[0].id)

    def ensure_current_format(self, version: int) -> None:
        """Refuse the format of a newer program, and migrate an older one."""
        if version > tables.SCHEMA_VERSION:
            problem = f"was written by a newer Evomerge (format {version}; this one reads {tables.SCHEMA_VERSION})"
            raise InputError(self.place, problem, "Update Evomerge to open it.")
        if version < tables.SCHEMA_VERSION:
            from evomerge.store.schema import migrate  # takes a second to import and is rarely needed

            with self.transaction(writes=True) as connection:
                migrate(connection, self.place)

    def close(self) -> None:
        self._end_snapshot()
        self._engine.dispose()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Transactions

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read everything inside from one consistent state, in one transaction: a page needs a dozen queries.

        A write or a lost connection ends the snapshot; later reads see the newest state. One thread at a time.
        """
        with_retries(self._begin_snapshot)
        try:
            yield
        finally:
            self._end_snapshot()

    def _begin_snapshot(self) -> None:
        self._end_snapshot()
        with plain_errors(self.place):
            self._snapshot = _Snapshot(self._reader.connect())
            begin(self._snapshot.connection)

    def _end_snapshot(self) -> None:
        if self._snapshot is not None:
            with suppress(DBAPIError):  # everything was already read, so a lost connection does not matter
                self._snapshot.connection.close()
            self._snapshot = None

    @contextmanager
    def transaction(
        self, *, writes: bool = False, was_committed: Callable[[], bool] = lambda: False
    ) -> Iterator[Connection]:
        """One transaction: committed at the end, rolled back by an exception.

        Args:
            was_committed: finds out whether it was committed if the response to the commit was lost.

        Raises:
            ServerAwayError: the connection was lost, and the transaction was not committed as far as is known.
            InputError: the file was deleted, so nobody would see what is written to it.
        """
        if self._file is not None and os.fstat(self._file).st_nlink == 0:
            raise InputError(self.place, "was deleted or replaced while it was in use", "Put it back from a backup.")
        if writes:
            self._end_snapshot()
        synced = writes and time.monotonic() - self._synced_at > SYNC_EVERY_S
        engine = self._synced_writer if synced else self._writer if writes else self._reader
        try:
            with plain_errors(self.place):
                if self._snapshot is not None:
                    yield self._snapshot.connection
                else:
                    with engine.connect() as connection:
                        begin(connection)
                        yield connection
                        self._commit(connection, was_committed)
        except ServerAwayError as error:
            self._end_snapshot()
            self._note_loss(error.problem)
            raise
        except DamagedValueError as error:
            raise damaged(self.place, str(error)) from error
        if synced:
            self._synced_at = time.monotonic()

    def _commit(self, connection: Connection, was_committed: Callable[[], bool]) -> None:
        try:
            connection.commit()
        except DBAPIError as error:
            if not is_lost(error) or not was_committed():
                raise
            self._note_loss("the connection was lost after a commit")

    def _note_loss(self, why: str) -> None:
        self._lost = self._lost or (time.monotonic(), why)

    # The search

    def search(self) -> SearchRow:
        snapshot = self._snapshot
        if snapshot is not None and snapshot.search is not None:
            return snapshot.search
        row = self._search()
        if snapshot is not None:
            snapshot.search = row
        return row

    @retrying
    def _search(self) -> SearchRow:
        columns = tables.search.c
        with self.transaction() as connection:
            row = connection.execute(select(tables.search).where(columns.id == self.search_id)).one_or_none()
        if row is None:
            raise damaged(self.place, "the record of its search is gone")
        values = {name: value for name, value in row._mapping.items() if name != "id"}
        return SearchRow(place=self.place, **values)

    @retrying
    def events(
        self,
        *,
        since: int = 0,
        kinds: Collection[str] | None = None,
        newest: int | None = None,
        oldest: int | None = None,
        candidate: int | None = None,
    ) -> list[EventRow]:
        """Events after the seq ``since``, oldest first, optionally of some kinds or one candidate only, and at most
        this many of the ``newest`` or ``oldest``.
        """
        columns = tables.event.c
        query = select(columns.seq, columns.time, columns.kind, columns.candidate, columns.attempt, columns.payload)
        query = query.where(columns.search_id == self.search_id, columns.seq > since)
        if kinds is not None:
            query = query.where(columns.kind.in_(list(kinds)))
        if candidate is not None:
            query = query.where(columns.candidate == candidate)
        with self.transaction() as connection:
            if oldest is not None:
                return event_rows(connection.execute(query.order_by(columns.seq).limit(oldest)))
            rows = connection.execute(query.order_by(columns.seq.desc()).limit(newest)).all()
            return event_rows(reversed(rows))

    def steps(self) -> Iterator[OptimizerStep]:
        """Every ask and tell in order, for replaying an optimizer. They are read page by page to limit memory."""
        since = 0
        while page := self.events(since=since, kinds=("ask", "tell"), oldest=_PAGE):
            since = page[-1].seq
            for event in page:
                content = event.read(StepEvent)
                kind: Literal["ask", "tell"] = "ask" if event.kind == "ask" else "tell"
                yield OptimizerStep(kind, event.seq, content.step, tuple(content.candidates))

    @retrying
    def counts(self) -> dict[Status, int]:
        """The number of candidates in each status; each candidate has exactly one."""
        columns = tables.candidate.c
        query = select(columns.status, func.count()).where(columns.search_id == self.search_id)
        with self.transaction() as connection:
            rows = connection.execute(query.group_by(columns.status)).all()
        return dict.fromkeys(STATUSES, 0) | dict(row._tuple() for row in rows)

    @retrying
    def items_scored(self, objectives: Collection[str]) -> int:
        """The number of item scores behind the values of these objectives, over candidates with their own scores."""
        columns, measured = tables.candidate.c, tables.objective.c
        answered = select(columns.number).where(columns.search_id == self.search_id, columns.same_as.is_not(None))
        query = select(func.coalesce(func.sum(measured.n), 0)).where(
            measured.search_id == self.search_id,
            measured.name.in_(list(objectives)),
            measured.candidate.not_in(answered),  # twice as fast as a join
        )
        with self.transaction() as connection:
            return int(connection.execute(query).scalar_one())

    @retrying
    def eliminated_without(self, objective: str) -> int:
        """The number of candidates that were eliminated before they had a value of this objective."""
        columns, measured = tables.candidate.c, tables.objective.c
        its = (measured.search_id == columns.search_id) & (measured.candidate == columns.number)
        value = exists().where(its, measured.name == objective)
        query = select(func.count()).where(columns.search_id == self.search_id, columns.status == "eliminated", ~value)
        with self.transaction() as connection:
            return int(connection.execute(query).scalar_one())

    @retrying
    def has_scores(self) -> bool:
        """Whether any candidate, or any source in a selection, has been scored on any item."""
        query = select(tables.score.c.candidate).where(tables.score.c.search_id == self.search_id).limit(1)
        with self.transaction() as connection:
            if connection.execute(query).first() is not None:
                return True
        return bool(self.events(kinds=(SelectScored.kind,), oldest=1))

    # Candidates

    def candidates(
        self,
        *,
        statuses: Collection[Status] | None = None,
        step: int | None = None,
        newest: int | None = None,
    ) -> list[CandidateRow]:
        """Candidates by number: all, or those that match.

        Args:
            newest: only this many, those with the highest numbers.
        """
        columns = tables.candidate.c
        query = self._select()
        if statuses is not None:
            query = query.where(columns.status.in_(list(statuses)))
        if step is not None:
            query = query.where(columns.step == step)
        if newest is not None:
            return self._rows(query.order_by(columns.number.desc()).limit(newest))[::-1]
        return self._rows(query.order_by(columns.number))

    def candidate(self, number: int) -> CandidateRow:
        """One candidate. Raises InputError if it does not exist."""
        rows = self._rows(self._select().where(tables.candidate.c.number == number))
        if not rows:
            raise InputError(self.place, f"has no candidate {number}", "`evomerge top --all` lists them.")
        return rows[0]

    def front(self) -> list[CandidateRow]:
        """The candidates on the Pareto front, by number."""
        return self._rows(self._select().where(tables.candidate.c.on_front).order_by(tables.candidate.c.number))

    def best(self, objective: str, *, maximise: bool, k: int = 1) -> list[CandidateRow]:
        """The k best eligible candidates in one objective, best first; among equals, those on the front come first."""
        mean, columns = tables.objective.c.mean, tables.candidate.c
        query = (
            self._select()
            .join(
                tables.objective,
                (tables.objective.c.search_id == columns.search_id) & (tables.objective.c.candidate == columns.number),
            )
            .where(tables.objective.c.name == objective, mean.is_not(None), columns.eligible, columns.same_as.is_(None))
        )
        order = (mean.desc() if maximise else mean, columns.on_front.desc(), columns.number)
        return self._rows(query.order_by(*order).limit(k))

    @retrying
    def scores(self, number: int, split: str) -> list[Scores]:
        """Per-item scores of a candidate on a split, by evaluator; for a cached candidate, the reused scores."""
        mine = (tables.score.c.search_id == self.search_id) & (tables.score.c.candidate == self._scored(number))
        query = select(tables.score).where(mine, tables.score.c.split == split).order_by(tables.score.c.evaluator)
        with self.transaction() as connection:
            return [_scores(row) for row in connection.execute(query)]

    @retrying
    def scored_on(self, evaluator: str, split: str, *, most: int) -> list[int]:
        """The first candidates, at most ``most``, with scores by an evaluator on a split, by number."""
        columns = tables.score.c
        ours = (columns.search_id == self.search_id) & (columns.evaluator == evaluator) & (columns.split == split)
        query = select(columns.candidate).where(ours).order_by(columns.candidate).limit(most)
        with self.transaction() as connection:
            return [int(number) for number in connection.execute(query).scalars()]

    @retrying
    def answers(self, number: int, split: str) -> dict[str, dict[int, str]]:
        """A candidate's answers to items of a split, by evaluator and position; empty if none were kept."""
        columns = tables.answer.c
        query = select(columns.evaluator, columns["items"], columns.texts).where(
            columns.search_id == self.search_id, columns.candidate == self._scored(number), columns.split == split
        )
        by_evaluator: dict[str, dict[int, str]] = {}
        with self.transaction() as connection:
            for evaluator, items, texts in connection.execute(query.order_by(columns.evaluator, columns.attempt)):
                with decoding("an answer for each item"):
                    by_evaluator.setdefault(evaluator, {}).update(zip(items.tolist(), parse_json(texts), strict=True))
        return by_evaluator

    @retrying
    def drawings(self, number: int, split: str) -> dict[str, dict[int, bytes]]:
        """Thumbnails of what a candidate drew for items of a split, by evaluator and position, PNG or JPEG."""
        columns = tables.drawing.c
        query = select(columns.evaluator, columns.item, columns.image).where(
            columns.search_id == self.search_id, columns.candidate == self._scored(number), columns.split == split
        )
        by_evaluator: dict[str, dict[int, bytes]] = {}
        with self.transaction() as connection:
            for evaluator, item, image in connection.execute(query.order_by(columns.evaluator, columns.item)):
                by_evaluator.setdefault(evaluator, {})[item] = image
        return by_evaluator

    @retrying
    def drawn(self, number: int, split: str, evaluator: str) -> frozenset[int]:
        """The positions of items of a split that have such thumbnails."""
        columns = tables.drawing.c
        query = select(columns.item).where(
            columns.search_id == self.search_id, columns.candidate == self._scored(number), columns.split == split,
            columns.evaluator == evaluator,
        )  # fmt: skip
        with self.transaction() as connection:
            return frozenset(connection.execute(query).scalars())

    @retrying
    def answered(self) -> list[int]:
        """The candidates with kept answers to search items, or drawings, by number."""
        queries = (
            select(table.c.candidate).where(table.c.search_id == self.search_id, table.c.split == "search")
            for table in (tables.answer, tables.drawing)
        )
        with self.transaction() as connection:
            return sorted(connection.execute(union(*queries)).scalars())

    def item_texts(self, evaluator: str, split: str) -> list[tuple[str, str]]:
        """(question, right answer) of each item of a split, in order; empty if none were kept."""
        return [(question, right) for question, right, _ in self._items(evaluator, split)]

    def item_pictures(self, evaluator: str, split: str) -> list[tuple[str, ...]]:
        """The hashes of the pictures of each item of a split, in order; empty if no items were kept."""
        return [pictures for _, _, pictures in self._items(evaluator, split)]

    @retrying
    def thumbnail(self, picture: str) -> bytes | None:
        """A thumbnail of the picture with this hash, PNG or JPEG; None if no item shows it."""
        columns = tables.thumbnail.c
        query = select(columns.image).where(columns.search_id == self.search_id, columns.picture == picture)
        with self.transaction() as connection:
            image: bytes | None = connection.execute(query).scalar_one_or_none()
        return image

    @retrying
    def _items(self, evaluator: str, split: str) -> list[tuple[str, str, tuple[str, ...]]]:
        columns = tables.item.c
        ours = (columns.search_id == self.search_id) & (columns.evaluator == evaluator) & (columns.split == split)
        with self.transaction() as connection:
            texts = connection.execute(select(columns.texts).where(ours)).scalar_one_or_none()
            with decoding("a question and an answer for each item"):
                rows = [] if texts is None else parse_json(texts)
                return [(question, right, tuple(*shown)) for question, right, *shown in rows]

    def _scored(self, number: int) -> ScalarSelect[int]:
        """The candidate whose scores count for this one: usually itself, for a cached candidate another."""
        columns = tables.candidate.c
        ours = (columns.search_id == self.search_id) & (columns.number == number)
        return select(func.coalesce(columns.same_as, columns.number)).where(ours).scalar_subquery()

    def _select(self) -> Select[Any]:
        columns, recipes = tables.candidate.c, tables.recipe.c
        same = (recipes.search_id == columns.search_id) & (recipes.candidate == columns.number)
        query = select(tables.candidate, recipes.genome, recipes.recipe).join(tables.recipe, same)
        return query.where(columns.search_id == self.search_id)

    def _rows(self, query: Select[Any]) -> list[CandidateRow]:
        return self.read_candidates(query, CandidateRow)

    @retrying
    def read_candidates(self, query: Select[Any], kind: type[AnyCandidate]) -> list[AnyCandidate]:
        """The candidates that a query returns, in its order, with their objectives."""
        objectives = tables.objective.c
        numbers = query.with_only_columns(tables.candidate.c.number).correlate(None)
        of_these = select(
            objectives.candidate, objectives.name, objectives.mean, objectives.stderr, objectives.n
        ).where(objectives.search_id == self.search_id, objectives.candidate.in_(numbers))
        measured: dict[int, dict[str, Estimate]] = {}
        with self.transaction() as connection:
            rows = connection.execute(query).all()
            for number, name, mean, stderr, n in connection.execute(of_these):
                measured.setdefault(number, {})[name] = Estimate(mean=mean, stderr=stderr, n=n)
        return [_candidate(row, kind, measured.get(row.number, {})) for row in rows]


def _candidate(row: Row[Any], kind: type[AnyCandidate], objectives: dict[str, Estimate]) -> AnyCandidate:
    values = {name: value for name, value in row._mapping.items() if name != "search_id"}
    return kind(**values | {"timings": row.timings or {}}, objectives=objectives)


def _scores(row: Row[Any]) -> Scores:
    with decoding("a score for each item and metric"):
        values = row.scores.reshape(len(row.metrics), len(row.items))
    return Scores(row.evaluator, row.split, row.items, dict(zip(row.metrics, values, strict=True)))
