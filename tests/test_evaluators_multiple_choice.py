"""Questions with choices: as lm-eval scores them, and as a slow formula does; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_lm_eval import write_task
from pydantic import ValidationError

from evaluators import evaluator_settings
from evaluators.base import EvaluatorSettings
from evaluators.lm_eval import LmEvalSettings
from evaluators.multiple_choice import MultipleChoiceEvaluator, MultipleChoiceSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel
from evomerge.errors import InputError
from evomerge.testing.evaluators import EvaluatorContract
from evomerge.testing.models import tiny_live

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = """\
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: acc_bytes, aggregation: mean, higher_is_better: true}
"""


def questions(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Choices of different numbers, lengths and scripts, so that the three ways to count lengths differ."""
    made = []
    for n in range(start, start + count):
        choices = ["yes", f"it is {n} of them", "りんご", f"{'大' * (n % 4 + 1)}", "é", "no, " * (n % 3) + "no"][
            : 3 + n % 4
        ]
        made.append({"question": f"{'so ' * (n % 5)}what is {n}?", "choices": choices, "answer": n * 7 % len(choices)})
    return made


def write(folder: Path, items: list[Any], name: str = "items.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    return path


def build(folder: Path, **changes: Any) -> MultipleChoiceEvaluator:
    keys = {"file": write(folder, questions(40)), "held_out_file": write(folder, questions(9, 90), "held_out.jsonl")}
    return MultipleChoiceSettings(**{**keys, "prompt": "Q: {question}\nA:", **changes}).build()


def refusal(folder: Path, *items: Any) -> str:
    with pytest.raises(InputError) as caught:
        MultipleChoiceSettings(file=write(folder, [*questions(1), *items], "broken.jsonl")).build()
    return str(caught.value)


class TestContract(EvaluatorContract):
    @pytest.fixture
    def settings(self, tmp_path: Path) -> EvaluatorSettings:
        return MultipleChoiceSettings(file=write(tmp_path, questions(24)), batch_tokens=150)

    @pytest.fixture
    def live(self) -> LiveModel:
        return tiny_live()


def test_it_is_lm_evals_multiple_choice(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    write_task(folder, "choices", TASK, validation=questions(40), test=questions(9, 90))
    task = LmEvalSettings(task="choices", task_folders=(folder,), allow_task_code=True).build()
    live = tiny_live()
    theirs = score(task, live, "search", range(40)).scores
    ours = score(build(tmp_path), live, "search", range(40)).scores
    for metric in ("acc", "acc_norm", "acc_bytes"):
        np.testing.assert_array_equal(ours[metric], theirs[metric])
    assert len({tuple(ours[metric]) for metric in ("acc", "acc_norm", "acc_bytes")}) == 3
    assert 0 < ours["acc"].mean() < 1


@torch.no_grad()
def test_the_margin_is_the_right_one_less_the_best_wrong_one(tmp_path: Path) -> None:
    live, evaluator = tiny_live(), build(tmp_path)
    found = score(evaluator, live, "search", range(12)).scores
    for item, margin, acc in zip(questions(12), found["margin"], found["acc"], strict=True):
        start = live.tokenizer.encode(f"Q: {item['question']}\nA:")
        logs = []
        for choice in item["choices"]:
            ids = torch.tensor([[*start, *live.tokenizer.encode(f" {choice}")]])
            every = torch.log_softmax(live.model(ids).logits[0].double(), -1)
            logs.append(sum(every[t - 1, ids[0, t]].item() for t in range(len(start), ids.shape[1])))
        right = logs.pop(item["answer"])
        assert margin == pytest.approx(right - max(logs), abs=1e-3)
        assert (margin > 0) == bool(acc)


def test_an_answer_is_a_number_or_a_text(tmp_path: Path) -> None:
    by_text = [item | {"answer": item["choices"][item["answer"]]} for item in questions(40)]
    first, second = build(tmp_path), build(tmp_path, file=write(tmp_path, by_text, "by_text.jsonl"))
    assert first.version == second.version
    assert first.items("search") == second.items("search")
    digits = [{"question": f"{n}?", "choices": ["1", "2"], "answer": "1"} for n in range(20)]
    evaluator = build(tmp_path, file=write(tmp_path, digits, "digits.jsonl"))
    assert {item.right for item in evaluator._questions["search"]} == {0}


def test_templates(tmp_path: Path) -> None:
    evaluator = build(tmp_path, prompt="{question}", choice="\n- {choice} ({question})")
    item = evaluator._questions["search"][0]
    assert (item.prompt, item.written[0]) == ("what is 0?", "\n- yes (what is 0?)")
    versions = {evaluator.version, build(tmp_path).version, build(tmp_path, choice=" {choice}.").version}
    assert len(versions) == 3
    assert build(tmp_path, batch_tokens=3).version == build(tmp_path).version
    for wrong in ({"choice": "choice"}, {"choice": "{choice!r}"}, {"prompt": "{"}):
        with pytest.raises(ValidationError):
            MultipleChoiceSettings(file=Path("a"), **wrong)
    assert evaluator_settings("multiple_choice", "here") is MultipleChoiceSettings


@pytest.mark.parametrize("choices", [None, "ab", ["a"], [], ["a", 1], ["a", " "]])
def test_choices_that_are_none(tmp_path: Path, choices: Any) -> None:
    said = refusal(tmp_path, {"question": "?", "choices": choices, "answer": 0})
    assert "line 2: its choices are not a list of several texts" in said


@pytest.mark.parametrize("answer", [None, 2, -1, True, 1.0, "c", "A"])
def test_answers_that_are_none(tmp_path: Path, answer: Any) -> None:
    said = refusal(tmp_path, {"question": "?", "choices": ["a", "b"], "answer": answer})
    assert f"line 2: its answer {answer!r} is neither one of its 2 choices nor its number; the first is 0" in said
