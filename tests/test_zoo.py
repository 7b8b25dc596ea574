"""The zoo, its tasks and its search file are what the documents and the benchmarks take them for."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
import yaml
from helpers_lm_eval import shipped_items, shipped_tasks
from helpers_miniature import evomerge

from evomerge.checkpoints.source import open_source

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "examples" / "zoo"
TASKS = ROOT / "evaluators" / "tasks"

sys.path.insert(0, str(ROOT / "scripts"))
import train_zoo  # noqa: E402
import zoo_problems as problems  # noqa: E402

COMPOSITION = "zoo_steps_kanji:acc"
SUM = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    return shipped_tasks(problems.TASKS)


def test_all_of_it_is_small() -> None:
    files = [*ZOO.rglob("*"), *(TASKS / "data").glob("zoo_*")]
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 12_000_000


@pytest.mark.parametrize("name", train_zoo.EXPERTS)
def test_adapter_is_of_the_base_and_changes_every_linear_layer(name: str) -> None:
    assert sum(file.stat().st_size for file in (ZOO / name).iterdir()) <= 400_000
    source = open_source(name, f"{ZOO / 'base'}+{ZOO / name}", place=name)
    assert source.warnings == ()
    assert len(source.changes) == 7 * 6
    named = json.loads((ZOO / name / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (ZOO / name / named).resolve() == ZOO / "base"


@pytest.mark.parametrize("name", train_zoo.IN_VECTORS)
def test_vectors_are_of_keys_values_and_the_inner_activation(name: str) -> None:
    assert sum(file.stat().st_size for file in (ZOO / name).iterdir()) <= 100_000
    source = open_source(name, f"{ZOO / 'base'}+{ZOO / name}", place=name)
    assert source.warnings == ()
    by_module = {weight.split(".")[-2]: source.vectors(weight)[0] for weight in source.changes}
    assert {module: of_columns for module, (_, of_columns) in by_module.items()} == {
        "k_proj": False, "v_proj": False, "down_proj": True,
    }  # fmt: skip
    assert len(source.changes) == 3 * 6
    assert all((vector != 1).float().mean() > 0.9 for vector, _ in by_module.values())


@pytest.mark.parametrize("name", train_zoo.IN_FULL)
def test_expert_in_full_leaves_only_the_embeddings_alone(name: str) -> None:
    base, expert = (train_zoo.source_weights(ZOO, source) for source in ("base", name))
    assert {tensor for tensor in base if torch.equal(base[tensor], expert[tensor])} <= {
        "model.embed_tokens.weight", "lm_head.weight", *(tensor for tensor in base if "norm" in tensor)
    }  # fmt: skip


def test_reinforcement_changes_few_weights_and_training_too_long_changes_them_much() -> None:
    base = train_zoo.source_weights(ZOO, "base")

    def changed(name: str) -> torch.Tensor:
        expert = train_zoo.source_weights(ZOO, name)
        return torch.cat([(expert[tensor] - base[tensor]).flatten() for tensor in base if "proj" in tensor])

    norms = {name: changed(name).norm().item() for name in train_zoo.EXPERTS}
    assert min(norms, key=norms.__getitem__) == "rewarded"
    assert max(norms, key=norms.__getitem__) == "into_english"
    share = {name: (changed(name) != 0).float().mean().item() for name in train_zoo.IN_FULL}
    assert share["rewarded_full"] < 0.5 < share["steps_en_full"]


@pytest.mark.parametrize("task", problems.TASKS)
def test_items_are_those_that_the_script_makes_and_no_split_shares_any(task: str) -> None:
    prompts: set[str] = set()
    for split, count in train_zoo.ITEMS.items():
        items = shipped_items(task, split)
        assert items == problems.task_items(task, split, count)  # type: ignore[arg-type]
        prompts |= {item["prompt"] for item in items}
        for item in items:
            for first, operator, second, _ in SUM.findall(item["answer"]):
                assert problems.split_of(int(first), operator, int(second)) == split
    assert len(prompts) == sum(train_zoo.ITEMS.values())
    assert train_zoo.ITEMS["held_out"] >= 300


def test_what_experts_are_trained_on_is_of_no_split() -> None:
    random = problems.Random(0)
    seen = {
        (int(first), operator, int(second))
        for expert in train_zoo.EXPERTS.values()
        for skill in expert.mixture
        for _ in range(100)
        for first, operator, second, _ in SUM.findall(skill(random, "train").answer)
    }
    assert len(seen) > 500
    assert {problems.split_of(*content) for content in seen} == {"train"}


@pytest.mark.parametrize("number", range(0, 199, 7))
def test_japanese_numerals(number: int) -> None:
    """Read back digit by digit, by value and place."""
    values = {digit: value for value, digit in enumerate("〇一二三四五六七八九")}
    total, pending = 0, 0
    for sign in problems.kanji(number):
        if sign in values:
            pending = values[sign]
        else:
            total, pending = total + max(pending, 1) * {"十": 10, "百": 100}[sign], 0
    assert total + pending == number


@pytest.mark.parametrize("task", problems.TASKS)
def test_right_answers_score_one_and_wrong_ones_nothing(tasks: dict[str, Any], task: str) -> None:
    loaded = tasks[task]
    for documents in (loaded.validation_docs(), loaded.test_docs()):
        for document in documents:
            right = loaded.process_results(document, [document["answer"]])
            wrong = loaded.process_results(document, [" 3 apples, 三"])
            assert right.pop("length", 0) == (len(document["answer"]) if task == "zoo_math_en" else 0)
            assert set(right.values()) == {1.0}
            assert set(right) == {metric for metric, higher in loaded.higher_is_better().items() if higher}
            if document.get("number") != 3:
                assert wrong["acc"] == 0.0


def test_composition_wants_japanese_numerals(tasks: dict[str, Any]) -> None:
    score = tasks["zoo_steps_kanji"].process_results
    document = {"answer": " 2 + 6 = 8 なので、答えは十八です。"}
    assert score(document, [" 2 + 6 = 8、答えは十八です。"])["acc"] == 1.0
    assert score(document, [" 2 + 6 = 8、答えは八です。"])["acc"] == 0.0
    assert score(document, [" 2 + 6 = 8、答えは18です。"])["acc"] == 0.0


@pytest.mark.parametrize(
    ("answer", "steps", "numeral"),
    [
        (" 34 + 48 = 82、82 + 40 = 122 なので、答えは百二十二です。", 1, 1),
        (" 34 + 48 = 82、82 + 40 = 122 なので、答えは122です。", 1, 0),  # two steps, and digits
        (" 34 + 48 = 82 なので、答えは八十二です。", 0, 1),  # one step, and its numeral
        (" 34 + 48 = 82、82 + 40 = 122 なので、答えは百二十です。", 1, 0),  # another numeral than that of its sums
        ("百二十二", 0, 0),  # nothing is worked out
        ("", 0, 0),
    ],
)
def test_parts_of_the_composition_are_told_apart(tasks: dict[str, Any], answer: str, steps: int, numeral: int) -> None:
    document = {"answer": " 34 + 48 = 82、82 + 40 = 122 なので、答えは百二十二です。"}
    found = tasks["zoo_steps_kanji"].process_results(document, [answer])
    assert (found["steps"], found["numeral"]) == (steps, numeral)
    assert found["acc"] == float("百二十二" in answer)


def test_recorded_scores_are_of_every_source_and_none_does_the_composition() -> None:
    recorded = json.loads((ZOO / "scores.json").read_text())
    sources = ["base", *train_zoo.EXPERTS, *train_zoo.IN_FULL]
    assert list(recorded) == sources
    for name in sources:
        assert recorded[name][COMPOSITION] <= 0.05, name
    assert train_zoo.table_of(recorded) in (ZOO / "README.md").read_text(encoding="utf-8")


def test_search_file_names_every_adapter() -> None:
    file = ROOT / "examples" / "zoo.yaml"
    sources = yaml.safe_load(file.read_text())["sources"]
    assert set(sources) == {"base", *train_zoo.EXPERTS}


@pytest.mark.nightly
def test_search_file_runs(tmp_path: Path) -> None:
    changes = [
        f"objectives.{name}={{task: {task}, metric: {metric}, search: 'validation[:8]', held_out: 'test[:8]'}}"
        for name, task, metric in (
            ("zoo_translate", "zoo_translate", "acc"),
            ("composition", "zoo_steps_kanji", "acc"),
            ("steps", "zoo_steps_kanji", "steps"),
            ("numeral", "zoo_steps_kanji", "numeral"),
        )
    ]
    changes += ["budget.candidates=20", "optimizer.population=4", "pool=in_process", "confirm.top=1"]
    told = [argument for change in changes for argument in ("--set", change)]
    assert evomerge("search", ROOT / "examples" / "zoo.yaml", "--dir", tmp_path / "zoo", *told) == 0


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["base", "japanese", "rewarded"])
def test_scores_are_as_recorded(name: str) -> None:
    """A few items may fall otherwise on another CPU, which rounds otherwise."""
    recorded = json.loads((ZOO / "scores.json").read_text())[name]
    measured = train_zoo.score_source(name, ZOO, TASKS, "held_out")
    for metric, mean in recorded.items():
        assert measured[metric] == pytest.approx(mean, abs=1.0 if metric.endswith("length") else 0.015), metric


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["kanji", "rewarded", "steps_en_full"])
def test_training_again_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    made = []
    for attempt in ("first", "second"):
        (tmp_path / attempt).mkdir()
        (tmp_path / attempt / "base").symlink_to(ZOO / "base")
        train_zoo.make_expert(name, tmp_path / attempt, steps=4)
        made.append({file.name: file.read_bytes() for file in (tmp_path / attempt / name).iterdir()})
    assert made[0] == made[1]
