"""Small searches on the miniature models, run through the command line as a person would."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.cli import main

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
            "mini_math_ja": {
                "task": "mini_math_ja",
                "metric": "acc_ja",
                "search": "validation[:24]",
                "held_out": "test[:40]",
            }
        },
        "optimizer": {"name": "cma", "population": 4},
        "budget": {"candidates": 13},
        "confirm": {"top": 2},
        "baselines": {"kappa": False},
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def evomerge(*arguments: object) -> int:
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0


def json_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command prints as JSON, which has no NaN and no Infinity."""
    capsys.readouterr()
    assert evomerge(*arguments) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def environment() -> dict[str, str]:
    """For commands in processes of their own: few threads, so that two runs add up in one order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
