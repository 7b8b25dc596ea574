"""One driver per search: the lease in the store, its heartbeat, and the fence that stops a former driver from writing.

Every take-over increments the lease's epoch, and every write of a driver checks in the same transaction that the epoch
is still its own. So a driver that was suspended or disconnected does no harm when it comes back (Gray and Cheriton,
"Leases", SOSP 1989; the epoch is now called a fencing token).

Expiry is measured by a clock that the holder and the observer share: on one machine the seconds since boot, which
nobody can set; between machines the clock of the database. The wall clocks of hosts are never compared.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from sqlalchemy import update

from evomerge.errors import InputError
from evomerge.store import tables
from evomerge.store.engine import check_intact
from evomerge.store.events import LeaseTaken
from evomerge.store.fence import (
    Holder,
    LeaseLostError,
    check_fence,
    database_time,
    expiry_columns,
    lease_row,
    live_holder,
)
from evomerge.store.outage import with_retries
from evomerge.store.statements import CHANGE_LEASE
from evomerge.store.store import Store

EXPIRY_S = 60.0
"""After how long without a heartbeat a driver on another host may be replaced."""

MISSED_S = 1.0
"""The delay before a failed heartbeat is retried."""


class Lease:
    """The right to write to a search, renewed by its own thread until it is released. Created by ``acquire``."""

    def __init__(self, store: Store, epoch: int, expiry_s: float) -> None:
        self.epoch = epoch
        self._store = store
        self._expiry_s = expiry_s
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._heart.start()

    def renew(self) -> None:
        """Extend the lease by ``expiry_s``. Raises LeaseLostError if the search has been taken over."""
        store = self._store
        with store.transaction(writes=True) as connection:
            longer = CHANGE_LEASE.values(**expiry_columns(connection, self._expiry_s))
            check_fence(connection, store.search_id, self.epoch, store.place, longer)

    def release(self) -> None:
        """Give up the lease, so that another driver can start at once. This process can no longer write."""
        self._released.set()
        self._heart.join()
        # On a full disk the lease stays: this process ends soon, and a dead holder blocks nobody.
        with suppress(InputError), self._store.transaction(writes=True) as connection:
            connection.execute(update(tables.lease).where(self._is_ours()).values(host=None))
        self._store.epoch = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _is_ours(self) -> Any:
        return (tables.lease.c.search_id == self._store.search_id) & (tables.lease.c.epoch == self.epoch)

    def _beat(self) -> None:
        pause = self._expiry_s / 4
        while not self._released.wait(pause):
            pause = self._expiry_s / 4
            try:
                self.renew()
            except LeaseLostError:
                return  # the driver will notice at its next write
            except Exception:  # a full disk, a lock, a lost connection: the driver will get the same error
                pause = min(pause, MISSED_S)


def acquire(store: Store, *, expiry_s: float = EXPIRY_S) -> Lease:
    """Make this process the driver of the search: from now on ``store`` may write.

    The lease can be taken if its holder released it, is dead (noticed at once on the same host), or sent no heartbeat
    for ``expiry_s`` by the database's clock. Commands that were meant for the former driver are dropped.

    Raises:
        InputError: another driver is running (names its process, its host and its start), or the file is damaged.
    """
    store.epoch = with_retries(_Acquisition(store, expiry_s))
    store.writes = 0
    return Lease(store, store.epoch, expiry_s)


class _Acquisition:
    """Acquires a lease. If it is called again after a lost connection, it checks whether it already has it."""

    def __init__(self, store: Store, expiry_s: float) -> None:
        self._store = store
        self._expiry_s = expiry_s
        self._tried: dict[str, Any] = {}

    def __call__(self) -> int:
        store = self._store
        with store.transaction() as connection:
            check_intact(connection, store.place)  # a resumed search relies on everything in it
        with store.transaction(writes=True) as connection:
            row = lease_row(connection, store.search_id, lock=True)
            if self._tried and all(row._mapping[name] == value for name, value in self._tried.items()):
                return int(row.epoch)
            if (holder := live_holder(connection, row)) is not None:
                since = datetime.fromtimestamp(row.acquired_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                hint = f"Stop it first, or wait: {self._expiry_s:.0f} s after its last sign of life it is free."
                raise InputError(store.place, f"is driven by {holder} since {since}", hint)
            me = Holder.this_process()
            epoch = int(row.epoch) + 1
            taken = {"host": me.host, "namespace": me.namespace, "pid": me.pid, "started": me.started, "writes": 0}
            taken |= {"epoch": epoch, "acquired_at": database_time(connection)}
            taken |= expiry_columns(connection, self._expiry_s)
            connection.execute(update(tables.lease).where(tables.lease.c.search_id == store.search_id).values(**taken))
            store.drop_commands(connection)
            store.append_event(connection, LeaseTaken(epoch=epoch, host=me.host, pid=me.pid))
            self._tried = taken
        return int(row.epoch) + 1


def current_holder(store: Store) -> Holder | None:
    """The process that is driving the search; None if there is none, it is dead, or its lease has expired."""

    def look() -> Holder | None:
        with store.transaction() as connection:
            return live_holder(connection, lease_row(connection, store.search_id))

    return with_retries(look)


def current_epoch(store: Store) -> int:
    """How often the lease of a search was taken; it grows with each driver, even if events are deleted."""

    def look() -> int:
        with store.transaction() as connection:
            return int(lease_row(connection, store.search_id).epoch)

    return with_retries(look)
