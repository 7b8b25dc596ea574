"""The row of a search's lease: which process drives the search, for how long, and the check that fences its writes.

A driver may write while the lease has its epoch; ``lease`` takes it and renews it.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Connection, Row, Update, func, select

from evomerge.errors import InputError
from evomerge.store import tables
from evomerge.store.engine import damaged


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


def living_holders(connection: Connection) -> list[Holder]:
    """The drivers of all searches in a database of any format; reads only columns that every format has."""
    columns = tables.lease.c
    query = select(columns.host, columns.namespace, columns.pid, columns.started)
    rows = connection.execute(query.where(columns.host.is_not(None), columns.expires_at > database_time(connection)))
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
        raise _taken_over(lease_row(connection, search_id), place)


def last_write(connection: Connection, search_id: int, epoch: int | None, place: str) -> int:
    """The number of the driver's last committed write, after waiting for one that is still in progress.

    Raises:
        LeaseLostError: another driver has taken over.
    """
    row = lease_row(connection, search_id, lock=True)
    if row.epoch != epoch:
        raise _taken_over(row, place)
    return int(row.writes)


def _taken_over(row: Row[Any], place: str) -> LeaseLostError:
    now_driven = f" by process {row.pid} on {row.host}" if row.host else ""
    return LeaseLostError(place, f"was taken over{now_driven}", "This driver must end; the other one goes on.")


def lock_search(connection: Connection, search_id: int) -> None:
    """Lock the search: wait for other writing transactions, and block further ones until this one ends."""
    lease_row(connection, search_id, lock=True)


def lease_row(connection: Connection, search_id: int, *, lock: bool = False) -> Row[Any]:
    """A search's row of ``lease``; ``lock`` keeps other writing transactions out until this one ends.

    Raises:
        InputError: there is none: the store is damaged.
    """
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
        silent = database_time(connection) >= row.expires_at
    if silent:
        return None
    holder = Holder(host=row.host, namespace=row.namespace, pid=row.pid, started=row.started)
    return None if holder.is_dead() else holder


def expiry_columns(connection: Connection, expiry_s: float) -> dict[str, Any]:
    """The columns with the expiry of a lease, by both clocks."""
    boot = boot_id()
    since_start = None if boot is None else since_boot() + expiry_s
    return {"expires_at": database_time(connection) + expiry_s, "boot": boot, "expires_since_boot": since_start}


def database_time(connection: Connection) -> float:
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
