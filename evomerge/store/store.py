"""The results store, the authoritative record of a search. One driver writes to it; anyone may read at any time."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from evomerge.errors import InputError
from evomerge.prices import WorkerTime
from evomerge.recipes.use import ExpertUse
from evomerge.store import events, insertion, statements, tables
from evomerge.store.events import RaceDecision, Recordable
from evomerge.store.fence import lock_search
from evomerge.store.fenced import FencedStore
from evomerge.store.outage import retrying
from evomerge.store.rows import Answers, Estimate, ItemTexts, NewCandidate, Niches, RaceEnd, Scores, Status, Verb
from evomerge.store.schema import make_tables

_RACE_ENDS: dict[str, type[events.Cached | events.Done | events.Eliminated]] = {
    event.kind: event for event in (events.Cached, events.Done, events.Eliminated)
}


class Store(FencedStore):
    """One search in a database. ``create`` makes it, ``open`` finds it, and ``lease.acquire`` permits writing.

    Each writing method is one transaction that also appends an event. It raises LeaseLostError if this process is not
    the driver, StoreFullError if the disk is full, and InputError if the database is locked, damaged or read-only;
    nothing is written then. Once a method has returned, its data survive the death of the process; data older than the
    lease's heartbeat (15 s) also survive a crash of the machine.

    If a database server is unavailable, every method retries, and writes exactly once or not at all, even if the
    response to a commit is lost: see ``outage``. Only ``create`` and ``open`` fail at once.
    """

    @classmethod
    def create(
        cls,
        place: str | Path,
        *,
        name: str,
        settings: Mapping[str, Any],
        fingerprints: Mapping[str, Any],
        environment: Mapping[str, Any],
        items: Sequence[ItemTexts] = (),
        in_place_of_undriven: bool = False,
    ) -> Self:
        """Create a store for a new search. ``place`` is the path of an SQLite file or a database URL.

        A file holds one search; a database server holds many, distinguished by ``name``. ``items`` are shown to people
        next to answers and scores.

        Args:
            in_place_of_undriven: replace a search of the same name if no driver ever held its lease; it was left by a
                process that was killed while creating it.

        Raises:
            InputError: there is already a search, or the place cannot be written.
        """
        row = {"name": name, "schema_version": tables.SCHEMA_VERSION, "created_at": time.time(), "state": "created"}
        row |= {"settings": settings, "fingerprints": fingerprints, "environment": environment}
        store = cls._connect(place)
        try:
            with store.transaction(writes=True, was_committed=lambda: store._was_created(row)) as connection:
                make_tables(connection, store.place)
                is_file = connection.dialect.name == "sqlite"
                if is_file and connection.execute(select(tables.search.c.id)).first() is not None:
                    raise InputError(store.place, "holds a search already", "Resume it, or choose another folder.")
                if in_place_of_undriven:
                    insertion.drop_undriven(connection, name)
                new = insert(tables.search).values(**row).returning(tables.search.c.id)
                store.search_id = connection.execute(new).scalar_one()
                connection.execute(insert(tables.lease).values(search_id=store.search_id, epoch=0, writes=0))
                insertion.insert_items(connection, store.search_id, items)
                store.append_event(connection, events.Created())
        except IntegrityError as error:
            store.close()
            raise InputError(store.place, f"holds a search named {name!r} already", "Choose another name.") from error
        except BaseException:
            store.close()
            raise
        return store

    @retrying
    def _was_created(self, row: Mapping[str, Any]) -> bool:
        columns = tables.search.c
        ours = select(columns.id).where(columns.name == row["name"], columns.created_at == row["created_at"])
        with self.transaction(writes=True) as connection:
            make_tables(connection, self.place)  # waits for other processes that create them
            return connection.execute(ours).first() is not None

    # What the driver writes about candidates

    @retrying
    def record_ask(self, step: int, candidates: Sequence[NewCandidate]) -> None:
        """Record all candidates of one ask, in the order asked."""
        now = time.time()

        def write(connection: Connection) -> bool:
            rows = [self._asked(step, new, now) for new in candidates]
            connection.execute(statements.NEW_CANDIDATE, rows)
            connection.execute(
                statements.NEW_RECIPE,
                [
                    {"search_id": self.search_id, "candidate": new.number, "genome": new.genome, "recipe": new.recipe}
                    for new in candidates
                ],
            )
            self.append_event(connection, events.Ask(step=step, candidates=[new.number for new in candidates]))
            return True

        self._write(write)

    def _asked(self, step: int, new: NewCandidate, now: float) -> dict[str, Any]:
        return {
            "search_id": self.search_id,
            "number": new.number,
            "step": step,
            "origin": new.origin,
            "label": new.label,
            "recipe_hash": new.recipe_hash,
            "status": "asked",
            "attempts": 0,
            "worker": "",
            "asked_at": now,
        }

    @retrying
    def record_cached(
        self, number: int, same_as: int, objectives: Mapping[str, Estimate], *, eligible: bool = True
    ) -> None:
        """Record that a candidate reuses the scores of another one with the same recipe."""
        values = {"status": "cached", "same_as": same_as, "finished_at": time.time(), "eligible": eligible}

        def write(connection: Connection) -> bool:
            own = values | self._change_of(connection, same_as)
            if not self._change(connection, number, own, ("asked",)):
                raise ValueError(f"candidate {number} is not waiting")
            insertion.insert_objectives(connection, self.search_id, number, objectives)
            self.append_event(connection, events.Cached(same_as=same_as), number)
            return True

        self._write(write)

    @retrying
    def record_dispatch(self, number: int, attempt: int, worker: str, decided: RaceDecision | None = None) -> None:
        """Record that an attempt begins. Attempts count from 1; a higher one makes every lower one stale.

        ``decided`` is kept in the event: the decision in the candidate's race that led to this attempt.
        """
        values = {"status": "running", "attempts": attempt, "worker": worker}

        def write(connection: Connection) -> bool:
            if not self._change(connection, number, values, ("asked", "running"), fewer_attempts_than=attempt):
                raise ValueError(f"candidate {number} is finished, or attempt {attempt} is not its next")
            fields = {} if decided is None else decided.model_dump()
            self.append_event(connection, events.Dispatch(worker=worker, **fields), number, attempt)
            return True

        self._write(write)

    @retrying
    def record_result(
        self,
        number: int,
        attempt: int,
        scores: Sequence[Scores],
        timings: Mapping[str, float],
        objectives: Mapping[str, Estimate],
        worker: str,
        *,
        eligible: bool = True,
        answers: Sequence[Answers] = (),
        change: float | None = None,
        uses: Mapping[str, ExpertUse] = MappingProxyType({}),
    ) -> bool:
        """Record that an attempt succeeded. If it is not the running one, only record an event "stale", return False.

        ``uses`` says how a model with experts used them, by evaluator name.
        """
        values: dict[str, Any] = {"status": "done", "timings": dict(timings), "failure": None, "worker": worker}
        values |= {"eligible": eligible, "change": change}

        def write(connection: Connection) -> bool:
            if not self._finish(connection, number, attempt, "result", values | {"finished_at": time.time()}):
                return False
            insertion.insert_scores(connection, self.search_id, number, scores)
            insertion.insert_answers(connection, self.search_id, number, attempt, answers)
            insertion.insert_objectives(connection, self.search_id, number, objectives)
            self.append_event(connection, events.Result(worker=worker), number, attempt)
            self._append_uses(connection, uses, number, attempt)
            return True

        return self._write(write)

    @retrying
    def record_rung(
        self,
        number: int,
        attempt: int,
        scores: Sequence[Scores],
        timings: Mapping[str, float],
        worker: str,
        *,
        answers: Sequence[Answers] = (),
        change: float | None = None,
        uses: Mapping[str, ExpertUse] = MappingProxyType({}),
    ) -> bool:
        """Record that an attempt scored a candidate up to a rung of its race; it waits for the race to continue.

        ``scores`` and ``timings`` are those of all attempts so far, ``answers`` and ``uses`` those of this attempt.
        Returns False as ``record_result`` does.
        """
        values = {"status": "asked", "timings": dict(timings), "failure": None, "worker": worker, "change": change}

        def write(connection: Connection) -> bool:
            if not self._finish(connection, number, attempt, "rung", values):
                return False
            insertion.insert_scores(connection, self.search_id, number, scores)
            insertion.insert_answers(connection, self.search_id, number, attempt, answers)
            items = {s.evaluator: len(s.items) for s in scores}
            self.append_event(connection, events.Rung(items=items, worker=worker), number, attempt)
            self._append_uses(connection, uses, number, attempt)
            return True

        return self._write(write)

    @retrying
    def record_failure(self, number: int, attempt: int, failure: Mapping[str, Any], *, final: bool) -> bool:
        """Record that an attempt failed, finally or to be retried. Returns False as ``record_result`` does."""
        values: dict[str, Any] = {"status": "asked", "failure": dict(failure)}
        if final:
            values |= {"status": "failed", "finished_at": time.time()}

        def write(connection: Connection) -> bool:
            if not self._finish(connection, number, attempt, "failure", values):
                return False
            self.append_event(connection, events.Failure(**failure, final=final), number, attempt)
            return True

        return self._write(write)

    @retrying
    def record_scores(
        self, number: int, attempt: int, scores: Sequence[Scores], *, answers: Sequence[Answers] = ()
    ) -> None:
        """Record more scores of a finished candidate, such as those on held-out items, replacing earlier ones."""

        def write(connection: Connection) -> bool:
            insertion.insert_scores(connection, self.search_id, number, scores)
            insertion.insert_answers(connection, self.search_id, number, attempt, answers)
            added = events.ScoresAdded.of(scores)
            self.append_event(connection, added, number, attempt)
            return True

        self._write(write)

    @retrying
    def record_tell(
        self,
        step: int,
        losses: Mapping[int, Sequence[float]],
        *,
        front: Collection[int],
        spent_s: float,
        worker_time: WorkerTime | None = None,
        outcomes: Sequence[RaceEnd] = (),
        niches: Niches | None = None,
        without_answers: Sequence[int] = (),
    ) -> None:
        """Record a tell and everything that changes with it: what the optimizer was told, in order; the new Pareto
        front; the seconds that drivers have spent on the search, and the worker time if it has grown; the ends of
        races; changed niches of a search with features; and the candidates whose answers to search items are dropped.
        """

        def write(connection: Connection) -> bool:
            for outcome in outcomes:
                self._end_race(connection, outcome)
            for number, values in losses.items():
                self._change(connection, number, {"losses": list(values)})
            self._set_front(connection, set(front))
            if niches is not None:
                self._set_niches(connection, niches)
            self._change_search(connection, spent_s=spent_s, **_columns_of(worker_time))
            self._drop_answers(connection, without_answers)
            self.append_event(connection, events.Tell(step=step, candidates=list(losses)))
            return True

        self._write(write)

    @retrying
    def drop_answers(self, numbers: Sequence[int]) -> None:
        """Delete the answers of these candidates to search items."""
        with self.writing() as connection:
            self._drop_answers(connection, numbers)

    def _append_uses(self, connection: Connection, uses: Mapping[str, ExpertUse], number: int, attempt: int) -> None:
        if uses:
            self.append_event(connection, events.ExpertsUsed(tasks=dict(uses)), number, attempt)

    def _drop_answers(self, connection: Connection, numbers: Sequence[int]) -> None:
        if numbers:
            rows = [{"of_search_id": self.search_id, "of_candidate": number} for number in numbers]
            for statement in statements.DROP_ANSWERS:
                connection.execute(statement, rows)

    def _end_race(self, connection: Connection, outcome: RaceEnd) -> None:
        values: dict[str, Any] = {"status": outcome.status, "same_as": outcome.same_as, "eligible": outcome.eligible}
        if outcome.same_as is not None:
            values |= self._change_of(connection, outcome.same_as)
        if not self._change(connection, outcome.number, values | {"finished_at": time.time()}, ("asked",)):
            raise ValueError(f"candidate {outcome.number} is not waiting")
        insertion.insert_objectives(connection, self.search_id, outcome.number, outcome.objectives)
        items = max((estimate.n for estimate in outcome.objectives.values()), default=0)
        self.append_event(connection, _RACE_ENDS[outcome.status](items=items), outcome.number)

    def _set_front(self, connection: Connection, after: set[int]) -> None:
        if self._front is None or self._front[0] != self.epoch:  # nobody else writes within an epoch
            numbers = connection.execute(statements.ON_FRONT, {"of_search_id": self.search_id}).scalars()
            self._front = (self.epoch, set(numbers))
        before = self._front[1]
        for changed, on_front in ((before - after, False), (after - before, True)):
            for number in changed:
                self._change(connection, number, {"on_front": on_front})
        if before != after:
            self.append_event(connection, events.Front(candidates=sorted(after)))
            self._front = (self.epoch, after)

    def _set_niches(self, connection: Connection, niches: Niches) -> None:
        for number, niche in niches.by_candidate.items():
            self._change(connection, number, {"niche": list(niche)})
        for number, is_elite in niches.elites.items():
            self._change(connection, number, {"elite": is_elite})

    # What the driver writes about the search

    @retrying
    def set_state(
        self, state: str, *, why: str = "", spent_s: float | None = None, worker_time: WorkerTime | None = None
    ) -> None:
        """Record the state of the search; ``why`` says what ended it. The seconds spent and the worker time are given
        if they have grown.
        """
        spent = ({} if spent_s is None else {"spent_s": spent_s}) | _columns_of(worker_time)
        with self.writing() as connection:
            self._change_search(connection, state=state, why=why, **spent)
            self.append_event(connection, events.State(state=state, why=why))

    @retrying
    def update_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace the resolved search file, for example when its budget is raised; the event keeps the previous one."""
        with self.writing() as connection:
            query = select(tables.search.c.settings).where(tables.search.c.id == self.search_id)
            before = connection.execute(query).scalar_one()
            self._change_search(connection, settings=settings)
            self.append_event(connection, events.SettingsChanged(before=before))

    @retrying
    def record_selection(
        self, settings: Mapping[str, Any], fingerprints: Mapping[str, Any], selected: events.Selected
    ) -> None:
        """Continue with the selected sources; the event says which ones, and why."""
        with self.writing() as connection:
            self._change_search(connection, settings=settings, fingerprints=fingerprints)
            self.append_event(connection, selected)

    @retrying
    def change_evaluators(
        self, fingerprints: Mapping[str, Any], items: Sequence[ItemTexts], changed: events.EvaluatorsChanged
    ) -> None:
        """Adopt changed evaluators that score as recorded; ``items`` replace those of the same split."""
        with self.writing() as connection:
            self._change_search(connection, fingerprints=fingerprints)
            insertion.insert_items(connection, self.search_id, items)
            self.append_event(connection, changed)

    @retrying
    def begin_again(
        self,
        *,
        settings: Mapping[str, Any],
        fingerprints: Mapping[str, Any],
        environment: Mapping[str, Any],
        items: Sequence[ItemTexts],
    ) -> None:
        """Start over a search in which nothing was scored: all asks and tells are deleted."""
        with self.writing() as connection:
            insertion.drop_contents(connection, self.search_id)
            self._front = None
            self._change_search(
                connection,
                settings=settings,
                fingerprints=fingerprints,
                environment=environment,
                state="created",
                why="",
                spent_s=0.0,
                **_columns_of(WorkerTime()),
            )
            insertion.insert_items(connection, self.search_id, items)
            self.append_event(connection, events.BeganAgain())

    @retrying
    def record_event(self, event: Recordable) -> None:
        def write(connection: Connection) -> bool:
            self.append_event(connection, event)
            return True

        self._write(write)

    def _change_search(self, connection: Connection, **values: Any) -> None:
        connection.execute(statements.CHANGE_SEARCH, {"of_search_id": self.search_id, **values})

    # Commands: written by anyone, taken by the driver

    def request_command(self, verb: Verb) -> None:
        """Send the driver a command: pause, resume, stop or cancel. This needs no lease."""
        if verb not in get_args(Verb):
            raise ValueError(f"unknown command {verb!r}")
        self._insert_command({"search_id": self.search_id, "verb": verb, "requested_at": time.time()})

    @retrying
    def _insert_command(self, row: Mapping[str, Any]) -> None:
        ours = [tables.command.c[name] == value for name, value in row.items()]
        with self.transaction(writes=True) as connection:
            lock_search(connection, self.search_id)  # so that an earlier try has either succeeded or failed
            if connection.execute(select(tables.command.c.id).where(*ours)).first() is None:
                connection.execute(insert(tables.command), row)

    @retrying
    def take_commands(self) -> list[Verb]:
        """The commands received since the last call, oldest first; each is returned once."""
        columns = tables.command.c
        waiting = (
            select(columns.id, columns.verb)
            .where(columns.search_id == self.search_id, columns.taken_at.is_(None))
            .order_by(columns.id)
        )
        with self.transaction() as connection:
            if connection.execute(waiting).first() is None:  # almost always, and then nothing is written
                return []
        with self.writing() as connection:
            rows = connection.execute(waiting).all()
            for row in rows:
                connection.execute(update(tables.command).where(columns.id == row.id).values(taken_at=time.time()))
                self.append_event(connection, events.Command(verb=row.verb))
        return [row.verb for row in rows]

    def drop_commands(self, connection: Connection) -> None:
        columns = tables.command.c
        waiting = (columns.search_id == self.search_id) & columns.taken_at.is_(None)
        connection.execute(update(tables.command).where(waiting).values(taken_at=time.time()))

    # One row

    def _change(
        self,
        connection: Connection,
        number: int,
        values: Mapping[str, Any],
        statuses: tuple[Status, ...] = (),
        *,
        attempt: int | None = None,
        fewer_attempts_than: int | None = None,
    ) -> bool:
        """Update a candidate, optionally only in one of ``statuses`` or at an attempt; returns whether it changed."""
        which = {"of_search_id": self.search_id, "of_number": number}
        attempts: Literal["any", "this", "fewer"] = "any"
        if attempt is not None:
            attempts, which["of_attempt"] = "this", attempt
        elif fewer_attempts_than is not None:
            attempts, which["of_attempt"] = "fewer", fewer_attempts_than
        changing = statements.change_candidate(statuses, attempts)
        return connection.execute(changing, {**values, **which}).rowcount == 1

    def _change_of(self, connection: Connection, number: int) -> dict[str, float | None]:
        """The distance of a candidate from the base, as a column for another one with the same recipe."""
        which = {"of_search_id": self.search_id, "of_number": number}
        return {"change": connection.execute(statements.CHANGE_OF, which).scalar_one()}

    def _finish(self, connection: Connection, number: int, attempt: int, what: str, values: Mapping[str, Any]) -> bool:
        """End a running attempt; a result that comes too late, or twice, only records an event."""
        if self._change(connection, number, values, ("running",), attempt=attempt):
            return True
        self.append_event(connection, events.Stale(what=what), number, attempt)
        return False


def _columns_of(worker_time: WorkerTime | None) -> dict[str, float]:
    return {} if worker_time is None else worker_time._asdict()
