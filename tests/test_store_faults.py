"""Faults of machines: killed writers, full disks, damaged and locked files. What was acknowledged is never lost."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import sqlite3
import time
import zlib
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy

from evomerge.errors import InputError
from evomerge.search.settings.folder import open_store
from evomerge.store import engine, tables
from evomerge.store.columns import PlainText, Real, WholeNumber
from evomerge.store.engine import StoreFullError
from evomerge.store.lease import acquire
from evomerge.store.rows import Answers, NewCandidate, Scores
from evomerge.store.store import Store
from evomerge.store.summaries import events_after
from evomerge.testing.store_fixtures import candidate, create, estimate

KILLS = 20


def measured(number: int) -> Scores:
    values = np.full(50, number / 7, dtype=np.float32)
    return Scores("task@1", "search", np.arange(50, dtype=np.int32), {"acc": values})


def drive(place: Path, acknowledge: Connection) -> None:
    """Resume, then search for ever: every generation of four is asked, scored and told, and each return reported."""
    store = Store.open(place)
    acquire(store)
    waiting = [(row.number, row.attempts) for row in store.candidates(statuses=("asked", "running"))]
    number = sum(store.counts().values())
    while True:
        for pending, attempts in waiting:
            store.record_dispatch(pending, attempts + 1, "w")
            store.record_result(pending, attempts + 1, [measured(pending)], {}, {"acc": estimate(pending / 7)}, "w")
            acknowledge.send(("done", pending))
        if number:
            told = {done: [-done / 7] for done in range(number - 4, number)}
            store.record_tell(number // 4 - 1, told, front=(), spent_s=0.0)
            acknowledge.send(("told", number // 4 - 1))
        new: list[NewCandidate] = [candidate(number + position) for position in range(4)]
        store.record_ask(number // 4, new)
        acknowledge.send(("asked", number // 4))
        waiting = [(one.number, 0) for one in new]
        number += 4


def run_and_kill(place: Path, after_s: float, *, begun: bool) -> list[tuple[str, int]]:
    """What a driver reported before SIGKILL, so long after its start, or after its first report when it has begun."""
    context = multiprocessing.get_context("fork")  # starts in milliseconds; no database is open across it
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=drive, args=(place, theirs))
    process.start()
    theirs.close()
    if begun:
        ours.poll(None)
    time.sleep(after_s)
    process.kill()
    process.join()
    reports = []
    try:
        while True:
            reports.append(ours.recv())
    except EOFError:
        return reports


def is_intact(place: Path) -> bool:
    with closing(sqlite3.connect(place)) as connection:
        return bool(connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])


@pytest.mark.nightly  # tests/test_kill.py kills a whole search
def test_a_killed_driver_loses_nothing_that_it_reported(tmp_path: Path) -> None:
    place = tmp_path / "store.db"
    create(place).close()
    reported: list[tuple[str, int]] = []
    times = random.Random(7)
    for kill in range(KILLS):
        reported += run_and_kill(place, after_s=times.uniform(0.0, 0.2), begun=kill % 4 != 0)
        with Store.open(place) as store:
            rows = {row.number: row for row in store.candidates()}
            steps = {(step.kind, step.step) for step in store.steps()}
        assert len(rows) % 4 == 0  # an ask is there whole or not at all
        for what, number in reported:
            if what == "done":
                assert rows[number].status == "done"
                assert rows[number].objectives["acc"].mean == number / 7
            else:
                assert ("tell" if what == "told" else "ask", number) in steps
            if what == "told":
                assert all(rows[told].losses == [-told / 7] for told in range(number * 4, number * 4 + 4))
    assert len(reported) > KILLS
    with Store.open(place) as store:
        for number, row in rows.items():
            scores = store.scores(number, "search")
            assert len(scores) == (row.status == "done")  # never a result without its scores, nor twice
            assert all((one.metrics["acc"] == measured(number).metrics["acc"]).all() for one in scores)
    assert is_intact(place)


def test_a_full_disk_is_named_and_leaves_the_store_whole(tmp_path: Path) -> None:
    store = create(tmp_path / "store.db")
    with acquire(store):
        store.record_ask(0, [candidate(0)])
        with store.transaction() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

        def limit(connection: sqlite3.Connection, _: object) -> None:
            connection.execute(f"PRAGMA max_page_count = {pages + 12}")

        sqlalchemy.event.listen(store._engine, "connect", limit)
        store._engine.dispose()
        asks = 1

        def fill() -> None:
            nonlocal asks
            while asks < 1000:
                store.record_ask(asks, [candidate(asks * 5 + position) for position in range(5)])
                asks += 1

        with pytest.raises(StoreFullError, match="disk is full"):
            fill()
        assert 1 < asks < 1000
        assert len(store.candidates()) == 1 + 5 * (asks - 1)
        sqlalchemy.event.remove(store._engine, "connect", limit)
        store._engine.dispose()
        store.record_ask(asks, [candidate(asks * 5)])  # space was freed
    store.close()
    assert is_intact(tmp_path / "store.db")


@pytest.mark.parametrize("content", [b"no database, but longer than its header would be. " * 20, b"SQLite format 3\0"])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / "store.db"
    place.write_bytes(content)
    for use in (Store.open, create):
        with pytest.raises(InputError, match="damaged"):
            use(place)
    assert place.read_bytes() == content


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "store.db"
    create(place).close()
    whole = place.read_bytes()
    place.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        Store.open(place)


ODD: dict[type, list[object]] = {int: ["x", 0.5, b"\xff"], float: ["x", b"\xff", ""], str: [7, 1e300, b"\xff"]}


def typed() -> list[tuple[str, str, object]]:
    """Values that their column never holds, for every plain column that is looked at below."""
    kinds = {WholeNumber: int, Real: float, PlainText: str}
    return [
        (table.name, column.name, value)
        for table in (tables.search, tables.candidate, tables.objective)
        for column in table.columns
        if type(column.type) in kinds and column.name not in ("id", "search_id", "number", "candidate", "recipe_hash")
        for value in ODD[kinds[type(column.type)]]
    ]


def test_a_value_of_another_type_is_damage(tmp_path: Path) -> None:
    """SQLite keeps whatever it is handed, in whatever column."""
    whole = tmp_path / "whole.db"
    with create(whole) as store, acquire(store):
        store.record_ask(0, [candidate(0)])
        store.record_dispatch(0, 1, "w")
        store.record_result(0, 1, [measured(0)], {"merge": 1.0}, {"acc": estimate(0.5)}, "w")
    values = typed()
    assert len(values) > 40
    for table, column, value in values:
        place = tmp_path / "store.db"
        shutil.copy(whole, place)
        with closing(sqlite3.connect(place)) as connection, connection:
            connection.execute(f'update "{table}" set "{column}" = ?', (value,))
        if stored(place, table, column) != value:  # its affinity has made something of it that the column can hold
            continue
        with pytest.raises(InputError, match="damaged"):
            read_all(Store.open(place))


def read_all(store: Store) -> None:
    with store:
        store.search()
        store.candidates()
        store.scores(0, "search")
        store.answers(0, "search")
        store.item_texts("task@1", "search")
        store.events()


def stored(place: Path, table: str, column: str) -> object:
    with closing(sqlite3.connect(place)) as connection:
        return connection.execute(f'select "{column}" from "{table}"').fetchone()[0]


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("search", "settings", "[[1]]"),
        ("search", "settings", "{}"),
        ("search", "fingerprints", '{"objectives": {}}'),
        ("search", "settings", "[" * 100_000),
        ("candidate", "timings", '{"merge": {"seconds": 1}}'),
        ("candidate", "losses", '{"a": 1}'),
        ("candidate", "losses", "5"),
        ("candidate", "failure", '"x"'),
        ("score", "metrics", '["acc", "other"]'),
        ("score", "metrics", "[5]"),
        ("answer", "texts", zlib.compress(b'["one too many", "x"]')),
        ("answer", "texts", zlib.compress(b"5")),
        ("item", "texts", zlib.compress(b'[["a question alone"]]')),
        ("event", "payload", "[]"),
    ],
)
def test_json_of_another_shape_is_damage(tmp_path: Path, table: str, column: str, value: object) -> None:
    with create(tmp_path / "search.db") as store, acquire(store):
        store.record_ask(0, [candidate(0)])
        store.record_dispatch(0, 1, "w")
        answers = [Answers("task@1", "search", [0], ["twelve"])]
        store.record_result(0, 1, [measured(0)], {}, {"acc": estimate(0.5)}, "w", answers=answers)
    with closing(sqlite3.connect(tmp_path / "search.db")) as connection, connection:
        connection.execute(f'update "{table}" set "{column}" = ?', (value,))
    with pytest.raises(InputError, match="damaged"):
        read_all(open_store(tmp_path))


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("ask", {"step": 0}),
        ("ask", {"step": "0", "candidates": [0]}),
        ("tell", {"step": 0, "candidates": 0}),
        ("state", {}),
        ("state", {"state": None}),
        ("failure", {"reason": "died", "final": "yes"}),
        ("confirm failed", {"reason": "died", "final": True}),
        ("rung", {"items": {}}),
        ("rung", {"items": {"task@1": None}}),
        ("scores", {"scores": [["task@1", "held_out"]]}),
        ("scores", {"scores": [["task@1", "other", 1]]}),
        ("eliminated", {"items": [1]}),
        ("dispatch", {"worker": "w", "rung": 0}),
        ("shortlist", {"candidates": [0, "1"]}),
        ("shortlist", {"candidates": [0], "drawn": {"a": 1}}),
        ("winner", {"candidate": -1}),
        ("confirmed", {"chosen": {"knee": None}, "feasible": True}),
        ("screen", {"pairs": 3, "tau": "high", "on": True}),
        ("item response", {"acc": {"reference": 0.1}}),
    ],
)
def test_an_event_that_carries_something_else_is_damage(tmp_path: Path, kind: str, payload: dict[str, Any]) -> None:
    place = tmp_path / "search.db"
    with create(place) as store, acquire(store):
        store.record_ask(0, [candidate(0)])
    with closing(sqlite3.connect(place)) as connection, connection:
        connection.execute("update event set kind = ?, candidate = 0, payload = ?", (kind, json.dumps(payload)))
    with Store.open(place) as store:
        with pytest.raises(InputError, match=r"damaged.*event 1"):
            store.events()
        with pytest.raises(InputError, match=r"damaged.*event 1"):
            events_after(store, 0, 10)


@pytest.mark.parametrize("kind", ["dispatch", "failure", "result"])
def test_an_event_of_a_candidate_that_names_none_is_damage(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "search.db"
    with create(place) as store, acquire(store):
        store.record_ask(0, [candidate(0)])
    with closing(sqlite3.connect(place)) as connection, connection:
        connection.execute("update event set kind = ? where seq = 1", (kind,))
    with Store.open(place) as store, pytest.raises(InputError, match=r"damaged.*no candidate"):
        store.events()


def test_damage_in_the_middle_stops_a_driver(tmp_path: Path) -> None:
    place = tmp_path / "store.db"
    create(place).close()
    with closing(sqlite3.connect(place)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'score'").fetchone()
    content = bytearray(place.read_bytes())
    content[(page - 1) * 4096] ^= 0xFF  # in a table that taking the lease does not read
    place.write_bytes(content)
    with Store.open(place) as store, pytest.raises(InputError, match="damaged"):
        acquire(store)


def test_an_empty_file_or_another_database_holds_no_search(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()  # what is left of a program killed in `create`
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE notes (text)")
    for name in ("empty.db", "other.db"):
        with pytest.raises(InputError, match="holds no search"):
            Store.open(tmp_path / name)
    create(tmp_path / "empty.db").close()


def test_a_lock_is_waited_for_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "store.db"
    create(place).close()
    monkeypatch.setattr(engine, "BUSY_S", 0.1)
    with closing(sqlite3.connect(place, isolation_level=None)) as other, Store.open(place) as store, acquire(store):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match="locked by another process"):
            store.set_state("running")
        assert store.search().state == "created"  # readers do not wait
        other.execute("ROLLBACK")
        store.set_state("running")
