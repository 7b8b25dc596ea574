"""The same search file on SQLite and on PostgreSQL: the same genomes and scores, and no password in the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_miniature import evomerge, json_of, short_search_file
from helpers_postgres import Server, database, postgres

from evomerge.search.settings.folder import open_store
from evomerge.store import Store

__all__ = ["database", "postgres"]  # fixtures


def everything(store: Store) -> list[tuple[object, ...]]:
    found = []
    for row in store.candidates():
        scores = [(s.split, s.items.tobytes(), s.metrics["acc"].tobytes()) for s in store.scores(row.number, "search")]
        genome = None if row.genome is None else row.genome.tobytes()
        found.append((row.number, row.recipe_hash, genome, row.status, row.losses, row.on_front, scores))
    return found


@pytest.mark.nightly  # test_store_postgres holds both databases to one contract
def test_a_search_is_the_same_in_either_database_and_goes_on_there(
    tmp_path: Path, postgres: Server, database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = short_search_file(tmp_path, budget={"candidates": 13})
    assert evomerge("search", file, "--dir", tmp_path / "lite") == 0
    url = postgres.url(database).replace("evomerge@", "evomerge:secret@")
    monkeypatch.setenv("EVOMERGE_STORE", url)
    there = tmp_path / "postgres"
    assert evomerge("search", file, "--dir", there, "--set", "budget.candidates=9") == 0
    assert not (there / "search.db").exists()
    assert evomerge("resume", there, "--set", "budget.candidates=13") == 0
    assert json_of(capsys, "status", there, "--json")["winner"] is not None
    for written in there.iterdir():
        assert not written.is_file() or b"secret" not in written.read_bytes()
    with open_store(there) as one:
        found = everything(one)
    monkeypatch.delenv("EVOMERGE_STORE")
    with open_store(tmp_path / "lite") as other:
        assert found == everything(other)
