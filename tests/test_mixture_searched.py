"""A search over mixtures as a person runs it: fitted, scored, resumed, and exported to plain transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from helpers_miniature import ROOT, evomerge, search_file
from transformers import AutoModelForCausalLM

from evomerge.search.settings.folder import open_store

ZOO = ROOT / "examples" / "zoo"
SLOTS = ("steps_ja", "extraction")
DONE = 12

pytestmark = pytest.mark.filterwarnings("ignore")


def settings(folder: Path, **changes: Any) -> Path:
    items = {"task": "zoo_extract", "metric": "acc", "search": "validation[:6]", "held_out": "test[:6]"}
    given: dict[str, Any] = {
        "sources": {"base": str(ZOO / "base")} | {name: f"{ZOO / 'base'}+{ZOO / name}" for name in SLOTS},
        "base": "base",
        "space": {"kind": "mixture", "architecture": "mixtral"},
        "fit": {"file": str(ZOO / "fit.jsonl"), "items": 12, "drawn": 4, "steps": 3},
        "objectives": {"extract": items},
        "optimizer": {"name": "cma", "population": 3},
        "budget": {"candidates": DONE},
        "confirm": {"top": 1},
        "dtype": "float32",
    }
    folder.mkdir(exist_ok=True)
    return search_file(folder, **given | changes)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    assert evomerge("search", settings(folder), "--dir", folder / "out") == 0
    return folder / "out"


def scored(search: Path) -> Mapping[str, tuple[str, str, object]]:
    """By candidate its status, its recipe and its scores of items on the search split."""
    with open_store(search) as store:
        assert store.counts()["failed"] == 0
        rows = [row for row in store.candidates() if row.status == "done"]
        return {row.id: (row.status, row.recipe, str(store.scores(row.number, "search"))) for row in rows}


def test_mixtures_are_candidates_beside_dense_baselines(search: Path) -> None:
    kinds = [json.loads(recipe).get("kind", "stack") for _, recipe, _ in scored(search).values()]
    assert kinds[:4] == ["stack"] * 4
    assert set(kinds[4:]) == {"mixture"}
    assert len(kinds) == DONE


def test_the_export_is_a_plain_mixtral_that_scores_as_recorded(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = next(name for name, (_, recipe, _) in scored(search).items() if '"kind":"mixture"' in recipe)
    assert evomerge("export", search, tmp_path / "out", "--candidate", candidate) == 0
    assert "6 held_out items score exactly as recorded" in " ".join(capsys.readouterr().out.split())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert evomerge("validate", search.parent / "search.yaml") == 0
    said = re.search(r"([\d.]+) MB for each export", capsys.readouterr().out)
    assert said is not None
    assert float(said[1]) == pytest.approx((tmp_path / "out" / "model.safetensors").stat().st_size / 1e6, rel=0.02)


@pytest.mark.nightly
def test_a_search_that_was_ended_and_has_lost_its_evidence_goes_on_as_if_nothing_had_happened(
    search: Path, tmp_path: Path
) -> None:
    path = settings(tmp_path / "other", budget={"candidates": 9})
    assert evomerge("search", path, "--dir", tmp_path / "out") == 0
    shutil.rmtree(tmp_path / "out" / "evidence")
    assert evomerge("resume", tmp_path / "out", "--set", f"budget.candidates={DONE}") == 0
    assert scored(tmp_path / "out") == scored(search)


@pytest.mark.nightly
def test_both_pools_score_alike(search: Path, tmp_path: Path) -> None:
    path = settings(tmp_path / "ray", pool="ray", cluster={"workers": 2})
    assert evomerge("search", path, "--dir", tmp_path / "out") == 0
    assert scored(tmp_path / "out") == scored(search)


def test_what_is_not_there_is_said_before_anything_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Ann has 12 nuts and finds 5 more nuts.\n")
    prototypes = {"kind": "mixture", "architecture": "mixtral", "router": "prototypes"}
    for changes, said in (
        ({"space": prototypes, "calibration": {"file": str(texts), "prompts": 1}}, "no texts of steps_ja's own"),
        ({"space": {"kind": "mixture", "architecture": "qwen3_moe"}}, "a qwen3_moe cannot be made of models"),
        ({"space": {"kind": "mixture", "architecture": "mixtral", "top_k": 3}}, "is 3, but there are 2 slots"),
        ({"fit": None}, "there is nothing to fit it to"),
    ):
        assert evomerge("validate", settings(tmp_path, **changes)) != 0
        assert said in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1_000_000, available=900_000))
    assert evomerge("validate", settings(tmp_path)) != 0
    assert "this machine has 0.0 GB of memory" in " ".join(capsys.readouterr().err.split())
