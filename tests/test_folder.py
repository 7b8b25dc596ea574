"""A search folder finds its store: in itself, or in the database that its search file or the environment names."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_postgres import Server, database, postgres

from evomerge.errors import InputError
from evomerge.search.folder import FILE_NAME, STORE_NAME, STORE_VARIABLE, check_store_url, open_store, store_place
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
