"""Searches over routed experts that were stopped or killed go on as if nothing had happened, in every pool."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_miniature import COMMAND, ROOT, environment, evomerge, search_file
from helpers_search import table

from evomerge.search.settings.folder import open_store
from evomerge.store import Store

ZOO = ROOT / "examples" / "zoo"
EXPERTS = ("steps_en", "extraction")
pytestmark = pytest.mark.filterwarnings("ignore")


def written(folder: Path, candidates: int, **changes: Any) -> Path:
    items = {"task": "zoo_extract", "metric": "acc", "search": "validation[:3]", "held_out": "test[:1]"}
    settings: dict[str, Any] = {
        "sources": {"base": str(ZOO / "base")} | {name: f"{ZOO / 'base'}+{ZOO / name}" for name in EXPERTS},
        "space": {"kind": "routed", "granularity": "model"},
        "fit": {"file": str(ZOO / "fit.jsonl"), "items": 6, "drawn": 2, "steps": 2},
        "objectives": {"extract": items},
        "optimizer": {"name": "nsga2", "population": 2},
        "budget": {"candidates": candidates},
        "confirm": {"top": 1},
        "dtype": "float32",
    }
    folder.mkdir(exist_ok=True)
    return search_file(folder, **settings | changes)


def asked(folder: Path) -> int:
    if not (folder / "search.db").exists():
        return 0
    with Store.open(folder / "search.db") as store:
        return len(store.candidates())


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_more_budget_goes_on_with_the_candidates_of_one_long_search(tmp_path: Path) -> None:
    """After 13 baselines and one generation. Routers are fitted to the same bits where the evidence of them is lost."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert evomerge("search", written(tmp_path / "a", 17), "--dir", whole) == 0
    assert evomerge("search", written(tmp_path / "b", 15), "--dir", cut) == 0
    for file in (cut / "evidence").rglob("*"):
        if file.is_file():
            file.unlink()
    assert evomerge("resume", cut, "--set", "budget.candidates=17") == 0
    assert scores(cut) == scores(whole)  # of what is searched: the shorter one has confirmed others
    with open_store(cut) as store:
        assert len(store.candidates()) == 17
        assert store.counts()["failed"] == 0


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_kill_9_and_resume_gives_the_same_search_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also while the best two are fitted anew and scored, which are the last candidates."""
    space = {"kind": "routed", "granularity": "model", "refits": 2}
    file = written(tmp_path / "a", 21, space=space)
    assert evomerge("search", file, "--dir", tmp_path / "whole") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "anew for the best 2 at the end" in said
    folder, rng = tmp_path / "killed", random.Random(0)
    arguments = ["search", str(file), "--dir", str(folder)]
    for kill_at in (2, 15, 21):
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, env=environment())
        while process.poll() is None and asked(folder) < kill_at:
            time.sleep(0.02)
        time.sleep(rng.random())
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        arguments = ["resume", str(folder)]
    assert evomerge("resume", folder) == 0
    assert table(folder) == table(tmp_path / "whole")


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_workers_of_ray_score_the_same(tmp_path: Path) -> None:
    assert evomerge("search", written(tmp_path / "a", 17), "--dir", tmp_path / "here") == 0
    there = written(tmp_path / "b", 17, pool="ray", cluster={"workers": 2})
    assert evomerge("search", there, "--dir", tmp_path / "ray") == 0
    assert scores(tmp_path / "ray") == scores(tmp_path / "here")


def scores(folder: Path) -> list[tuple[object, ...]]:
    with open_store(folder) as store:
        return [(row.number, row.recipe_hash, row.status, row.objectives) for row in store.candidates()]


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("pool", ["in_process", "ray"])
def test_the_example_runs_through_export(tmp_path: Path, pool: str) -> None:
    counts = (("items", "10"), ("held_out", "test[:10]"))
    few = [f"objectives.zoo_{task}.{key}={n}" for task in ("math_ja", "translate", "extract") for key, n in counts]
    example = ROOT / "examples" / "experts.yaml"
    arguments = [
        "--set",
        "budget.candidates=20",
        "--set",
        "fit.steps=10",
        "--set",
        "optimizer.population=4",
        "--set",
        f"pool={pool}",
    ]
    arguments += [part for setting in few for part in ("--set", setting)]
    assert evomerge("search", example, "--dir", tmp_path / "out", *arguments) == 0
    assert evomerge("export", tmp_path / "out", tmp_path / "plain") == 0
    assert (tmp_path / "plain" / "config.json").exists()
