"""Blueprints: what is kept is what would be drawn, and nothing that follows from the code or the files goes stale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_miniature import MINIATURES

from evomerge.checkpoints import kept_blueprints as module
from evomerge.checkpoints.blueprint import Blueprint
from evomerge.checkpoints.headers import read_header
from evomerge.checkpoints.kept_blueprints import blueprint
from evomerge.checkpoints.layout import make_blueprint
from evomerge.errors import InputError

BASE = MINIATURES / "base"
CONFIG = json.loads((BASE / "config.json").read_text())
SHAPES = {name: entry.shape for name, entry in read_header(BASE / "model.safetensors", "base").items()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def refuse_to_draw(*_: object) -> Blueprint:
    raise AssertionError("drawn again")


def test_the_second_time_it_is_read_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first = blueprint(CONFIG, SHAPES, "x")
    assert first == make_blueprint(CONFIG, SHAPES, "x")
    monkeypatch.setattr("evomerge.checkpoints.layout.make_blueprint", refuse_to_draw)
    assert blueprint(CONFIG, SHAPES, "x") == first


def test_another_configuration_shape_or_transformers_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    blueprint(CONFIG, SHAPES, "x")
    monkeypatch.setattr("evomerge.checkpoints.layout.make_blueprint", refuse_to_draw)
    with pytest.raises(InputError, match="drawn again"):
        blueprint(CONFIG | {"rope_theta": 7.0}, SHAPES, "x")
    with pytest.raises(InputError, match="drawn again"):
        blueprint(CONFIG, {**SHAPES, "more": (1,)}, "x")
    monkeypatch.setattr(module.metadata, "version", lambda name: "0.0")
    with pytest.raises(InputError, match="drawn again"):
        blueprint(CONFIG, SHAPES, "x")


def test_a_file_that_was_cut_short_is_made_again(cache: Path) -> None:
    first = blueprint(CONFIG, SHAPES, "x")
    (kept,) = cache.rglob("*.json")
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    assert blueprint(CONFIG, SHAPES, "x") == first
    assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert blueprint(CONFIG, SHAPES, "x") == make_blueprint(CONFIG, SHAPES, "x")


def test_a_refusal_is_not_kept(cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="num_hidden_layers"):
            blueprint(CONFIG | {"num_hidden_layers": 900}, SHAPES, "x")
    assert not list(cache.rglob("*.json"))


def test_a_merge_and_a_status_import_no_transformers() -> None:
    """They would take seconds longer to start."""
    heavy = "{'transformers', 'scipy.stats', 'sklearn', 'ray', 'datasets', 'lm_eval'} & set(sys.modules)"
    code = f"import sys, evomerge.commands.merge; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    heavy = heavy.replace("{'", "{'torch', '", 1)
    code = f"import sys, evomerge.report.status; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
