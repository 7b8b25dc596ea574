"""The store in SQLite keeps the contract, and its values survive JSON, null and numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from evomerge.errors import InputError
from evomerge.store import tables
from evomerge.store.columns import Json, PackedText
from evomerge.store.reading import SYNC_EVERY_S
from evomerge.store.store import Store
from evomerge.testing.store_fixtures import create
from evomerge.testing.stores import StoreContract

DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]


class TestSqlite(StoreContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        return tmp_path / "store.db"


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
documents = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@given(documents)
def test_json_round_trips_every_float(document: object) -> None:
    text = Json().process_bind_param(document, DIALECT)
    assert text is None or json.loads(text, parse_constant=pytest.fail) is not Ellipsis  # strict JSON: no NaN, Infinity
    # repr tells nan, -0.0 and every float apart, and calls nan equal to nan
    assert repr(Json().process_result_value(text, DIALECT)) == repr(document)


def test_json_takes_numpy_scalars() -> None:
    given = {"a": np.float32(0.1), "b": np.int64(3), "c": np.float64(math.inf), "d": np.float32(math.inf)}
    text = Json().process_bind_param(given, DIALECT)
    found = Json().process_result_value(text, DIALECT)
    assert found == {"a": float(np.float32(0.1)), "b": 3, "c": math.inf, "d": math.inf}


def test_json_refuses_what_it_cannot_bring_back() -> None:
    with pytest.raises(TypeError, match="object"):
        Json().process_bind_param({"model": object()}, DIALECT)


def test_packed_text_is_small() -> None:
    text = json.dumps([{"weight": index / 7, "density": 0.5, "method": "dare_ties"} for index in range(400)])
    packed = PackedText().process_bind_param(text, DIALECT)
    assert packed is not None
    assert len(packed) < len(text) / 3
    assert PackedText().process_result_value(packed, DIALECT) == text


def test_every_table_can_be_made_elsewhere() -> None:
    for table in tables.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=DIALECT))


def test_one_file_holds_one_search(tmp_path: Path) -> None:
    create(tmp_path / "store.db").close()
    with pytest.raises(InputError, match="holds a search already"):
        Store.create(tmp_path / "store.db", name="other", settings={}, fingerprints={}, environment={})


def test_a_missing_store_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no search"):
        Store.open(tmp_path / "store.db")
    assert not (tmp_path / "store.db").exists()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened") as refusal:
        create(tmp_path / "nowhere" / "store.db")
    assert refusal.value.place == str(tmp_path / "nowhere" / "store.db")


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("nonsense://host/x", "needs a database driver"),
        ("://", "is not a database URL"),
    ],
)
def test_a_url_that_cannot_work_is_refused(place: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Store.open(place)


def test_a_sqlite_url_is_the_same_as_its_path(tmp_path: Path) -> None:
    create(f"sqlite:///{tmp_path}/store.db").close()
    with Store.open(tmp_path / "store.db") as store:
        assert store.place == str(tmp_path / "store.db")


def test_a_password_is_never_shown() -> None:
    assert "secret" not in Store._connect("postgresql+psycopg://user:secret@host/database").place
    for wrong in ("postgresql://host/database?password=secret", "postgresql://user:secret@host:port/database"):
        with pytest.raises(InputError) as refusal:
            Store.open(wrong)
        assert "secret" not in str(refusal.value)


def test_a_write_waits_for_the_disk_once_a_second(tmp_path: Path) -> None:
    def synchronous() -> int:
        with store.transaction(writes=True) as connection:
            return int(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())

    with create(tmp_path / "store.db") as store:
        store._synced_at = -math.inf
        full, normal = 2, 1
        assert [synchronous(), synchronous()] == [full, normal]
        store._synced_at -= SYNC_EVERY_S
        assert [synchronous(), synchronous()] == [full, normal]
