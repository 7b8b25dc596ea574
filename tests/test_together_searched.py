"""A search whose candidates are scored together, as a person runs it: the same as one that scores each alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_miniature import MINIATURES, ROOT, evomerge, search_file
from test_adapters import LINEAR, train

from evomerge.cli import main
from evomerge.search.settings.folder import open_store
from evomerge.store import Store

BASE = MINIATURES / "base"
ITEMS = {"task": "mini_math_ja", "metric": "acc_ja", "search": "validation[:12]", "held_out": "test[:4]"}
CHANGE = {"evaluator": "change", "metric": "change", "model": str(BASE), "range": [0, 1]}
SPEED = {"evaluator": "cost", "metric": "tokens_per_second", "measure": True, "at_least": 1}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):  # weak, so that no answer hangs on the last bits
        train(BASE, folder / name, seed=seed, r=4, lora_alpha=0.5, target_modules=LINEAR)
    return {"base": str(BASE), **{name: f"{BASE}+{folder / name}" for name in ("one", "two")}}


@pytest.fixture(scope="module")
def strong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        train(BASE, folder / name, seed=seed, r=4, lora_alpha=8, target_modules=LINEAR)
    return {"base": str(BASE), **{name: f"{BASE}+{folder / name}" for name in ("one", "two")}}


def write(tmp_path: Path, sources: dict[str, str], **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "space": {"method": "task_arithmetic"}, "objectives": {"maths": ITEMS}, "budget": {"candidates": 10},
        "confirm": {"top": 1},
    }  # fmt: skip
    return search_file(tmp_path, sources=sources, **settings | changes)


def rows(folder: Path) -> list[tuple[object, ...]]:
    with open_store(folder) as store:
        return [
            (row.number, row.recipe_hash, row.status, row.objectives, store.answers(row.number, "search"))
            for row in store.candidates()
        ]


def scored(folder: Path) -> list[tuple[object, ...]]:
    """Without the recipes' hashes, which name the dtype."""
    return [(number, *rest) for number, _, *rest in rows(folder)]


def test_it_is_the_search_that_scores_each_alone_and_exports(tmp_path: Path, sources: dict[str, str]) -> None:
    alone = write(tmp_path, sources, dtype="float32")  # as what is scored together is computed
    assert evomerge("search", alone, "--dir", tmp_path / "alone") == 0
    assert evomerge("search", write(tmp_path, sources, together=4), "--dir", tmp_path / "together") == 0
    assert scored(tmp_path / "together") == scored(tmp_path / "alone")
    assert all(answers for *_, answers in rows(tmp_path / "together"))
    with open_store(tmp_path / "together") as store:
        began = [event.kind for event in store.events(kinds=("dispatch", "result"))]
    assert began[:4] == ["dispatch"] * 4  # of one worker
    assert evomerge("export", tmp_path / "together", tmp_path / "out", "--candidate", "c0006") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_merges_in_core_space_are_the_same_in_either_pool(tmp_path: Path, strong: dict[str, str]) -> None:
    """Together and alone, by workers of Ray that share what is kept of the adapters' bases."""
    space = {"method": "ties", "basis": "core"}
    for name, pool in (("here", {}), ("ray", {"pool": "ray", "cluster": {"workers": 2}})):
        for together in (1, 3):
            file = write(tmp_path, strong, space=space, together=together, dtype="float32", **pool)
            assert evomerge("search", file, "--dir", tmp_path / f"{name} {together}") == 0
        assert list((tmp_path / f"{name} 1" / "evidence").glob("*.safetensors"))
    assert rows(tmp_path / "ray 1") == rows(tmp_path / "here 1")
    assert rows(tmp_path / "ray 3") == rows(tmp_path / "here 3")
    assert scored(tmp_path / "here 3") == scored(tmp_path / "here 1")


class Death(BaseException):
    """Of the driver."""


@pytest.mark.nightly  # as one that scores its candidates one by one, tests/test_kill.py
@pytest.mark.parametrize("after", [1, 3])
def test_a_search_that_was_killed_is_the_one_that_was_not(
    tmp_path: Path, strong: dict[str, str], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Groups are formed again of the same candidates, and one that is left alone is scored as in a group."""
    objectives = {
        "maths": {**ITEMS, "search": "validation[:6]"},
        "likely": {
            "evaluator": "likelihood", "metric": "log_likelihood", "items": 6,
            "file": str(ROOT / "evaluators" / "tasks" / "data" / "mini_math_ja.search.jsonl"), "held_out": 0.02,
        },
    }  # fmt: skip
    file = write(tmp_path, strong, together=3, objectives=objectives, optimizer={"name": "nsga2", "population": 4})
    assert evomerge("search", file, "--dir", tmp_path / "whole") == 0
    write_all, calls = Store._write_all, []

    def dies(store: Store, writes: list[Any]) -> None:
        calls.append(len(writes))
        if len(calls) == after:
            raise Death
        write_all(store, writes)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_write_all", dies)
        with pytest.raises(Death):
            main(["search", str(file), "--dir", str(tmp_path / "killed")])
    assert evomerge("resume", tmp_path / "killed") == 0
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {"method": "ties"}}, "ties"),
        ({"constraints": {"speed": SPEED}}, "measures tokens_per_second"),
        ({"features": {"change": CHANGE}}, "reads merged weights"),
    ],
)
def test_what_cannot_be_scored_together_is_refused(
    tmp_path: Path,
    sources: dict[str, str],
    changes: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evomerge("validate", write(tmp_path, sources, together=4, **changes)) == 2
    said = capsys.readouterr().err
    assert "together: " in said
    assert words in said


@pytest.mark.parametrize(
    ("settings", "beyond"),
    [
        ({"together": 4}, False),
        ({"together": 8, "items": 60}, True),
        ({"together": 2, "items": 60, "racing": {"rungs": [20, 40]}}, False),
        ({"together": 2, "items": 80, "racing": {"rungs": [55]}}, True),
    ],
)
def test_the_plan_says_how_many_go_together_and_when_that_spares_nothing(
    tmp_path: Path,
    sources: dict[str, str],
    settings: dict[str, Any],
    beyond: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    items = settings.pop("items", None)
    objectives = {"maths": {**ITEMS, "search": f"validation[:{items}]", "items": items}} if items else {"maths": ITEMS}
    assert evomerge("validate", write(tmp_path, sources, objectives=objectives, **settings)) == 0
    lines = (line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    said = [parts for parts in lines if len(parts) == 2]  # a long line may end in a word alone
    assert ["together", f"up to {settings['together']} candidates"] in [[a, b[:18]] for a, b in said]
    assert beyond == any(kind == "warning" and text.startswith("together:") for kind, text in said)
