"""One driver per search: the lease in the store, its heartbeat, and the fence that stops a former driver from writing.

Every take-over increments the lease's epoch, and every write of a driver checks in the same transaction that the epoch
is still its own. So a driver that was suspended or disconnected does no harm when it comes back (Gray and Cheriton,
"Leases", SOSP 1989; the epoch is now called a fencing token).

Expiry is measured by a clock that the holder and the observer share: on one machine the seconds since boot, which
nobody can set; between machines the clock of the database. The wall clocks of hosts are never compared.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil
from sqlalchemy import Connection, Row, Update, func, select, update

from evomerge.errors import InputError
from evomerge.store import tables
from evomerge.store.engine import check_intact, damaged
from evomerge.store.events import LeaseTaken
from evomerge.store.outage import with_retries
from evomerge.store.statements import CHANGE_LEASE

if TYPE_CHECKING:
    from evomerge.store.store import Store

EXPIRY_S = 60.0
"""After how long without a heartbeat a driver on another host may be replaced."""

MISSED_S = 1.0
"""The delay before a failed heartbeat is retried."""


class LeaseLostError(InputError):
    """This process may not write to the store: another driver has taken over the search, or it never held the lease."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that drives a search.

    ``namespace`` distinguishes containers on one host, in which equal pids are different processes. ``started`` is in
    seconds since the host's boot, so setting the clock does not change it.
    """

    host: str
    namespace: str
    pid: int
    started: float

    @classmethod
    def this_process(cls) -> Holder:
        started = _started(psutil.Process())
        return cls(host=socket.gethostname(), namespace=_pid_namespace(), pid=os.getpid(), started=started)

    def is_dead(self) -> bool:
        """Whether it is known to be dead. Never the case for a process on another host or in another container."""
        if (self.host, self.namespace) != (socket.gethostname(), _pid_namespace()):
            return False
        try:
            process = psutil.Process(self.pid)
            # The pid may have been reused. A zombie is dead, although its pid is not free yet.
            return process.status() == psutil.STATUS_ZOMBIE or abs(_started(process) - self.started) > 1
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


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
            longer = CHANGE_LEASE.values(**_until(connection, self._expiry_s))
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
            row = _lease_row(connection, store.search_id, lock=True)
            if self._tried and all(row._mapping[name] == value for name, value in self._tried.items()):
                return int(row.epoch)
            if (holder := live_holder(connection, row)) is not None:
                since = datetime.fromtimestamp(row.acquired_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                hint = f"Stop it first, or wait: {self._expiry_s:.0f} s after its last sign of life it is free."
                raise InputError(store.place, f"is driven by {holder} since {since}", hint)
            me = Holder.this_process()
            epoch = int(row.epoch) + 1
            taken = {"host": me.host, "namespace": me.namespace, "pid": me.pid, "started": me.started, "writes": 0}
            taken |= {"epoch": epoch, "acquired_at": _now(connection)} | _until(connection, self._expiry_s)
            connection.execute(update(tables.lease).where(tables.lease.c.search_id == store.search_id).values(**taken))
            store.drop_commands(connection)
            store.append_event(connection, LeaseTaken(epoch=epoch, host=me.host, pid=me.pid))
            self._tried = taken
        return int(row.epoch) + 1


def current_holder(store: Store) -> Holder | None:
    """The process that is driving the search; None if there is none, it is dead, or its lease has expired."""

    def look() -> Holder | None:
        with store.transaction() as connection:
            return live_holder(connection, _lease_row(connection, store.search_id))

    return with_retries(look)


def current_epoch(store: Store) -> int:
    """How often the lease of a search was taken; it grows with each driver, even if events are deleted."""

    def look() -> int:
        with store.transaction() as connection:
            return int(_lease_row(connection, store.search_id).epoch)

    return with_retries(look)


def living_holders(connection: Connection) -> list[Holder]:
    """The drivers of all searches in a database of any format; reads only columns that every format has."""
    columns = tables.lease.c
    query = select(columns.host, columns.namespace, columns.pid, columns.started)
    rows = connection.execute(query.where(columns.host.is_not(None), columns.expires_at > _now(connection)))
    return [holder for holder in (Holder(*row) for row in rows) if not holder.is_dead()]


def check_fence(
    connection: Connection, search_id: int, epoch: int | None, place: str, changing: Update, **values: Any
) -> None:
    """Update the lease, and refuse the write if this process is not, or is no longer, the driver.

    Args:
        changing: CHANGE_LEASE or a statement derived from it; ``values`` are the columns to change.

    Raises:
        LeaseLostError: names the current driver.
    """
    if epoch is None:
        raise LeaseLostError(place, "was opened for reading", "Acquire its lease before writing.")
    ours = {"of_search_id": search_id, "of_epoch": epoch}
    if connection.execute(changing, {**values, **ours}).rowcount != 1:
        raise _taken_over(_lease_row(connection, search_id), place)


def last_write(connection: Connection, search_id: int, epoch: int | None, place: str) -> int:
    """The number of the driver's last committed write, after waiting for one that is still in progress.

    Raises:
        LeaseLostError: another driver has taken over.
    """
    row = _lease_row(connection, search_id, lock=True)
    if row.epoch != epoch:
        raise _taken_over(row, place)
    return int(row.writes)


def _taken_over(row: Row[Any], place: str) -> LeaseLostError:
    now_driven = f" by process {row.pid} on {row.host}" if row.host else ""
    return LeaseLostError(place, f"was taken over{now_driven}", "This driver must end; the other one goes on.")


def lock_search(connection: Connection, search_id: int) -> None:
    """Lock the search: wait for other writing transactions, and block further ones until this one ends."""
    _lease_row(connection, search_id, lock=True)


def _lease_row(connection: Connection, search_id: int, *, lock: bool = False) -> Row[Any]:
    query = select(tables.lease).where(tables.lease.c.search_id == search_id)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise damaged("the store", "the record of its lease is gone")
    return row


def live_holder(connection: Connection, row: Row[Any]) -> Holder | None:
    """The process in a row of ``lease``, unless it has released the lease, is dead, or the lease has expired."""
    if row.host is None:
        return None
    if row.boot is not None and row.boot == boot_id():
        silent = since_boot() >= row.expires_since_boot
    else:
        silent = _now(connection) >= row.expires_at
    if silent:
        return None
    holder = Holder(host=row.host, namespace=row.namespace, pid=row.pid, started=row.started)
    return None if holder.is_dead() else holder


def _until(connection: Connection, expiry_s: float) -> dict[str, Any]:
    """The columns with the expiry of a lease, by both clocks."""
    boot = boot_id()
    since_start = None if boot is None else since_boot() + expiry_s
    return {"expires_at": _now(connection) + expiry_s, "boot": boot, "expires_since_boot": since_start}


def _now(connection: Connection) -> float:
    """Seconds since 1970 by the database's clock, which drivers on different hosts share."""
    now: datetime = connection.execute(select(func.now())).scalar_one()
    return (now if now.tzinfo else now.replace(tzinfo=UTC)).timestamp()


@cache
def boot_id() -> str | None:
    """An id of the current boot of this machine, which its containers share, like its clock. None outside Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def since_boot() -> float:
    """Seconds since boot, including sleep; setting the clock does not change it. Linux only."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _started(process: psutil.Process) -> float:
    return float(process.create_time() - psutil.boot_time())


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux: one namespace
        return ""
