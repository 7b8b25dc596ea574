"""Transactions of the driver: refused to whoever no longer holds the lease, and told of in events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import Connection

from evomerge.store import events, statements
from evomerge.store.events import Happened
from evomerge.store.lease import check_fence, last_write
from evomerge.store.outage import repeated
from evomerge.store.reading import ReadStore


class FencedStore(ReadStore):
    """A store that one driver writes to."""

    _held: list[Callable[[Connection], bool]] | None = None

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
                    yield connection
            except BaseException:
                self._lost = lost or self._lost
                raise
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
        held: list[Callable[[Connection], bool]] = []
        self._held = held
        try:
            yield
        finally:
            self._held = None
        if held:
            self._write_all(held)

    @repeated
    def _write_all(self, writes: Sequence[Callable[[Connection], bool]]) -> None:
        with self.writing() as connection:
            if not all(write(connection) for write in writes):
                raise ValueError("an attempt had ended before")

    @repeated
    def _write(self, write: Callable[[Connection], bool]) -> bool:
        """Write in a transaction of its own, or later in that of all others (``at_once``); whether it was done."""
        if self._held is not None:
            self._held.append(write)
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
        connection.execute(statements.NEW_EVENT, row)
