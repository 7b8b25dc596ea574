"""Transactions of the driver: refused to whoever no longer holds the lease, and told of in events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from sqlalchemy import Connection

from evomerge.store import events, statements
from evomerge.store.events import Happened
from evomerge.store.lease import check_fence, last_write
from evomerge.store.outage import repeated
from evomerge.store.reading import ReadStore

Write = Callable[[Connection], bool]
"""A part of a transaction; whether it was done."""


class FencedStore(ReadStore):
    """A store that one driver writes to."""

    _gathered: list[Write] | None = None  # writes that wait for the end of ``gathering`` or ``at_once``
    _group_begins: int | None = None  # where in them the writes of ``at_once`` begin
    _gathers = 0  # the thread that does
    _new_events: list[dict[str, Any]] | None = None  # of the transaction that is open
    _front: tuple[int | None, set[int]] | None = None  # the epoch that read it, and what has been written since

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction of the driver, refused when it no longer holds the lease; one thread at a time.

        The first one after the connection was lost also says so, in an event "reconnected".
        """
        with self._turn:
            number = self.writes + 1
            lost, self._lost = self._lost, None
            try:
                with self.transaction(writes=True, was_committed=lambda: self._was_last(number)) as connection:
                    check_fence(
                        connection, self.search_id, self.epoch, self.place, statements.CHANGE_LEASE, writes=number
                    )
                    if lost is not None:
                        away_s = round(time.monotonic() - lost[0], 3)
                        self.append_event(connection, events.Reconnected(seconds=away_s, why=lost[1]))
                    self._new_events = []
                    yield connection
                    if self._new_events:
                        connection.execute(statements.NEW_EVENT, self._new_events)
            except BaseException:
                self._lost = lost or self._lost
                self._front = None
                raise
            finally:
                self._new_events = None
            self.writes = number

    @repeated
    def _was_last(self, number: int) -> bool:
        """Whether the driver's last write that was committed is that of this number."""
        with self.transaction(writes=True) as connection:
            return last_write(connection, self.search_id, self.epoch, self.place) == number

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """How attempts end that are recorded within is written in one transaction, when all of them are known.

        An exception within leaves nothing of them.

        Raises:
            ValueError: at the end, where one of the attempts was not the one that runs.
        """
        outer = self._gathered
        gathered = [] if outer is None else outer
        self._gathered, self._group_begins, self._gathers = gathered, len(gathered), get_ident()
        try:
            yield
        except BaseException:
            del gathered[self._group_begins :]
            raise
        finally:
            self._gathered, self._group_begins = outer, None
        if outer is None and gathered:
            self._write_all(gathered)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """What is recorded within is written in one transaction at the end, or before anything is read; in its order.

        An error that ends it early takes nothing of it away; what ends the process does.

        Raises:
            ValueError: at the end, where one of the attempts was not the one that runs.
        """
        gathered: list[Write] = []
        self._gathered, self._gathers = gathered, get_ident()
        try:
            yield
        except Exception:
            self._gathered = None
            if gathered:
                self._write_all(gathered)
            raise
        finally:
            self._gathered = None
        if gathered:
            self._write_all(gathered)

    @contextmanager
    def transaction(
        self, *, writes: bool = False, was_committed: Callable[[], bool] = lambda: False
    ) -> Iterator[Connection]:
        if not writes and self._gathered and self._gathers == get_ident():
            self._write_gathered(self._gathered)
        with super().transaction(writes=writes, was_committed=was_committed) as connection:
            yield connection

    def _write_gathered(self, gathered: list[Write]) -> None:
        """Write what was gathered so far, so that it can be read; but for what is written with others or not at all."""
        begins = len(gathered) if self._group_begins is None else self._group_begins
        ready = gathered[:begins]
        del gathered[:begins]
        if self._group_begins is not None:
            self._group_begins = 0
        if ready:
            self._write_all(ready)

    @repeated
    def _write_all(self, writes: Sequence[Write]) -> None:
        with self.writing() as connection:
            if not all(write(connection) for write in writes):
                raise ValueError("an attempt had ended before")

    @repeated
    def _write(self, write: Write) -> bool:
        """Write in a transaction of its own, or later in one with others (``gathering``, ``at_once``); whether it was
        done.
        """
        if self._gathered is not None and self._gathers == get_ident():
            self._gathered.append(write)
            return True
        with self.writing() as connection:
            return write(connection)

    def append_event(
        self,
        connection: Connection,
        event: Happened,
        candidate: int | None = None,
        attempt: int | None = None,
    ) -> None:
        row = {"search_id": self.search_id, "time": time.time(), "kind": event.kind}
        row |= {"candidate": candidate, "attempt": attempt, "payload": event.payload}
        if self._new_events is None:
            connection.execute(statements.NEW_EVENT, row)
        else:
            self._new_events.append(row)  # all of a transaction are one statement
