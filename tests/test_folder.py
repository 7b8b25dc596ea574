"""A search folder finds its store: in itself, or in the database that its search file or the environment names."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from helpers_postgres import Server, database, postgres

from evomerge.errors import InputError
from evomerge.search.settings.folder import (
    FILE_NAME,
    STORE_NAME,
    STORE_VARIABLE,
    check_store_url,
    new_folder,
    open_store,
    store_place,
)
from evomerge.store import Store, acquire
from evomerge.testing.store_fixtures import create

__all__ = ["database", "postgres"]  # fixtures


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORE_VARIABLE, raising=False)


def write(folder: Path, **keys: str) -> None:
    (folder / FILE_NAME).write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))


def test_the_file_in_the_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(tmp_path / STORE_NAME).close()
    monkeypatch.setenv(STORE_VARIABLE, "postgresql://nobody@nowhere/nothing")
    with open_store(tmp_path) as store:
        assert store.place == str(tmp_path / STORE_NAME)


def test_a_store_elsewhere_is_found_by_url_and_name(tmp_path: Path, postgres: Server, database: str) -> None:
    url = postgres.url(database)
    for name in ("one", "two"):
        create(url, name).close()
    write(tmp_path, name="two", store=url)
    with open_store(tmp_path) as store:
        assert store.search().name == "two"
    write(tmp_path, name="three", store=url)
    with pytest.raises(InputError, match="no search named 'three'"):
        open_store(tmp_path)


def test_the_environment_names_a_store_too(
    tmp_path: Path, postgres: Server, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(postgres.url(database)).close()
    monkeypatch.setenv(STORE_VARIABLE, postgres.url(database))
    write(tmp_path, name="unit")
    with open_store(tmp_path) as store:
        assert store.search().name == "unit"


@pytest.mark.parametrize("content", [None, "- a list\n", "sources: {}\n", "name: unit\n"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(InputError, match="is not the folder of a search"):
        open_store(tmp_path)


def test_the_password_comes_from_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, secret = "postgresql://me@host:5433/merging", "postgresql://me:secret@host:5433/merging"
    assert store_place(tmp_path, named) == named
    assert store_place(tmp_path, None) == tmp_path / STORE_NAME
    monkeypatch.setenv(STORE_VARIABLE, secret)
    assert store_place(tmp_path, named) == secret
    assert store_place(tmp_path, None) == secret
    for other in (
        "postgresql://me@host:5433/other",
        "postgresql://you@host:5433/merging",
        "postgresql://me@host/merging",
    ):
        assert store_place(tmp_path, other) == other  # a search stays where its file says that it is


@pytest.mark.parametrize(
    "url",
    ["postgresql://me:secret@host/merging", "postgresql://me:@host/x?password=secret", "postgresql:me:secret@host"],
)
def test_a_search_file_holds_no_password(url: str) -> None:
    with pytest.raises(InputError) as refusal:
        check_store_url(url, "search.yaml: store")
    assert "secret" not in str(refusal.value)
    check_store_url("postgresql://me@host:5433/merging?sslmode=require", "search.yaml: store")


def test_of_several_processes_that_make_one_folder_one_does(tmp_path: Path) -> None:
    with new_folder(tmp_path / "s") as partial:
        (partial / "file").write_text("whole")
        with pytest.raises(InputError, match="is being made by another process"), new_folder(tmp_path / "s"):
            raise AssertionError("two make it")
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    with pytest.raises(InputError, match="already exists"), new_folder(tmp_path / "s"):
        pass
    assert (tmp_path / "s" / "file").read_text() == "whole"


def test_what_a_killed_process_left_of_a_folder_is_not_in_the_next(tmp_path: Path) -> None:
    (tmp_path / ".s.partial").mkdir()
    (tmp_path / ".s.partial" / "search.db").write_text("half")
    with new_folder(tmp_path / "s") as partial:
        (partial / "file").write_text("whole")
    assert [file.name for file in (tmp_path / "s").iterdir()] == ["file"]


def test_what_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "s"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("is_open", [False, True], ids=["at rest", "while it is driven"])
def test_a_search_that_one_may_only_read_can_be_looked_at(is_open: bool) -> None:
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "s"
        folder.mkdir()
        store = create(folder / "search.db", name="s")
        if is_open:
            with store.transaction() as connection:
                connection.exec_driver_sql("select 1")
        else:
            store.close()
        for path in (Path(above), folder, *folder.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        child = os.fork()
        if not child:
            try:
                os.setuid(65534)
                with Store.open(folder / "search.db") as seen:
                    state = seen.search().state
                    try:
                        acquire(seen)
                    except InputError as error:
                        state += str(error)
                os._exit(0 if state.startswith("created") and "may not be written" in state else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        store.close()
