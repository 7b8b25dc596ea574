"""Scores and answers of every evaluator, item by item, as they were recorded.

PYTHONPATH=tests python tests/test_evaluators_golden.py --record
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers_lm_eval import CHOOSE, COUNTING_CODE, COUNTS, GENERATE, LIKELIHOOD, ROLLING, questions, write_task
from helpers_miniature import MINIATURES, ROOT
from test_evaluators_reward_model import judge

from evaluators.base import EvaluatorSettings, Split
from evaluators.cost import CostSettings
from evaluators.exact_match import ExactMatchSettings
from evaluators.function import FunctionSettings
from evaluators.language import LanguageSettings
from evaluators.likelihood import LikelihoodSettings
from evaluators.lm_eval import LmEvalSettings
from evaluators.mgsm import MgsmSettings
from evaluators.multiple_choice import MultipleChoiceSettings
from evaluators.reward_model import RewardModelSettings
from evaluators.rouge import RougeSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel, live_model, load_weights
from evomerge.checkpoints.source import open_source

GOLDEN = Path(__file__).parent / "golden" / "evaluators" / "scores.json"
DATA = ROOT / "evaluators" / "tasks" / "data"
FUNCTION = """\
def score(items, generate):
    first = generate([item["prompt"] for item in items], 16, ["\\n"])
    second = generate([a + "?" for a in first], 8)
    return [float(sum(map(ord, a + b)) % 997) for a, b in zip(first, second)]
"""


def lines(folder: Path, data: str, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row) -> Path:
    """The first items of a task of the miniatures, as a file."""
    rows = [json.loads(line) for line in (DATA / f"{data}.search.jsonl").read_text("utf-8").splitlines()[:14]]
    path = folder / f"{data}.jsonl"
    path.write_text("".join(json.dumps(change(row), ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def chosen(row: dict[str, Any]) -> dict[str, Any]:
    texts = [row["answer"], row["answer"].replace("1", "2") + " ", " 47", " 答えは12です。"]
    return {"question": row["prompt"], "choices": texts, "answer": 0}


def lm_eval_task(folder: Path, text: str) -> LmEvalSettings:
    (folder / "counting.py").write_text(COUNTING_CODE)
    splits = {split: questions(split, 6) for split in ("training", "validation", "test")}
    write_task(folder, "task", text, **splits)
    return LmEvalSettings(task="task", task_folders=(folder,), allow_task_code=True, batch_size=4)


def function(folder: Path) -> FunctionSettings:
    (folder / "mine.py").write_text(FUNCTION)
    return FunctionSettings(
        file=folder / "mine.py", items_file=lines(folder, "mini_math_ja"), metrics={"code": "maximize"},
        allow_task_code=True,
    )  # fmt: skip


def mgsm(folder: Path, **said: Any) -> MgsmSettings:
    file = lines(folder, "mini_math_ja", lambda row: {"question": row["prompt"], "answer": row["number"]})
    return MgsmSettings(language="ja", file=file, max_new_tokens=32, **said)


CASES: dict[str, Callable[[Path], EvaluatorSettings]] = {
    "mgsm exact": lambda folder: mgsm(folder, prompt="{question}", stop=("\n",), num_fewshot=2),
    "mgsm sakana": lambda folder: mgsm(folder, scorer="sakana", prompt="{question}", stop=("\n",)),
    "rouge": lambda folder: RougeSettings(file=lines(folder, "mini_translate_ja"), max_new_tokens=24, stop=("\n",)),
    "exact_match": lambda folder: ExactMatchSettings(
        file=lines(folder, "mini_translate_ja"), max_new_tokens=24, stop=("\n",)
    ),
    "language": lambda folder: LanguageSettings(
        file=lines(folder, "mini_translate_ja"), language="ja", max_new_tokens=12, batch_size=3
    ),
    "likelihood": lambda folder: LikelihoodSettings(
        file=lines(folder, "mini_math_ja"), batch_tokens=300, num_fewshot=1
    ),
    "multiple_choice": lambda folder: MultipleChoiceSettings(
        file=lines(folder, "mini_math_ja", chosen), choice="{choice}"
    ),
    "lm_eval of the miniatures": lambda folder: LmEvalSettings(
        task="mini_math_ja", search="validation[:9]", held_out="test[:9]"
    ),
    "lm_eval, answers": lambda folder: lm_eval_task(folder, GENERATE + COUNTS + "num_fewshot: 1\n"),
    "lm_eval, beams": lambda folder: lm_eval_task(folder, GENERATE + "  num_beams: 2\n" + COUNTS),
    "lm_eval, choices": lambda folder: lm_eval_task(folder, CHOOSE),
    "lm_eval, likelihoods": lambda folder: lm_eval_task(folder, LIKELIHOOD),
    "lm_eval, rolling likelihoods": lambda folder: lm_eval_task(folder, ROLLING),
    "reward_model": lambda folder: RewardModelSettings(
        file=lines(folder, "mini_math_ja"), model=str(judge(folder / "judge")), max_new_tokens=16, stop=("\n",),
        template="{answer}",
    ),
    "cost": lambda folder: CostSettings(),
    "python": function,
}  # fmt: skip


ROUNDING = {"reward_model": 2e-5}
"""How far rewards of one judge, in float32, are apart by the processor's instructions: 1.4e-5 was measured on one
machine without any of its vectors (ATEN_CPU_CAPABILITY=default), 4e-6 with AVX2."""


def miniature() -> LiveModel:
    source = open_source("japanese", str(MINIATURES / "japanese"), place="model")
    live = live_model(source, torch.device("cpu"), torch.float32)
    load_weights(live, ((name, source.read(name)) for name in source.tensors))
    return live


def scores(name: str, live: LiveModel, folder: Path) -> dict[Split, dict[str, Any]]:
    """Of every item of both splits: the scores by metric, and what the model wrote."""
    evaluator = CASES[name](folder).build()
    found: dict[Split, dict[str, Any]] = {}
    for split in get_args(Split):
        graded = score(evaluator, live, split, range(len(evaluator.items(split))))
        found[split] = {
            "scores": {metric: values.tolist() for metric, values in graded.scores.items()},
            "answers": [graded.answers[index] for index in sorted(graded.answers)],
        }
    return found


@pytest.fixture(scope="module")
def live() -> Iterator[LiveModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield miniature()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_recorded(name: str, live: LiveModel, tmp_path: Path) -> None:
    recorded = json.loads(GOLDEN.read_text("utf-8"))[name]
    for split, found in scores(name, live, tmp_path).items():
        assert found["answers"] == recorded[split]["answers"]
        assert found["scores"].keys() == recorded[split]["scores"].keys()
        for metric, values in found["scores"].items():
            np.testing.assert_allclose(
                values, recorded[split]["scores"][metric], rtol=1e-6, atol=ROUNDING.get(name, 1e-6)
            )


def record(names: Sequence[str]) -> None:
    """Write what evaluators say today."""
    torch.set_num_threads(1)
    model, found = miniature(), {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = scores(name, model, Path(folder))
    GOLDEN.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__" and "--record" in sys.argv:
    record(list(CASES))
