"""Stores of older programs, as those left them, are opened with every row as it was."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from evomerge.errors import InputError
from evomerge.store import schema, tables
from evomerge.store.fence import Holder
from evomerge.store.lease import acquire
from evomerge.store.store import Store
from evomerge.testing.store_fixtures import candidate, create, finish

# Written by Evomerge when its stores had format 1, and dumped: done, failed, running, cached and waiting candidates.
GOLDEN = Path(__file__).parent / "golden" / "store" / "format-1.sql"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    place = tmp_path / "search.db"
    with closing(sqlite3.connect(place)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(GOLDEN.read_text(encoding="utf-8"))
    return place


def rows(place: Path) -> dict[str, list[dict[str, object]]]:
    """Every row of every table, as the file has them."""
    with closing(sqlite3.connect(place)) as connection:
        connection.row_factory = sqlite3.Row
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: [dict(row) for row in connection.execute(f"SELECT * FROM {name}")] for name in names}


def test_an_old_store_is_opened_with_every_row_as_it_was(old: Path) -> None:
    before = rows(old)
    assert [row["status"] for row in before["candidate"]] == ["done", "failed", "running", "cached", "asked", "done"]
    with Store.open(old) as store:
        assert [row.number for row in store.candidates() if row.eligible] == [0, 3, 5]
        assert [row.number for row in store.best("acc", maximise=True, k=9)] == [5, 0]
        assert [row.number for row in store.front()] == [5]
        assert store.search().schema_version == tables.SCHEMA_VERSION
    after = rows(old)
    assert after.pop("alembic_version") == [{"version_num": str(tables.SCHEMA_VERSION)}]
    assert after.pop("answer") == after.pop("item") == after.pop("thumbnail") == after.pop("drawing") == []
    for row in after["search"]:
        row["schema_version"] = 1
    new = {"candidate": {"eligible", "niche", "elite", "change"}, "lease": {"writes", "boot", "expires_since_boot"},
           "search": {"worker_s", "gpu_s", "held_s"}}  # fmt: skip
    for name, columns in new.items():
        after[name] = [{key: value for key, value in row.items() if key not in columns} for row in after[name]]
    assert after == before


def test_an_old_store_goes_on_like_any_other(old: Path) -> None:
    with Store.open(old) as store, acquire(store):
        store.record_ask(1, [candidate(6)])
        finish(store, 6, mean=0.9)
        store.record_tell(1, {6: [-0.9]}, front=(5, 6), spent_s=20.0)
    with Store.open(old) as store:
        assert [row.number for row in store.best("acc", maximise=True, k=2)] == [6, 5]
        assert [step.kind for step in store.steps()] == ["ask", "tell", "ask", "tell"]


def test_the_old_file_is_kept_beside_the_new(old: Path) -> None:
    before = rows(old)
    Store.open(old).close()
    Store.open(old).close()
    assert rows(old.with_name("search.db.format-1")) == before
    assert sorted(path.name for path in old.parent.iterdir() if not path.name.endswith(("-wal", "-shm"))) == [
        "search.db",
        "search.db.format-1",
    ]


def test_a_migrated_store_has_the_tables_of_a_new_one(old: Path, tmp_path: Path) -> None:
    create(tmp_path / "new.db").close()
    for place in (old, tmp_path / "new.db"):
        with Store.open(place) as store, store.transaction() as connection:
            assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []


def test_there_is_a_migration_to_every_format() -> None:
    config = Config()
    config.set_main_option("script_location", str(schema._MIGRATIONS))
    found = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert found == [str(number) for number in range(tables.SCHEMA_VERSION, 0, -1)]


def test_a_migration_that_fails_changes_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows(old)
    upgrade = schema._upgrade

    def fail(*given: object) -> None:
        upgrade(*given)  # type: ignore[arg-type]
        raise OSError("the machine went down")

    monkeypatch.setattr(schema, "_upgrade", fail)
    with pytest.raises(OSError, match="went down"):
        Store.open(old)
    assert rows(old) == before
    monkeypatch.setattr(schema, "_upgrade", upgrade)
    Store.open(old).close()


def test_a_copy_that_cannot_be_made_leaves_the_store_as_it_was(old: Path) -> None:
    before = rows(old)
    old.with_name("search.db.format-1").mkdir()
    with pytest.raises(InputError, match=r"cannot be copied to search\.db\.format-1"):
        Store.open(old)
    assert rows(old) == before


def test_a_store_that_an_older_program_drives_is_left_to_it(old: Path) -> None:
    me = Holder.this_process()
    with closing(sqlite3.connect(old)) as connection:
        mine = (me.host, me.namespace, me.pid, me.started)
        connection.execute("UPDATE lease SET host=?, namespace=?, pid=?, started=?, expires_at=1e12", mine)
        connection.commit()
    before = rows(old)
    with pytest.raises(InputError, match=f"driven by process {me.pid}"):
        Store.open(old)
    assert rows(old) == before
    assert not old.with_name("search.db.format-1").exists()


def test_a_new_search_does_not_migrate_what_it_may_not_have(old: Path) -> None:
    before = rows(old)
    with pytest.raises(InputError, match="holds a search already"):
        create(old)
    assert rows(old) == before
