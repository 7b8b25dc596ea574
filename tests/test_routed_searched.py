"""A search over routed experts as a person runs it: scored, shown, and exported in each form."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers_miniature import ROOT, evomerge, search_file

from evomerge.report.experts import uses_of
from evomerge.search.settings.folder import open_store
from evomerge.store import CandidateRow

ZOO = ROOT / "examples" / "zoo"
EXPERTS = ("steps_en", "extraction")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    texts = folder / "texts.txt"
    texts.write_text("Ann has 12 nuts and finds 5 more nuts.\nBen has 40 pens and loses 17 pens.\n")
    items = {"task": "zoo_extract", "metric": "acc", "search": "validation[:8]", "held_out": "test[:8]"}
    path = search_file(
        folder,
        sources={"base": str(ZOO / "base")} | {name: f"{ZOO / 'base'}+{ZOO / name}" for name in EXPERTS},
        space={"kind": "routed", "router": "arrow", "granularity": "model"},
        objectives={"extract": items},
        optimizer={"name": "random"},
        budget={"candidates": 14},
        confirm={"top": 1},
        dtype="float32",
        calibration={"file": str(texts), "prompts": 2},
    )
    assert evomerge("search", path, "--dir", folder / "out") == 0
    return folder / "out"


def rows(search: Path) -> list[CandidateRow]:
    with open_store(search) as store:
        assert store.counts()["failed"] == 0
        return [row for row in store.candidates() if row.status == "done"]


def arrow_of(search: Path) -> CandidateRow:
    """Arrow as peft has it."""
    return next(row for row in rows(search) if "arrow" in row.label.lower())


def test_the_use_of_experts_is_kept(search: Path) -> None:
    with open_store(search) as store:
        for row in rows(search):
            uses = uses_of(store, row)
            assert bool(uses) == ('"kind":"routed"' in row.recipe)
            for use in uses.values():
                assert use.tokens > 100
                assert use.experts[:2] == EXPERTS
                assert all(sum(shares) == pytest.approx(1.0, abs=1e-3) for shares in use.shares if shares)


def test_the_plain_export_shows_scores_of_its_own(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = arrow_of(search)
    assert evomerge("export", search, tmp_path / "plain", "--candidate", row.id) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "another model" in said
    assert "recorded of the candidate" in said
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "another model" in card
    assert "model-index" not in card
    assert "8 held_out items" in card


def test_with_its_own_code_it_scores_as_recorded(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = arrow_of(search)
    assert evomerge("export", search, tmp_path / "exact", "--candidate", row.id, "--as", "routed") == 0
    assert "8 held_out items score exactly as recorded" in " ".join(capsys.readouterr().out.split())
    assert evomerge("export", search, tmp_path / "arrow", "--candidate", row.id, "--as", "peft") == 0


def test_a_form_that_there_is_not_is_refused(search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evomerge("export", search, tmp_path / "x", "--candidate", arrow_of(search).id, "--as", "gguf") != 0
    assert "routed, peft" in capsys.readouterr().err
    assert evomerge("export", search, tmp_path / "x", "--candidate", "base", "--as", "routed") != 0
    assert "no form" in capsys.readouterr().err


def test_adapters_that_cannot_be_routed_together_are_refused_before_anything_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ZOO / "base", tmp_path / "another")
    first = f"{ZOO / 'base'}+{ZOO / 'steps_en'}"
    for second, said in (
        (f"{tmp_path / 'another'}+{ZOO / 'extraction'}", "sources.b: is another model than base"),
        (f"{ZOO / 'base'}+{ZOO / 'english_ia3'}", "in several ways: matrices, or vectors"),
        (f"{ZOO / 'base'}+{ZOO / 'soft_steps'}", "sources.b: is a soft prompt"),
        (str(ZOO / "steps_en_full"), "sources.b:"),
    ):
        path = search_file(
            tmp_path,
            sources={"base": str(ZOO / "base"), "a": first, "b": second},
            space={"kind": "routed"},
            fit={"file": str(ZOO / "fit.jsonl"), "items": 4, "steps": 2},
            objectives={"extract": {"task": "zoo_extract", "metric": "acc", "search": "validation[:8]"}},
        )
        assert evomerge("validate", path) != 0
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.nightly
def test_fitted_routers_are_found_before_the_search_and_again_for_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MoLA's form; its evidence is lost before the export, so that routers are fitted anew, to the same bits."""
    fit = ROOT / "evaluators" / "tasks" / "data" / "zoo_extract.fit.jsonl"
    items = {"task": "zoo_extract", "metric": "acc", "search": "validation[:8]", "held_out": "test[:8]"}
    path = search_file(
        tmp_path,
        sources={"base": str(ZOO / "base")} | {name: f"{ZOO / 'base'}+{ZOO / name}" for name in (*EXPERTS, "kanji")},
        space={"kind": "routed", "like": "mola"},
        objectives={"extract": items},
        optimizer={"name": "random"},
        budget={"candidates": 16},
        confirm={"top": 1},
        dtype="float32",
        fit={"file": str(fit), "items": 32, "steps": 4, "drawn": 8},
    )
    search = tmp_path / "out"
    assert evomerge("search", path, "--dir", search) == 0
    with open_store(search) as store:
        assert store.counts()["failed"] == 0
        rows = [row for row in store.candidates() if row.status == "done"]
        row = next(row for row in rows if '"kind":"fitted"' in row.recipe and row.origin != "random")
    for file in (search / "evidence").iterdir():
        file.unlink()
    capsys.readouterr()
    assert evomerge("export", search, tmp_path / "exact", "--candidate", row.id, "--as", "routed") == 0
    assert "score exactly as recorded" in " ".join(capsys.readouterr().out.split())
    assert evomerge("export", search, tmp_path / "plain", "--candidate", row.id) == 0
