"""Small searches on the miniature models, run with commands as by a user."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from evomerge.checkpoints.source import open_source
from evomerge.cli import main
from evomerge.merging.measured.kept import evidence_bytes
from evomerge.recipes.base import read_recipe
from evomerge.store import CandidateRow, Store

ROOT = Path(__file__).resolve().parents[1]
MINIATURES = ROOT / "examples" / "miniatures"
COMMAND = [sys.executable, "-m", "evomerge"]


def search_file(folder: Path, **changes: Any) -> Path:
    """A search file that takes seconds: few items, few candidates, in this process."""
    content: dict[str, Any] = {
        "name": "small",
        "sources": {name: str(MINIATURES / name) for name in ("base", "maths", "japanese")},
        "base": "base",
        "space": {"method": "task_arithmetic"},
        "objectives": {
            "mini_translate_ja": {
                "task": "mini_translate_ja",  # whose answers are the shortest
                "metric": "acc",
                "search": "validation[:24]",
                "held_out": "test[:40]",
            }
        },
        "optimizer": {"name": "cma", "population": 4},
        "budget": {"candidates": 13},
        "confirm": {"top": 2},
        "baselines": {"kappa": False, "soups": False},
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


SHORT_MATHS = {
    "mini_math_ja": {"task": "mini_math_ja", "metric": "acc_ja", "search": "validation[:4]", "held_out": "test[:4]"}
}
"""Objectives of a short search with a fit or a proxy on Japanese word problems."""


def short_search_file(folder: Path, **changes: Any) -> Path:
    """The shortest search file with items to confirm on: eight candidates, four items, one model confirmed."""
    items = {"task": "mini_translate_ja", "metric": "acc", "search": "validation[:4]", "held_out": "test[:4]"}
    short = {"objectives": {"mini_translate_ja": items}, "budget": {"candidates": 8}, "confirm": {"top": 1}}
    return search_file(folder, **short | changes)


def write_texts(path: Path, numbers: slice) -> None:
    """Calibration texts: prompts of search items of mini_math_ja, by their numbers."""
    lines = (ROOT / "evaluators/tasks/data/mini_math_ja.search.jsonl").read_text("utf-8").splitlines()[numbers]
    path.write_text("\n".join(json.dumps({"text": json.loads(line)["prompt"]}) for line in lines))


def newest_scored(search: Path) -> CandidateRow:
    """The last scored candidate of a search in which none failed."""
    with Store.open(search / "search.db") as store:
        assert store.counts()["failed"] == 0
        return max((row for row in store.candidates() if row.status == "done"), key=lambda row: row.number)


def export_of(row: CandidateRow, search: Path, out: Path, *options: str) -> int:
    """Export a candidate and return the exit code. By default the export is verified: the folder is loaded with plain
    transformers and must have the scores of the live model, item by item."""
    return evomerge("export", search, out, "--candidate", f"c{row.number:04d}", *options)


def evomerge(*arguments: object) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0


def json_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The JSON that a command prints, without NaN and Infinity."""
    capsys.readouterr()
    assert evomerge(*arguments) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def environment() -> dict[str, str]:
    """The environment for commands in other processes: one thread, so that all runs add up in the same order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def kept_in(evidence: Path) -> int:
    """The bytes of all tensors in a folder of evidence."""
    return sum(tensor.nbytes for file in evidence.glob("*.safetensors") for tensor in load_file(file).values())


def planned_evidence(search: Path) -> int:
    """The bytes of evidence according to the plan of a search of miniatures."""
    names = ("base", "maths", "japanese")
    with Store.open(search / "search.db") as store:
        recipes = [read_recipe(row.recipe, dict.fromkeys(names, "")) for row in store.candidates()]
    return evidence_bytes(recipes, {name: open_source(name, str(MINIATURES / name), place=name) for name in names})
