"""Searches over paths on the miniatures, from the search file alone: every space, killed, resumed, on Ray, exported."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from helpers_checkpoints import save_model, tiny_config
from helpers_miniature import COMMAND, MINIATURES, environment, evomerge, json_of, search_file
from helpers_search import table
from helpers_tiers import nightly_but
from test_architectures import GROUPED
from transformers import DiffLlamaConfig

from evomerge.store import Store

ITEMS = {"task": "mini_math_ja", "metric": "acc_ja", "search": "validation[:4]", "held_out": "test[:4]"}
PAIR = {name: str(MINIATURES / name) for name in ("maths", "japanese")}
CATCMA = {"name": "catcma", "population": 4}
CMA = {"name": "cma", "x0": "default", "population": 4}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "indicators": ({"kind": "data_flow_space", "repeats": 2}, CMA),
    "transitions": ({"kind": "data_flow_space", "repeats": 1, "scale": "transition", "scaling": "update"}, CMA),
    "bits": ({"kind": "data_flow_space", "bits": True, "scale": "none"}, {"name": "nsga2", "population": 4}),
    "integers": ({"kind": "data_flow_space", "encoding": "integers", "max_hops": 8}, CATCMA),
    "blocks": ({"kind": "data_flow_space", "encoding": "blocks"}, CATCMA),
    "pruning": ({"kind": "data_flow_space", "encoding": "pruning", "bits": True}, CATCMA),
    "joint": ({"kind": "hybrid_space", "method": "linear", "max_hops": 8}, CATCMA),
}


def path_file(folder: Path, space: dict[str, Any], optimizer: dict[str, Any], **changes: Any) -> Path:
    file: dict[str, Any] = {
        "sources": PAIR, "base": None, "tokenizer": "maths", "dtype": "float32", "space": space, "optimizer": optimizer,
        "objectives": {"mini_math_ja": ITEMS}, "budget": {"candidates": 12}, "confirm": {"top": 1},
    }  # fmt: skip
    return search_file(folder, **{**file, **changes})


def last_scored(folder: Path) -> str:
    with Store.open(folder / "search.db") as store:
        assert store.counts()["failed"] == 0
        return f"c{max(row.number for row in store.candidates() if row.status == 'done'):04d}"


@pytest.mark.parametrize("case", nightly_but(("joint",), CASES))
def test_a_space_is_searched_and_exported(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evomerge("search", path_file(tmp_path, *CASES[case]), "--dir", tmp_path / "search") == 0
    number = last_scored(tmp_path / "search")
    capsys.readouterr()
    # Verifying: the folder is loaded with plain transformers and must score item by item as the live model did.
    assert evomerge("export", tmp_path / "search", tmp_path / "out", "--candidate", number) == 0
    assert evomerge("show", tmp_path / "search", number, "--picture", tmp_path / "path.svg") == 0
    hops = json_of(capsys, "show", tmp_path / "search", number, "--json")["recipe"]["hops"]
    config = (tmp_path / "out" / "config.json").read_text()
    assert f'"num_hidden_layers": {len(hops)},' in config
    drawn = [
        (tmp_path / "out" / "path.svg").exists(),
        "![The path](path.svg)" in (tmp_path / "out" / "README.md").read_text(),
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] or [hop["layer"] for hop in hops] == list(range(6))
    assert ET.parse(tmp_path / "path.svg").getroot().tag.endswith("svg")
    assert evomerge("show", tmp_path / "search", number) == 0
    assert "hops" in capsys.readouterr().out


@pytest.mark.nightly
def test_paths_of_16_bits_export_with_their_scales_folded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = {**ITEMS, "search": "validation[:24]", "held_out": "test[:24]"}
    file = path_file(tmp_path, *CASES["blocks"], dtype="bfloat16", objectives={"mini_math_ja": items})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    number = last_scored(tmp_path / "search")
    assert evomerge("export", tmp_path / "search", tmp_path / "out", "--candidate", number) == 0
    assert "verified: mini_math_ja" in capsys.readouterr().out


@pytest.mark.nightly
def test_a_winner_joins_the_pool_and_is_never_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A search over weights, then one over paths through its winner and the sources."""
    items = {**ITEMS, "search": "validation[:40]", "held_out": "test[:60]"}
    common: dict[str, Any] = {"base": None, "tokenizer": None, "objectives": {"mini_math_ja": items}}
    first = path_file(tmp_path, {"method": "linear", "bounds": {"weight": [0, 1]}}, CMA, **common)
    assert evomerge("search", first, "--dir", tmp_path / "weights") == 0
    capsys.readouterr()
    assert evomerge("show", tmp_path / "weights", "best", "--recipe") == 0
    (tmp_path / "winner.yaml").write_text(capsys.readouterr().out)

    space = {"kind": "hybrid_space", "winner": "winner.yaml", "encoding": "blocks"}
    second = path_file(tmp_path, space, CATCMA, **common)
    assert evomerge("search", second, "--dir", tmp_path / "paths") == 0
    before = json_of(capsys, "status", tmp_path / "weights", "--json")
    after = json_of(capsys, "status", tmp_path / "paths", "--json")
    held_out = {entry["id"]: entry for entry in [*after["confirmed"], *after["confirmed_baselines"]]}
    labels = {entry["label"]: entry["objectives"] for entry in held_out.values()}
    weights = {entry["id"]: entry for entry in [*before["confirmed"], *before["confirmed_baselines"]]}
    best = weights[before["winner"]]["objectives"]["mini_math_ja"]["mean"]
    assert labels["merged"]["mini_math_ja"]["mean"] == best
    assert held_out[after["winner"]]["objectives"]["mini_math_ja"]["mean"] >= best
    assert evomerge("export", tmp_path / "paths", tmp_path / "out") == 0


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_killed_and_resumed_it_is_the_same_search(tmp_path: Path) -> None:
    file = path_file(tmp_path, *CASES["blocks"], budget={"candidates": 24})
    assert evomerge("search", file, "--dir", tmp_path / "whole") == 0
    folder = tmp_path / "killed"
    arguments = ["search", str(file), "--dir", str(folder)]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, env=environment())
    while process.poll() is None and scored(folder) < 9:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 9 <= scored(folder) < 24
    assert evomerge("resume", folder) == 0
    assert table(folder) == table(tmp_path / "whole")  # down to the score of every item


def scored(folder: Path) -> int:
    if not (folder / "search.db").exists():
        return 0
    with Store.open(folder / "search.db") as store:
        return store.counts()["done"]


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_ray_gives_what_this_process_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for pool in ("in_process", "ray"):
        file = path_file(tmp_path, *CASES["integers"], pool=pool, cluster={"workers": 2})
        assert evomerge("search", file, "--dir", tmp_path / pool) == 0
        rows = json_of(capsys, "top", tmp_path / pool, "--all", "--json")
        found.append([(row["genome"], row["recipe_hash"], row["scores"]) for row in rows])
    assert found[0] == found[1]


def test_impossible_paths_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tiny_config(), tmp_path / "narrow")
    fixed = {name: str(save_model(DiffLlamaConfig(**GROUPED), tmp_path / name)) for name in "ab"}
    flow: dict[str, Any] = {"kind": "data_flow_space"}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({**flow, "max_hops": 4}, {}, "space.max_hops: is 4, but maths alone is 6 hops"),
        ({**flow, "max_hops": 2}, {}, "the ends of maths alone are 2 hops"),
        ({**flow, "first": "japanese"}, {}, "Write `tokenizer: japanese`"),
        ({**flow, "scale_bounds": [-1, 2]}, {}, "space.scale_bounds: begin at -1; a stream can only be scaled by"),
        (flow, {"sources": {**PAIR, "narrow": str(tmp_path / "narrow")}}, "narrow and maths differ in"),
        (flow, {"sources": fixed, "tokenizer": "a"}, "the layers of a diffllama cannot change places: layer 1"),
    ]
    for space, changes, message in cases:
        assert evomerge("validate", path_file(tmp_path, space, CATCMA, **changes)) == 2
        assert message in capsys.readouterr().err
