"""One driver a search, with real processes that die, sleep and wake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from sqlalchemy import update

from evomerge.errors import InputError
from evomerge.store import fence, tables
from evomerge.store.fence import Holder
from evomerge.store.lease import EXPIRY_S, acquire, current_holder
from evomerge.store.store import Store
from evomerge.testing.store_fixtures import create, expire

# Takes the lease, says so, and writes an event for every line that it is sent.
DRIVER = """
import sys
from evomerge.errors import InputError
from evomerge.store.events import CopyingState
from evomerge.store.lease import acquire
from evomerge.store.store import Store
with Store.open(sys.argv[1]) as store, acquire(store, expiry_s=float(sys.argv[2])):
    print("driving", flush=True)
    for line in sys.stdin:
        try:
            store.record_event(CopyingState(state="ended", why=""))
            print("wrote", flush=True)
        except InputError as error:
            print(type(error).__name__, error.problem, flush=True)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    create(tmp_path / "store.db").close()
    return tmp_path / "store.db"


@contextmanager
def driver(place: Path, expiry_s: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease; killed at the end if it still runs."""
    command = [sys.executable, "-c", DRIVER, str(place), str(expiry_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert hear(process) == "driving"
            yield process
        finally:
            process.kill()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    process.stdin.write("tick\n")
    process.stdin.flush()
    return hear(process)


def test_a_living_driver_is_named_and_a_killed_one_followed_at_once(place: Path) -> None:
    with Store.open(place) as store, driver(place) as process:
        with pytest.raises(InputError, match=f"process {process.pid} on "):
            acquire(store)
        assert tell(process) == "wrote"
        process.kill()
        # Not waited for: a zombie still has its pid and its start time, and must not count as alive.
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with acquire(store):
            store.set_state("running")


def test_a_pid_that_is_gone_is_followed_at_once(place: Path) -> None:
    with Store.open(place) as store:
        with driver(place) as process:
            process.kill()
            process.wait()
        assert current_holder(store) is None
        with acquire(store) as taken:
            assert taken.epoch == 2


def test_a_driver_that_slept_past_its_lease_writes_no_more(place: Path) -> None:
    with Store.open(place) as store, driver(place, expiry_s=2.0) as process:
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while current_holder(store) is not None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with acquire(store):
            process.send_signal(signal.SIGCONT)
            assert tell(process).startswith(f"LeaseLostError was taken over by process {os.getpid()}")
            store.set_state("running")
        assert store.events(kinds=("artifacts",)) == []


def test_a_holder_elsewhere_is_followed_only_when_silent(place: Path) -> None:
    for elsewhere in ({"host": "node-7"}, {"namespace": "pid:[1]"}):
        with Store.open(place) as store:
            acquire(store).release()
            gone = {"host": Holder.this_process().host, "pid": 2**22 + 1, "expires_at": time.time() + 60}
            with store.transaction(writes=True) as connection:
                connection.execute(update(tables.lease).values(**{**gone, **elsewhere}))
            with pytest.raises(InputError, match=f"process {2**22 + 1} on {elsewhere.get('host', '')}"):
                acquire(store)
            expire(store)
            acquire(store).release()


def test_a_pid_given_to_another_process_is_not_the_holder() -> None:
    me = Holder.this_process()
    assert not me.is_dead()
    assert replace(me, started=me.started - 5).is_dead()
    assert replace(me, pid=2**22 + 1).is_dead()
    assert not replace(me, pid=2**22 + 1, host="node-7").is_dead()


def test_setting_the_clock_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    me = Holder.this_process()
    boot, created = psutil.boot_time(), psutil.Process().create_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created + 3600)
    assert not me.is_dead()


@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_setting_the_clock_neither_ends_a_lease_nor_prolongs_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    now, since_boot = fence.database_time, fence.since_boot
    with Store.open(place) as store, acquire(store):
        monkeypatch.setattr(fence, "database_time", lambda connection: now(connection) + jump_s)
        assert current_holder(store) is not None
        with pytest.raises(InputError, match="is driven by"):
            acquire(store)
        monkeypatch.setattr(fence, "since_boot", lambda: since_boot() + EXPIRY_S + 1)
        assert current_holder(store) is None


def test_another_machine_goes_by_the_clock_of_the_database(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = fence.database_time
    with Store.open(place) as store, acquire(store):
        monkeypatch.setattr(fence, "boot_id", lambda: "another machine, or this one started again")
        monkeypatch.setattr(time, "time", lambda: 0.0)  # its own clock does not count
        monkeypatch.setattr(fence, "since_boot", lambda: 1e9)
        assert current_holder(store) is not None
        monkeypatch.setattr(fence, "database_time", lambda connection: now(connection) + EXPIRY_S + 1)
        assert current_holder(store) is None
