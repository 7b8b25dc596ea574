"""Test items of public benchmarks are known by what they ask, in every evaluator; their texts are not kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators import benchmarks
from evaluators.base import Evaluator
from evaluators.benchmarks import DATA, HASH_DIGITS, benchmark_of, count, question_hash
from evaluators.cost import CostSettings
from evaluators.function import FunctionSettings
from evaluators.language import LanguageSettings
from evaluators.likelihood import LikelihoodSettings
from evaluators.mgsm import MgsmSettings
from evaluators.multiple_choice import MultipleChoiceSettings
from evaluators.rouge import RougeSettings

ROOT = Path(__file__).parents[1]

# The second problem of GSM8K's test split (MIT) and of MGSM's in German and Japanese (CC BY 4.0).
ENGLISH = "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?"
GERMAN = (
    "Ein Kleid erfordert 2 Knäuel blaue Wolle und halb so viel weiße Wolle. Wie viele Knäuel braucht man insgesamt?"
)
JAPANESE = "ローブを作成するには、青色の繊維を2巻分、白色の繊維をその半分用いる必要があります。全体で何巻必要ですか？"
KNOWN = [(ENGLISH, "gsm8k"), (GERMAN, "mgsm"), (JAPANESE, "mgsm")]
# The first exemplar of MGSM: prompts hold it everywhere, and it is no test item.
EXEMPLAR = (
    "Roger has 5 tennis balls. He buys 2 more cans of tennis balls. Each can has 3 tennis balls. "
    "How many tennis balls does he have now?"
)


@pytest.mark.parametrize(("question", "benchmark"), KNOWN)
def test_a_test_question_is_known(question: str, benchmark: str) -> None:
    for text in (
        question,
        question.upper() if question == ENGLISH else question + " ",
        question.replace(".", "").replace("  ", " "),
        f"Question: {question}\nStep-by-Step Answer:",
        f"問題：{question}\n答え：",
        f"Q: {EXEMPLAR}\nA: 11\n\nQ: {question}\nA:",
        f"### Instruction:\n{question}\n\n### Response:\n",
    ):
        assert benchmark_of({"id": 3, "text": text}) == benchmark
        assert benchmark_of({"nothing": "else", "prompt": text, "answer": "3"}) == benchmark


@pytest.mark.parametrize(
    "text", ["", "?", ":", "3", EXEMPLAR, ENGLISH.replace("2", "3"), JAPANESE[:-5], f"Why? {ENGLISH[:40]}", "Q:\nA:"]
)
def test_other_texts_are_not(text: str) -> None:
    assert benchmark_of({"question": text}) is None


@given(st.text(max_size=80))
def test_any_text_can_be_looked_for(text: str) -> None:
    assert benchmark_of({"text": text, "number": 5, "none": None, "list": [text]}) is None
    assert question_hash(text) == question_hash(f" {text}...\n")


def test_the_files_hold_hashes_and_nothing_else() -> None:
    sizes = {}
    for file in DATA.glob("*.txt"):
        lines = file.read_text("ascii").split("\n")
        assert lines.pop() == ""
        assert all(len(line) == HASH_DIGITS and not set(line) - set("0123456789abcdef") for line in lines)
        assert lines == sorted(set(lines))
        sizes[file.stem] = len(lines)
    assert sizes == {"gsm8k": 1319, "mgsm": 7 * 250}


def test_counts() -> None:
    assert count(["mgsm", None, "gsm8k", "mgsm"]) == {"gsm8k": 1, "mgsm": 2}
    assert count([None]) == {}


def test_a_script_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": ENGLISH, "answer": "3"}) + "\n")
    (tmp_path / "b.tsv").write_text(f"{GERMAN}\t3\n{ENGLISH}\t3\n", encoding="utf-8")
    script = "import sys, runpy, pathlib, evaluators.benchmarks as b; b.DATA = pathlib.Path(sys.argv.pop(1)); "
    script += f"runpy.run_path({str(ROOT / 'scripts' / 'benchmark_hashes.py')!r}, run_name='__main__')"
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, str(out), "name", str(tmp_path / "a.jsonl"), str(tmp_path / "b.tsv")]
    said = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True).stdout
    assert said == "2 questions of name\n"
    made = (out / "name.txt").read_text().split()
    assert made == sorted(str(question_hash(question)) for question in (ENGLISH, GERMAN))
    monkeypatch.setattr(benchmarks, "DATA", out)
    benchmarks._known.cache_clear()
    assert benchmark_of({"question": GERMAN}) == "name"
    assert benchmark_of({"question": JAPANESE}) is None
    benchmarks._known.cache_clear()


# ---- evaluators ------------------------------------------------------------------------------------------------------


def test_every_evaluator_counts_them(tmp_path: Path) -> None:
    def write(name: str, items: list[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        return path

    def item(question: str) -> dict[str, Any]:
        return {"question": question, "answer": "3", "choices": ["3", "4"]}

    # An item of each, and one that is in none; what is confirmed on is counted apart.
    file = write("search.jsonl", [*(item(question) for question, _ in KNOWN), item("What is 1 + 2?")])
    held_out = write("held_out.jsonl", [item(EXEMPLAR)])
    (tmp_path / "code.py").write_text("def score(items, generate):\n    return [0 for _ in items]\n")
    both: Any = {"file": file, "held_out_file": held_out}
    asking = both | {"prompt": "Q: {question}\nA:"}
    built: list[Evaluator] = [
        LikelihoodSettings(**asking).build(),
        RougeSettings(**asking).build(),
        LanguageSettings(**asking, language="ja").build(),
        MultipleChoiceSettings(**asking).build(),
        MgsmSettings(**both, language="ja").build(),
        FunctionSettings(
            file=tmp_path / "code.py", items_file=file, held_out_file=held_out, metrics={"a": "maximize"},
            allow_task_code=True,
        ).build(),
    ]  # fmt: skip
    for evaluator in built:
        assert count(item.benchmark for item in evaluator.items("search")) == {"gsm8k": 1, "mgsm": 2}
        assert count(item.benchmark for item in evaluator.items("held_out")) == {}
    assert count(item.benchmark for item in CostSettings().build().items("search")) == {}


DATASETS = os.environ.get("EVOMERGE_BENCHMARK_DATA")


@pytest.mark.skipif(not DATASETS, reason="EVOMERGE_BENCHMARK_DATA names no folder with gsm8k/ and mgsm/")
def test_all_of_the_real_files_are_known() -> None:
    folder = Path(str(DATASETS))
    items = [json.loads(line) for line in (folder / "gsm8k" / "test.jsonl").read_text().splitlines()]
    assert count(benchmark_of({"prompt": f"Q: {item['question']}\nA:"}) for item in items) == {"gsm8k": 1319}
    for language in ("de", "es", "fr", "ja", "ru", "zh"):
        test_split = MgsmSettings(language=language, file=folder / "mgsm" / f"mgsm_{language}.tsv").build()
        found = [count(item.benchmark for item in test_split.items(split)) for split in ("search", "held_out")]
        counted = [each.get("mgsm", 0) for each in found]
        assert sum(counted) == 250
        exemplars = folder / "mgsm" / f"exemplars_{language}.jsonl"
        assert {benchmark_of(json.loads(line)) for line in exemplars.read_text().splitlines()} == {None}
