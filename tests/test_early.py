"""What is wrong with an input is said before torch, transformers or lm-eval is imported, whatever the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluators import evaluator_settings
from evaluators.lm_eval import LmEvalSettings
from evaluators.lm_eval_files import metrics_of
from evomerge.checkpoints.references import check_reference
from evomerge.errors import InputError
from evomerge.plugins import plugins

MINIATURES = Path(__file__).parents[1] / "examples" / "miniatures"

SEARCH = {
    "name": "early",
    "sources": {name: str(MINIATURES / name) for name in ("base", "maths", "japanese")},
    "base": "base",
    "space": {"kind": "parameter_space", "method": "task_arithmetic"},
    "objectives": {"m": {"task": "mini_math_ja", "metric": "acc_ja"}},
    "budget": {"candidates": 40},
}

WRONG = {
    "space.method=task-arithmetic": "space.method: there is no merge method",
    "space.method=passthrough": "space: passthrough mixes 1 sources",
    "space.granularity=50": "space.granularity: is 50",
    "space.bounds.weight=[2, 1]": "space.bounds.weight",
    "space.fixed.densty=0.5": "space.fixed.densty",
    "optimizer.name=cmaes": "optimizer.name",
    "optimizer={name: cma, population: 1}": "optimizer.population",
    "objectives.m.metric=accuracy": "objectives.m.metric: there is no metric 'accuracy'",
    "objectives.m.task=mini_math_jaa": "objectives.m.task: there is no task 'mini_math_jaa'. Did you mean 'mini",
    "objectives.m={evaluator: likelihood, metric: log_likelihood, file: none.jsonl}": "objectives.m.file",
    "objectives.m={evaluator: likelihood, metric: acc, file: search.yaml}": "objectives.m.metric",
    "objectives.m={evaluator: cost, metric: tokens_per_second}": "objectives.m.metric",
    "objectives.m={evaluator: like, metric: acc}": "objectives.m.evaluator",
    "objectives.m.batch_size=0": "objectives.m.batch_size",
    "sources.maths=./nowhere": "sources.maths: there is no folder",
    "sources.maths=.": "sources.maths: has no config.json",
    "sources.maths=broken": "sources.maths: config.json is not JSON",
    f"sources.maths={MINIATURES / 'base'}+./nowhere": "sources.maths: there is no folder",
    f"sources.maths={MINIATURES / 'base'}+.": "sources.maths: has no adapter_config.json",
    f"sources.maths={MINIATURES / 'base'}+adapters/maths": "sources.maths: there is no folder adapters/maths, and",
    f"sources.maths={MINIATURES / 'base'}+org/name@v1": "sources.maths: there is no folder org/name@v1, and",
    "objectives.m={evaluator: change, metric: change, model: adapter}": "objectives.m.model",
    "sources.maths=adapter": "sources.maths",
    "sources.maths=org/name": "sources.maths: there is no folder org/name, and",
    "sources.maths=org/name+./nowhere": "sources.maths: there is no folder org/name, and",
    "objectives.m={evaluator: reward_model, metric: reward, file: items.jsonl, model: org/judge}": "objectives.m.model",
    "objectives.m={evaluator: python, metric: s, metrics: {s: maximize}, file: f.py, items_file: items.jsonl}": (
        "objectives.m: file: names f.py, which is code"
    ),
    "task_folders=[.]": "objectives.m: task_folders: hold task files",
    "budget.candidates=5": (
        "budget.candidates: is 5; the baselines alone are 6 (base, maths, japanese, uniform average, "
        "task_arithmetic defaults, kappa sqrt(N)). Give 6"
    ),
    "base=nobody": "search.yaml: base: there is no source",
}

HEAVY = ("torch", "transformers", "lm_eval", "datasets", "sklearn", "pandas", "numba", "ray")

RUN = """
import io, json, sys, contextlib
from evomerge.cli import main
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = ended.code
    heavy = [name for name in sys.argv[1].split(",") if name in sys.modules]
    print(json.dumps([code, said.getvalue(), heavy, len(sys.modules)]))
"""


def said(folder: Path, commands: list[list[str]]) -> list[tuple[int, str, list[str], int]]:
    """What each command ends with and says, which heavy modules are imported by then, and how many are in all."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", RUN, ",".join(HEAVY)], cwd=folder, env=environment, text=True,
        input=json.dumps(commands), capture_output=True, check=True,
    )  # fmt: skip
    return [tuple(json.loads(line)) for line in process.stdout.splitlines()]


def test_what_is_wrong_is_said_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(json.dumps(SEARCH))
    (tmp_path / "items.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "f.py").write_text("open('ran', 'w')\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    mergekit = {"merge_method": "tise", "models": [{"model": str(MINIATURES / "maths")}]}
    (tmp_path / "mergekit.yaml").write_text(json.dumps(mergekit))
    blend = {"method": "linear", "sources": ["a"], "parameters": {}}
    recipe = {"sources": {"a": "./nowhere"}, "tokenizer": "a", "blends": [blend], "embedding": 0, "norm": 0, "head": 0}
    hop = {"layer": 0, "attention": 0, "mlp": 0, "norm": 0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"hops": [hop]}))
    commands = [
        *((["validate", "search.yaml", "--set", override], place) for override, place in WRONG.items()),
        (["search", "search.yaml", "--set", "space.method=tise"], "space.method"),
        (
            ["search", "search.yaml", "--set", "task_folders=[none]", "--set", "allow_task_code=true"],
            "objectives.m: task_folders: there is no folder",
        ),
        (["inspect", str(MINIATURES / "base"), "org/name"], "org/name: there is no folder"),
        (["score", f"{MINIATURES / 'base'}+org/name", "search.yaml"], "MODEL: there is no folder org/name"),
        (["score", str(MINIATURES / "base"), "search.yaml", "--set", "objectives.m.metric=a"], "objectives.m.metric"),
        (["score", "./nowhere", "search.yaml"], "MODEL: there is no folder"),
        (["resume", "nowhere"], "nowhere"),
        (["confirm", "nowhere"], "nowhere"),
        (["export", "nowhere", "out"], "nowhere"),
        (["inspect", str(MINIATURES / "base"), "adapter"], "adapter: adapter is an adapter"),
        (["score", "adapter", "search.yaml"], "MODEL: adapter is an adapter"),
        (["inspect", str(MINIATURES / "base"), "./nowhere"], "./nowhere: there is no folder"),
        (["merge", "mergekit.yaml", "out"], "merge_method"),
        (["merge", "recipe.yaml", "out"], "recipe.yaml: blends[0]"),
        (["merge", "none.yaml", "out"], "none.yaml"),
        (["validate", "adapter"], "adapter: is a folder"),
    ]
    results = said(tmp_path, [command for command, _ in commands])
    for (command, place), (code, text, heavy, modules) in zip(commands, results, strict=True):
        assert (code, heavy) == (2, []), (command, text)
        assert text.startswith(f"error: {place}") or f": {place}" in text, (command, text)
        assert modules < 1500, command
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("trained_on", "advice"),
    [
        ("org/base", "Write `org/base+adapter`."),
        (str(MINIATURES / "base"), f"Write `{MINIATURES / 'base'}+adapter`."),
        ("base", "Write `BASE+adapter`, where BASE is the model that it adapts; it was trained on base."),
        ("/gone/base", "Write `BASE+adapter`, where BASE is the model that it adapts; it was trained on /gone/base."),
        (None, "Write `BASE+adapter`, where BASE is the model that it adapts."),
        (7, "Write `BASE+adapter`, where BASE is the model that it adapts."),
    ],
)
def test_an_adapter_alone_is_named_with_its_base(trained_on: object, advice: str, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": trained_on}))
    with pytest.raises(InputError) as refused:
        check_reference("adapter", "sources.maths", tmp_path)
    assert refused.value.place == "sources.maths"
    assert refused.value.hint == advice


def test_evaluators_know_their_metrics_before_they_are_built() -> None:
    settings = {
        "likelihood": {"file": "x"},
        "multiple_choice": {"file": "x"},
        "change": {"model": "x"},
        "cost": {"measure": True},
        "language": {"file": "x", "language": "ja"},
        "rouge": {"file": "x"},
        "exact_match": {"file": "x"},
        "reward_model": {"file": "x", "model": "x"},
        "mgsm": {"language": "ja"},
        "python": {"file": "x", "items_file": "x", "metrics": {"s": "maximize"}},
        "lm_eval": {"task": "mini_math_ja"},
    }
    assert settings.keys() == plugins("evomerge.evaluators").keys()
    for kind, keys in settings.items():
        assert evaluator_settings(kind, "evaluator").model_validate(keys).known_metrics()


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("mini_math_ja", ["acc_ja", "acc"]),
        ("arc_easy", ["acc", "acc_norm"]),
        ("gsm8k", ["exact_match,strict-match", "exact_match,flexible-extract"]),
        ("mmlu_anatomy", ["acc"]),  # in a file that this one includes
        ("mmlu", None),  # a group
    ],
)
def test_metrics_of_a_task_file(task: str, metrics: list[str] | None) -> None:
    assert metrics_of(task, ()) == metrics


def test_a_task_of_ones_own_is_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\nmetric_list:\n- metric: !function evil.run\n- metric: acc\n")
    (tmp_path / "pipe.yaml").mkdir()
    assert metrics_of("mine", (tmp_path,)) is None
    with pytest.raises(InputError, match="there is no task 'qqmine'"):
        metrics_of("qqmine", (tmp_path,))


def test_a_folder_of_task_files_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    settings = LmEvalSettings(task="mine", task_folders=(tmp_path,), allow_task_code=True)
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    settings.check()
    bomb = "a0: &a0 {k: v}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)
    )
    for text in (bomb, "a: " + "[" * 5000 + "]" * 5000, "a: &a [*a]\n"):
        (tmp_path / "other.yaml").write_text(text)
        with pytest.raises(InputError, match=r"aliases are written out|nested|alias of itself") as caught:
            settings.check()
        assert caught.value.place.startswith(str(tmp_path / "other.yaml"))
    (tmp_path / "other.yaml").unlink()
    os.mkfifo(tmp_path / "other.yaml")
    with pytest.raises(InputError, match="is a named pipe"):
        settings.check()
