"""Transactions of the driver: refused if it no longer holds the lease, and recorded in events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from sqlalchemy import Connection

from evomerge.store import events, statements
from evomerge.store.events import Recordable
from evomerge.store.fence import check_fence, last_write
from evomerge.store.outage import retrying
from evomerge.store.reading import ReadStore

Write = Callable[[Connection], bool]
"""A part of a transaction; returns whether it was applied."""


class FencedStore(ReadStore):
    """A store that one driver writes to."""

    _batched: list[Write] | None = None  # writes that wait for the end of ``batching`` or ``atomically``
    _group_start: int | None = None  # the position of the first write of ``atomically``
    _batching_thread = 0  # the thread whose writes are batched
    _new_events: list[dict[str, Any]] | None = None  # events of the open transaction
    _front: tuple[int | None, set[int]] | None = None  # the epoch, and the front as it was last read or written

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction of the driver, refused if it no longer holds the lease; one thread at a time.

        The first transaction after a lost connection also records an event "reconnected".
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

    @retrying
    def _was_last(self, number: int) -> bool:
        """Whether the last committed write of the driver has this number."""
        with self.transaction(writes=True) as connection:
            return last_write(connection, self.search_id, self.epoch, self.place) == number

    @contextmanager
    def atomically(self) -> Iterator[None]:
        """Write all ends of attempts that are recorded inside in one transaction, or nothing if there is an exception.

        Raises:
            ValueError: at the end, if one of the attempts was not the running one.
        """
        outer = self._batched
        batched = [] if outer is None else outer
        self._batched, self._group_start, self._batching_thread = batched, len(batched), get_ident()
        try:
            yield
        except BaseException:
            del batched[self._group_start :]
            raise
        finally:
            self._batched, self._group_start = outer, None
        if outer is None and batched:
            self._write_all(batched)

    @contextmanager
    def batching(self) -> Iterator[None]:
        """Collect what is recorded inside, and write it in order in one transaction at the end or before any read.

        An exception does not discard what was recorded before it; the end of the process does.

        Raises:
            ValueError: at the end, if one of the attempts was not the running one.
        """
        batched: list[Write] = []
        self._batched, self._batching_thread = batched, get_ident()
        try:
            yield
        except Exception:
            self._batched = None
            if batched:
                self._write_all(batched)
            raise
        finally:
            self._batched = None
        if batched:
            self._write_all(batched)

    @contextmanager
    def transaction(
        self, *, writes: bool = False, was_committed: Callable[[], bool] = lambda: False
    ) -> Iterator[Connection]:
        if not writes and self._batched and self._batching_thread == get_ident():
            self._write_batched(self._batched)
        with super().transaction(writes=writes, was_committed=was_committed) as connection:
            yield connection

    def _write_batched(self, batched: list[Write]) -> None:
        """Write the batch so far, so that it can be read, except for the writes of ``atomically``."""
        begins = len(batched) if self._group_start is None else self._group_start
        ready = batched[:begins]
        del batched[:begins]
        if self._group_start is not None:
            self._group_start = 0
        if ready:
            self._write_all(ready)

    @retrying
    def _write_all(self, writes: Sequence[Write]) -> None:
        with self.writing() as connection:
            if not all(write(connection) for write in writes):
                raise ValueError("an attempt had ended before")

    @retrying
    def _write(self, write: Write) -> bool:
        """Write in a separate transaction, or later with others (``batching``, ``atomically``). Returns whether it was
        applied.
        """
        if self._batched is not None and self._batching_thread == get_ident():
            self._batched.append(write)
            return True
        with self.writing() as connection:
            return write(connection)

    def append_event(
        self,
        connection: Connection,
        event: Recordable,
        candidate: int | None = None,
        attempt: int | None = None,
    ) -> None:
        row = {"search_id": self.search_id, "time": time.time(), "kind": event.kind}
        row |= {"candidate": candidate, "attempt": attempt, "payload": event.payload}
        if self._new_events is None:
            connection.execute(statements.NEW_EVENT, row)
        else:
            self._new_events.append(row)  # a transaction writes all its events in one statement
