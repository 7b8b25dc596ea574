"""The store on a PostgreSQL server keeps the contract, and many searches share one database without meeting."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from helpers_postgres import Server, database, postgres
from helpers_search import make_setup, simulate
from sqlalchemy import text, update

from evomerge.errors import InputError
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.store import ItemTexts, fence, tables
from evomerge.store.events import CopyingState
from evomerge.store.fence import Holder
from evomerge.store.lease import acquire, current_holder
from evomerge.store.listing import searches
from evomerge.store.store import Store
from evomerge.testing.store_fixtures import candidate, create, finish, scores
from evomerge.testing.stores import StoreContract

__all__ = ["database", "postgres"]  # fixtures


# What makes format 1 of a database of today's.
FORMAT_1 = (
    "ALTER TABLE candidate DROP COLUMN eligible, DROP COLUMN niche, DROP COLUMN elite, DROP COLUMN change",
    "ALTER TABLE lease DROP COLUMN writes, DROP COLUMN boot, DROP COLUMN expires_since_boot",
    "ALTER TABLE search DROP COLUMN worker_s, DROP COLUMN gpu_s, DROP COLUMN held_s",
    "DROP TABLE alembic_version, answer, item, thumbnail, drawing",
    "UPDATE search SET schema_version = 1",
)


@pytest.fixture
def url(postgres: Server, database: str) -> str:
    return postgres.url(database)


class TestPostgres(StoreContract):
    @pytest.fixture
    def place(self, url: str) -> str:
        return url


def at_once(work: Callable[[int], object], count: int) -> list[object]:
    """The results of ``work(0)`` to ``work(count - 1)``, all begun together, each in a thread."""
    gate = threading.Barrier(count)

    def begin(number: int) -> object:
        gate.wait()
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begin, range(count)))


def test_searches_are_told_apart_by_name(url: str) -> None:
    for name in ("one", "two"):
        with create(url, name) as store, acquire(store):
            store.record_ask(0, [candidate(0, label=name), candidate(1)])
    with pytest.raises(InputError, match="holds 2 searches"):
        Store.open(url)
    with pytest.raises(InputError, match="holds no search named 'three'"):
        Store.open(url, name="three")
    with Store.open(url, name="one") as one, Store.open(url, name="two") as two:
        assert [store.candidate(0).label for store in (one, two)] == ["one", "two"]
        with acquire(one), acquire(two):
            finish(one, 0, mean=0.5)
            two.record_tell(0, {0: [0.1]}, front=(0,), spent_s=1.0)
            one.request_command("stop")
            assert two.take_commands() == []
            assert one.take_commands() == ["stop"]
        assert (one.counts()["done"], two.counts()["done"]) == (1, 0)
        assert (one.front(), [row.number for row in two.front()]) == ([], [0])
        assert (len(one.scores(0, "search")), two.scores(0, "search")) == (1, [])


def test_drivers_of_several_searches_do_not_meet(url: str) -> None:
    """They also all begin in an empty database, of which one makes the tables."""

    def drive(search: int) -> None:
        with create(url, f"search{search}") as store, acquire(store):
            for step in range(8):
                store.record_ask(step, [candidate(step, label=str(search))])
                store.record_dispatch(step, 1, "w")
                assert store.record_result(step, 1, [scores(start=search)], {}, {}, "w")
                store.record_tell(step, {step: [float(search)]}, front=(step,), spent_s=0.0)

    at_once(drive, 4)
    for search in range(4):
        with Store.open(url, name=f"search{search}") as store:
            rows = store.candidates()
            assert [(row.label, row.losses, row.on_front) for row in rows] == [
                (str(search), [float(search)], row.number == 7) for row in rows
            ]
            assert [store.scores(row.number, "search")[0].metrics["acc"][0] for row in rows] == [search] * 8
            steps = [(step.kind, step.step) for step in store.steps()]
            assert steps == [(kind, step) for step in range(8) for kind in ("ask", "tell")]


def test_of_two_searches_of_one_name_one_is_made(url: str) -> None:
    def make(_: int) -> str:
        try:
            create(url, "same").close()
        except InputError as error:
            return error.problem
        return "made"

    assert sorted(at_once(make, 4)) == ["holds a search named 'same' already"] * 3 + ["made"]  # type: ignore[type-var]


def test_of_two_drivers_of_one_search_one_drives(url: str) -> None:
    create(url, "one").close()
    stores = [Store.open(url, name="one") for _ in range(4)]

    def drive(number: int) -> str:
        try:
            return f"drives in epoch {acquire(stores[number]).epoch}"
        except InputError as error:
            return error.problem.partition(" process")[0]

    assert sorted(at_once(drive, 4)) == ["drives in epoch 1"] + ["is driven by"] * 3  # type: ignore[type-var]
    for store in stores:
        store.close()


def test_searches_are_listed_newest_first(url: str) -> None:
    assert searches(url) == []
    with create(url, "one") as one, create(url, "two"):
        with acquire(one):
            one.record_ask(0, [candidate(0), candidate(1)])
            one.set_state("running", why="", spent_s=2.5)
            found = searches(url)
        assert [(row.name, row.state, row.asked, row.spent_s, row.driver) for row in found] == [
            ("two", "created", 0, 0.0, None),
            ("one", "running", 2, 2.5, Holder.this_process()),
        ]
        one.epoch = None
        assert [row.driver for row in searches(url)] == [None, None]


def test_many_queries_of_one_read_see_one_state(url: str) -> None:
    """As ``candidates`` does, which asks for the rows and then for their objectives."""
    with create(url) as store, acquire(store), Store.open(url) as reader:
        store.record_ask(0, [candidate(0)])
        with reader.transaction() as connection:
            count = text("SELECT count(*) FROM event")
            before = connection.execute(count).scalar_one()
            store.record_event(CopyingState(state="ended", why=""))
            assert connection.execute(count).scalar_one() == before
        assert len(reader.events()) == before + 1


def test_a_lease_goes_by_the_servers_clock(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from another host, whose own clock is an hour off."""
    with create(url) as store, acquire(store):
        monkeypatch.setattr(fence, "boot_id", lambda: "another host")
        monkeypatch.setattr("time.time", lambda: 0.0)
        assert current_holder(store) is not None
        for seconds, held in ((5, True), (-5, False)):
            with store.transaction(writes=True) as connection:
                until = text(f"UPDATE lease SET expires_at = extract(epoch FROM now()) + {seconds}")
                connection.execute(until)
            assert (current_holder(store) is not None) is held


def test_a_server_that_is_not_there_is_refused_at_once(postgres: Server, url: str) -> None:
    for wrong in (url.replace("test", "nothing"), postgres.url("search", postgres.folder / "nowhere")):
        for use in (Store.open, create, searches):
            with pytest.raises(InputError, match="cannot be reached"):
                use(wrong)


def test_tables_of_another_program_are_left_alone(url: str) -> None:
    with Store._connect(url).transaction(writes=True) as connection:
        connection.execute(text("CREATE TABLE search (id integer, words text)"))
    for use in (Store.open, create):
        with pytest.raises(InputError, match="tables of another program"):
            use(url)


def test_a_schema_of_ones_own_is_found(url: str) -> None:
    with Store._connect(url).transaction(writes=True) as connection:
        connection.execute(text("CREATE TABLE search (words text)"))
        connection.execute(text("CREATE SCHEMA merging"))
    within = f"{url}&options=-csearch_path%3Dmerging"
    create(within).close()
    with Store.open(within) as store:
        assert store.search().name == "unit"


def test_no_password_reaches_the_database(url: str) -> None:
    with create(url.replace("evomerge@", "evomerge:secret@")) as store, acquire(store):
        store.record_event(CopyingState(state="ended", why=store.place))
        with store.transaction() as connection:
            for table in tables.metadata.sorted_tables:
                rows = [tuple(row) for row in connection.execute(text(f'SELECT * FROM "{table.name}"'))]
                assert "secret" not in json.dumps(rows, default=repr)


def test_a_driver_of_an_older_program_keeps_its_format(url: str) -> None:
    """Two programs of different ages meet at a server; the younger waits with the migration."""
    with create(url, "old") as store, acquire(store):
        with store.transaction(writes=True) as connection:
            for change in FORMAT_1:
                connection.execute(text(change))
        for use in (lambda: Store.open(url), lambda: create(url, "new"), lambda: searches(url)):
            with pytest.raises(InputError, match=r"is of format 1 .* is driven by process"):
                use()
        with store.transaction(writes=True) as connection:
            connection.execute(update(tables.lease).values(host=None))
        at_once(lambda number: Store.open(url, name="old").close(), 4)
        with store.transaction() as connection:
            assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == [
                str(tables.SCHEMA_VERSION)
            ]
        create(url, "new").close()


def test_a_search_that_was_killed_in_its_making_gives_its_name_back(postgres: Server, database: str) -> None:
    database = postgres.url(database)
    given = {"name": "s", "settings": {}, "fingerprints": {}, "environment": {}}
    items = [ItemTexts("v", "search", [("q", "a")])]
    Store.create(database, **given, items=items).close()  # and no driver came
    with pytest.raises(InputError, match="holds a search named"):
        Store.create(database, **given)
    with Store.create(database, **given, items=items, in_place_of_undriven=True) as store:
        assert store.item_texts("v", "search") == [("q", "a")]
        acquire(store).release()
    with pytest.raises(InputError, match="holds a search named"):
        Store.create(database, **given, in_place_of_undriven=True)


@pytest.mark.nightly
def test_twenty_searches_share_a_server_and_wait_for_nothing_of_each_other(
    postgres: Server, url: str, tmp_path: Path
) -> None:
    """Each has its rows, no transaction waits for a lock of another search, and there is room for those who look on."""
    searches, candidates = 20, 30
    setup = replace(make_setup(candidates=candidates), mode="asynchronous")
    clients, waiting, ended = [0], [0], threading.Event()

    def watch() -> None:
        query = (
            "SELECT count(*), count(*) FILTER (WHERE wait_event_type = 'Lock' AND wait_event NOT IN ('extend'))"
            " FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with psycopg.connect(url, autocommit=True) as connection:
            while not ended.wait(0.02):
                row = connection.execute(query).fetchone()
                assert row is not None
                clients[0], waiting[0] = max(clients[0], row[0]), waiting[0] + row[1]

    def search(number: int) -> None:
        with create(url, f"search{number}") as store, acquire(store):
            waiting[0] = 0  # they all begin in one empty database, of which one makes the tables
            clock = SimulatedClock()
            pool = SimulatedPool(4, simulate, clock)
            logs = tmp_path / str(number)
            Driver(Drive(setup, store, pool, Control(store.take_commands), logs=logs, clock=clock)).run()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        at_once(search, searches)
    finally:
        ended.set()
        watcher.join()
    assert waiting[0] == 0
    assert clients[0] <= 3 * searches  # a hundred are what a server lets in unless it is told otherwise
    for number in range(searches):
        with Store.open(url, name=f"search{number}") as store:
            counts = store.counts()
            assert (sum(counts.values()), counts["running"], counts["asked"]) == (candidates, 0, 0)
            assert store.search().why == f"{candidates} candidates asked"
            told = [number for step in store.steps() if step.kind == "tell" for number in step.candidates]
            assert sorted(told) == list(range(candidates))
            kinds = Counter(event.kind for event in store.events())
            assert (kinds["dispatch"], kinds["tell"], kinds["stale"]) == (candidates - counts["cached"], len(told), 0)
