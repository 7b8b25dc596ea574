"""Database servers that go away: every message cut once, the server killed and started again, or gone for good.

What is written must be as if nothing had happened, but for the event that says what did.
"""

from __future__ import annotations

import inspect
import queue
import random
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers_postgres import Proxy, Server, When, running_server
from sqlalchemy import select, update

from evomerge.errors import InputError
from evomerge.store import engine, outage, tables
from evomerge.store.engine import ServerAwayError
from evomerge.store.events import CopyingState
from evomerge.store.lease import Lease, acquire, current_holder
from evomerge.store.rows import RaceEnd
from evomerge.store.store import Store
from evomerge.testing.store_fixtures import candidate, content, create, estimate, scores

TIMES = {"asked_at", "finished_at"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        server.execute("CREATE DATABASE search")
        yield server


def drive(store: Store) -> list[object]:
    """One small search that uses every method that writes; what the methods answered."""
    answers: list[object] = []
    store.set_state("running")
    store.record_ask(0, [candidate(number) for number in range(5)])
    for number in (0, 1, 2):
        store.record_dispatch(number, 1, "w")
    answers.append(store.record_result(0, 1, [scores()], {"merge": 0.5}, {"acc": estimate(0.5)}, "w"))
    answers.append(store.record_failure(1, 1, {"reason": "died", "message": ""}, final=True))
    answers.append(store.record_rung(2, 1, [scores()], {"merge": 0.5}, "w"))
    answers.append(store.record_result(0, 1, [scores()], {}, {}, "late"))
    store.record_cached(3, 0, {"acc": estimate(0.5)})
    store.request_command("pause")
    answers.append(store.take_commands())
    store.record_scores(0, 1, [scores("held_out")])
    outcome = RaceEnd(2, "eliminated", {"acc": estimate(0.1)}, eligible=False)
    store.record_tell(0, {0: [-0.5], 2: [-0.1]}, front=(0,), spent_s=1.5, outcomes=[outcome])
    store.update_settings({"budget": 9})
    store.record_event(CopyingState(state="ended", why="end"))
    return answers


def transcript(url: str, name: str) -> list[object]:
    """All that a search has in the database, times and reconnections apart."""
    with Store.open(url, name=name) as store:
        rows = [{k: v for k, v in content(row).items() if k not in TIMES} for row in store.candidates()]
        events = [(e.kind, e.candidate, e.attempt, e.payload) for e in store.events() if e.kind != "reconnected"]
        kept = [
            one.metrics["acc"].tobytes() for n in range(5) for s in ("search", "held_out") for one in store.scores(n, s)
        ]
        with store.transaction() as connection:
            mine = tables.command.c.search_id == store.search_id
            taken = [row.taken_at is not None for row in connection.execute(select(tables.command).where(mine))]
        row = store.search()
        return [rows, events, kept, taken, row.state, row.settings, row.spent_s, store.counts()]


class Cutter:
    """Picks messages to cut, once it is switched on; counts from there."""

    def __init__(self, pick: Any) -> None:
        self.on = False
        self._pick = pick
        self.seen = 0

    def __call__(self, _: int, message: bytes) -> When | None:
        if not self.on:
            return None
        self.seen += 1
        return self._pick(self.seen, message)  # type: ignore[no-any-return]


def drive_through(server: Server, name: str, pick: Any) -> tuple[list[object], int, int]:
    """Drive a new search through a socket that cuts; the answers, and how many messages and cuts there were."""
    create(server.url("search"), name).close()
    cutter = Cutter(pick)
    with (
        tempfile.TemporaryDirectory(prefix="pg") as folder,
        closing(Proxy(Path(folder), server.folder, cutter)) as proxy,
    ):
        with Store.open(server.url("search", Path(folder)), name=name) as store:
            cutter.on = True
            lease = acquire(store)
            answers = drive(store)
            cutter.on = False
            lease.release()
        return answers, cutter.seen, proxy.cuts


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits a hundredth of what it would, as the server is there at once."""
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", outage.FIRST_PAUSE_S / 100)
    monkeypatch.setattr(outage, "LONGEST_PAUSE_S", outage.LONGEST_PAUSE_S / 100)


STRIDE = 29
"""One of so many messages is cut. More than a method sends on a new connection, so that it succeeds in the end."""


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> tuple[list[object], list[object]]:
    """What a search answers and leaves that no message is cut of."""
    answers, sent, cuts = drive_through(server, "whole", lambda number, message: None)
    assert cuts == 0
    assert sent > 3 * STRIDE
    assert answers == [True, True, True, False, ["pause"]]
    return answers, transcript(server.url("search"), "whole")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("first", range(0, STRIDE, 3))
def test_messages_cut_anywhere_change_nothing(
    server: Server, undisturbed: tuple[list[object], list[object]], quick: None, when: When, first: int
) -> None:
    name = f"{when}-{first}"
    answers, _, cuts = drive_through(server, name, lambda number, _: when if number % STRIDE == first else None)
    assert cuts > 3
    assert (answers, transcript(server.url("search"), name)) == undisturbed


@pytest.mark.parametrize("when", ["before", "after"])
def test_half_of_the_commits_cut_change_nothing(
    server: Server, undisturbed: tuple[list[object], list[object]], quick: None, when: When
) -> None:
    """The answer to a commit is what tells a driver that it may go on; here half of them are lost."""
    chance = random.Random(7)  # a regular pattern may cut the same commit for ever

    def pick(_: int, message: bytes) -> When | None:
        return when if b"COMMIT" in message and chance.random() < 0.5 else None

    name = f"commits-{when}"
    answers, _, cuts = drive_through(server, name, pick)
    assert cuts > 10
    assert (answers, transcript(server.url("search"), name)) == undisturbed
    with Store.open(server.url("search"), name=name) as store:
        told = store.events(kinds=("reconnected",))
        assert told
        assert all(event.payload["seconds"] >= 0 and event.payload["why"] for event in told)


def test_a_killed_server_loses_nothing_and_doubles_nothing(server: Server, quick: None) -> None:
    """SIGKILL of all its processes in the middle of a search, three times, and each time it is started again."""
    create(server.url("search"), "killed").close()
    done: queue.Queue[int] = queue.Queue()
    enough = threading.Event()

    def search() -> None:
        with Store.open(server.url("search"), name="killed") as store, acquire(store):
            number = 0
            while not enough.is_set():
                store.record_ask(number, [candidate(number)])
                store.record_dispatch(number, 1, "w")
                assert store.record_result(number, 1, [scores()], {}, {"acc": estimate(number / 7)}, "w")
                store.record_tell(number, {number: [-number / 7]}, front=(), spent_s=0.0)
                done.put(number)
                number += 1

    thread = threading.Thread(target=search)
    thread.start()
    acknowledged = [done.get(timeout=60)]
    with Store.open(server.url("search"), name="killed") as reader:
        for _ in range(3):
            server.kill()
            counted = threading.Thread(target=reader.counts)  # a status page waits as well
            counted.start()
            server.start()
            counted.join()
            acknowledged += [done.get(timeout=60) for _ in range(8 + done.qsize())]
        enough.set()
        thread.join()
        rows = {row.number: row for row in reader.candidates()}
        events = reader.events()
    assert acknowledged == list(range(len(acknowledged)))
    assert all(rows[number].status == "done" and rows[number].losses == [-number / 7] for number in acknowledged)
    told = [(event.kind, event.candidate) for event in events if event.candidate is not None]
    assert told == [(kind, number) for number in rows for kind in ("dispatch", "result")]  # each once, and none stale
    assert sum(event.kind == "reconnected" for event in events) >= 1


def test_a_server_that_stays_away_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "OUTAGE_S", 0.3)
    with running_server() as own:
        own.execute("CREATE DATABASE search")
        url = own.url("search").replace("evomerge@", "evomerge:secret@")
        with create(url) as store:
            lease = acquire(store)
            own.kill()
            for use in (lambda: store.set_state("running"), store.counts, lambda: current_holder(store)):
                with pytest.raises(InputError, match=r"cannot be reached .* for more than") as refusal:
                    use()
                assert not isinstance(refusal.value, ServerAwayError)
                assert "secret" not in str(refusal.value)
            with pytest.raises(InputError, match="cannot be reached") as refusal:
                Store.open(url)
            assert "secret" not in str(refusal.value)
            lease.release()
            own.start()
            store.request_command("stop")  # the same store, once the server is back


def test_a_snapshot_that_the_server_ends_is_read_on_without(server: Server) -> None:
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'"
    url = server.url("search")
    with create(url, "snapshot") as store, Store.open(url, name="snapshot") as reader:
        with acquire(store), reader.snapshot():
            assert reader.search().state == "created"
            store.set_state("running")
            server.execute(cut)
            assert sum(reader.counts().values()) == 0
            assert reader.search().state == "running"
        with reader.snapshot():
            assert reader.search().state == "running"
            server.execute(cut)  # and nothing more is asked


def test_a_transaction_that_hangs_is_ended_by_the_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "IDLE_S", 0.2)
    create(server.url("search"), "hangs").close()

    def hang(store: Store, lease: Lease) -> None:
        with store.writing() as connection:
            lease.renew()  # on another connection: waits for the row until the server has ended this one
            store.append_event(connection, CopyingState(state="ended", why=""))

    with Store.open(server.url("search"), name="hangs") as store, acquire(store) as lease:
        with pytest.raises(ServerAwayError):
            hang(store, lease)
        assert store.events(kinds=("too late",)) == []


def test_a_row_that_stays_locked_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_S", 0.1)
    create(server.url("search"), "locked").close()
    with Store.open(server.url("search"), name="locked") as store, acquire(store) as lease, store.writing():
        refused = pytest.raises(InputError, match="locked by another process")
        with refused:
            lease.renew()


def test_a_commit_that_the_server_still_works_on_is_waited_for(server: Server) -> None:
    create(server.url("search"), "slow").close()
    with (
        Store.open(server.url("search"), name="slow") as store,
        acquire(store),
        Store.open(server.url("search"), name="slow") as other,
        ThreadPoolExecutor(1) as threads,
    ):
        with other.transaction(writes=True) as connection:
            connection.execute(update(tables.lease).where(tables.lease.c.search_id == store.search_id).values(writes=1))
            asked = threads.submit(store._was_last, 1)
            with pytest.raises(TimeoutError):
                asked.result(timeout=0.2)
        assert asked.result() is True
        assert store._was_last(2) is False


def test_every_method_that_asks_the_database_rides_out_an_outage() -> None:
    asking = [
        method
        for name, method in inspect.getmembers(Store, inspect.isfunction)
        if name not in ("writing", "transaction", "_find", "ensure_current_format")
        and any(f"self.{kind}(" in inspect.getsource(method) for kind in ("transaction", "writing"))
    ]
    assert len(asking) > 15
    assert [method.__name__ for method in asking if not hasattr(method, "__wrapped__")] == []
