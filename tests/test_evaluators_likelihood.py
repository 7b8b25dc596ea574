"""The likelihood of right answers: as a slow formula and lm-eval have it, in any batch; and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_miniature import MINIATURES, ROOT
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from evaluators.base import EvaluatorSettings, prompts_of
from evaluators.likelihood import LikelihoodEvaluator, LikelihoodSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.source import open_source
from evomerge.checkpoints.tokenizer_files import load_tokenizer
from evomerge.errors import InputError
from evomerge.inference.reading import Reader
from evomerge.testing.evaluators import HARMLESS, EvaluatorContract
from evomerge.testing.models import tiny_live

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = ROOT / "evaluators" / "tasks" / "data"
ITEMS = [{"question": f"{'so ' * (n % 5)}what is {n} + {n * n}?", "answer": n + n * n, "id": n} for n in range(24)]
TEMPLATES = {"prompt": "Q: {question}\nA:", "answer": " {answer}."}


@pytest.fixture(scope="module")
def miniature() -> LiveModel:
    """The expert in Japanese as it is, whose tokens are pieces of words, in float32."""
    source = open_source("japanese", str(MINIATURES / "japanese"), place="japanese")
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    return LiveModel(model, load_tokenizer(source))


def write(folder: Path, items: list[Any], name: str = "items.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    return path


def shipped(folder: Path, count: int = 12) -> Path:
    """Some items of the tasks that ship with the project, in both languages."""
    lines: list[str] = []
    for task in ("mini_math_ja", "mini_translate_ja", "mini_math_en"):
        lines += (DATA / f"{task}.search.jsonl").read_text().splitlines()[:count]
    path = folder / "shipped.jsonl"
    path.write_text("\n".join(lines))
    return path


def pairs(evaluator: LikelihoodEvaluator, split: str = "search") -> list[tuple[str, str]]:
    return [(item.prompt, item.answer) for item in evaluator._pairs[split]]  # type: ignore[index]


def refusal(**given: Any) -> str:
    with pytest.raises(InputError) as caught:
        LikelihoodSettings(**given).build()
    return str(caught.value)


def refusal_of(live: LiveModel, file: Path) -> str:
    evaluator = LikelihoodSettings(file=file).build()
    with pytest.raises(InputError) as caught:
        score(evaluator, live, "search", range(len(evaluator.items("search"))))
    return str(caught.value)


class TestContract(EvaluatorContract):
    @pytest.fixture
    def settings(self, tmp_path: Path) -> EvaluatorSettings:
        return LikelihoodSettings(file=write(tmp_path, ITEMS), batch_tokens=120, **TEMPLATES)

    @pytest.fixture
    def live(self) -> LiveModel:
        return tiny_live()


class TestTwoFiles(TestContract):
    harmless = HARMLESS | {"held_out"}  # the files are the splits

    @pytest.fixture
    def settings(self, tmp_path: Path) -> EvaluatorSettings:
        held_out = write(tmp_path, ITEMS[12:], "held_out.jsonl")
        return LikelihoodSettings(file=write(tmp_path, ITEMS[:12]), held_out_file=held_out, **TEMPLATES)


class WithoutLength(LikelihoodSettings):
    """Whose version forgets how long a prompt may be."""

    def build(self) -> LikelihoodEvaluator:
        evaluator = super().build()
        evaluator.version = self.model_copy(update={"max_length": None}).model_dump_json()
        return evaluator


def test_the_contract_finds_a_setting_that_the_version_lacks(tmp_path: Path) -> None:
    settings = WithoutLength(file=write(tmp_path, ITEMS), **TEMPLATES)
    with pytest.raises(AssertionError, match=r"with other values of max_length\n"):
        EvaluatorContract().test_the_version_follows_from_every_setting(settings, settings.build())


# ---- numbers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_is_the_sum_over_the_answers_tokens_one_by_one(tmp_path: Path, miniature: LiveModel) -> None:
    evaluator = LikelihoodSettings(file=shipped(tmp_path), batch_tokens=500).build()
    asked = pairs(evaluator)
    scores = score(evaluator, miniature, "search", range(len(asked))).scores
    for (prompt, answer), per_token, bits in zip(asked, scores["log_likelihood"], scores["bits_per_byte"], strict=True):
        ids = miniature.tokenizer.encode(prompt + answer)
        start = len(miniature.tokenizer.encode(prompt))
        logs = [
            torch.log_softmax(miniature.model(torch.tensor([ids[:t]])).logits[0, -1].double(), -1)[ids[t]].item()
            for t in range(start, len(ids))
        ]
        assert per_token == pytest.approx(np.mean(logs), abs=1e-4)
        assert bits == pytest.approx(-sum(logs) / math.log(2) / len(answer.encode()), abs=1e-4)


def test_sums_are_those_of_lm_eval(tmp_path: Path, miniature: LiveModel) -> None:
    """Spaces at the end of prompts, no prompt, and words that would be other tokens alone."""
    items = [
        {"p": p, "a": a}
        for p in ("Q: How many? A:", "A: ", "Tom has 26   ", "", "問: りんご")
        for a in (" 12 + 7", "個です。", "x")
    ]
    file = write(tmp_path, items)
    other = write(tmp_path, [{"p": "", "a": "another"}], "held_out.jsonl")
    evaluator = LikelihoodSettings(file=file, held_out_file=other, prompt="{p}", answer="{a}").build()
    asked = pairs(evaluator)
    lm = HFLM(pretrained=miniature.model, tokenizer=miniature.tokenizer, backend="causal", batch_size=4)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
    theirs = [total for total, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    bits = score(evaluator, miniature, "search", range(len(asked))).scores["bits_per_byte"]
    moved = [len(p) - len(p.rstrip()) for p, _ in asked]
    ours = [-b * math.log(2) * (len(a.encode()) + s) for b, (_, a), s in zip(bits, asked, moved, strict=True)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_batches_and_order_move_nothing(tmp_path: Path, miniature: LiveModel, batch_tokens: int) -> None:
    file = shipped(tmp_path)
    reference = LikelihoodSettings(file=file, batch_tokens=300).build()
    whole = range(len(reference.items("search")))
    wanted = score(reference, miniature, "search", whole).scores
    evaluator = LikelihoodSettings(file=file, batch_tokens=batch_tokens).build()
    shuffled = np.random.default_rng(1).permutation(len(whole)).tolist()
    found = score(evaluator, miniature, "search", shuffled).scores
    for metric, values in found.items():
        np.testing.assert_allclose(values, wanted[metric][shuffled], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [256, 60])
def test_an_item_scores_alike_bit_for_bit_in_any_company(tmp_path: Path, dtype: torch.dtype, context: int) -> None:
    """So a candidate that is scored in the rungs of a race scores as one that is scored on all items at once."""
    live = tiny_live(context=context)
    live.model.to(dtype)
    texts = ["".join(chr(97 + (7 * n + i * i) % 26) for i in range(n)) for n in (*range(1, 24), 31, 32, 33, 47, 48, 49)]
    rows = [{"prompt": text, "answer": f" {text[: 1 + len(text) % 9]}"} for text in texts]
    held_out = write(tmp_path, [{"prompt": "x", "answer": " y"}], "held_out.jsonl")
    evaluator = LikelihoodSettings(file=write(tmp_path, rows), held_out_file=held_out).build()
    count = len(evaluator.items("search"))
    whole = score(evaluator, live, "search", range(count)).scores["log_likelihood"]
    for size in (1, 2, 3, 7, count - 1):
        parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
        found = np.concatenate([score(evaluator, live, "search", part).scores["log_likelihood"] for part in parts])
        np.testing.assert_array_equal(found, whole)


def test_batches_keep_to_their_tokens(tmp_path: Path) -> None:
    live = tiny_live()
    shapes = []
    live.model.model.embed_tokens.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    evaluator = LikelihoodSettings(file=write(tmp_path, ITEMS), batch_tokens=100, **TEMPLATES).build()
    count = len(evaluator.items("search"))
    score(evaluator, live, "search", range(count))
    assert sum(rows for rows, _ in shapes) == count
    assert all(rows == 1 or rows * (width + 1) <= 100 for rows, width in shapes)
    assert any(rows > 1 for rows, _ in shapes)
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)


def test_a_better_expert_finds_its_answers_likelier(tmp_path: Path, miniature: LiveModel) -> None:
    base = AutoModelForCausalLM.from_pretrained(MINIATURES / "base", dtype=torch.float32).eval()
    evaluator = LikelihoodSettings(file=DATA / "mini_translate_ja.search.jsonl").build()
    ours, theirs = (
        score(evaluator, live, "search", range(40)).scores for live in (miniature, LiveModel(base, miniature.tokenizer))
    )
    assert ours["log_likelihood"].mean() > theirs["log_likelihood"].mean()
    assert ours["bits_per_byte"].mean() < theirs["bits_per_byte"].mean()


# ---- items -----------------------------------------------------------------------------------------------------------


def test_templates_are_filled(tmp_path: Path) -> None:
    file = write(tmp_path, ITEMS)
    evaluator = LikelihoodSettings(file=file, prompt="{{{id}}} {question}\n", answer="{answer}").build()
    found = {*pairs(evaluator), *pairs(evaluator, "held_out")}
    assert ("{7} so so what is 7 + 49?\n", "56") in found
    assert len(found) == len(ITEMS)
    assert evaluator.name == "items"


def test_a_prompt_is_in_one_split_whatever_else_the_file_holds(tmp_path: Path) -> None:
    many = [{"prompt": f"item {n % 500}", "answer": str(n)} for n in range(1000)]
    evaluator = LikelihoodSettings(file=write(tmp_path, many), held_out=0.2).build()
    search, held_out = ({prompt for prompt, _ in pairs(evaluator, split)} for split in ("search", "held_out"))
    assert not search & held_out
    assert len(search | held_out) == 500
    assert 60 < len(held_out) < 140  # 100 wanted, 9 the standard deviation
    part = LikelihoodSettings(file=write(tmp_path, many[:100], "part.jsonl"), held_out=0.2).build()
    assert {prompt for prompt, _ in pairs(part, "held_out")} <= held_out


def test_the_version_is_of_what_is_asked_and_not_of_where_it_lies(tmp_path: Path) -> None:
    def version(file: Path, **changes: Any) -> str:
        return LikelihoodSettings(file=file, **{**TEMPLATES, **changes}).build().version

    first = version(write(tmp_path, ITEMS))
    assert version(write(tmp_path, ITEMS, "elsewhere.jsonl")) == first
    assert version(write(tmp_path, ITEMS), batch_tokens=7) == first
    others = [version(write(tmp_path, ITEMS[:-1])), version(write(tmp_path, ITEMS), held_out=0.4)]
    others += [version(write(tmp_path, ITEMS), answer="{answer}"), version(write(tmp_path, ITEMS[::-1]))]
    assert len({first, *others}) == 5


def test_line_separators_within_a_text_end_no_line(tmp_path: Path) -> None:
    items = [{"prompt": f"a\u2028b\x85c {n}", "answer": "1"} for n in range(9)]
    evaluator = LikelihoodSettings(file=write(tmp_path, items)).build()
    assert len(pairs(evaluator)) + len(pairs(evaluator, "held_out")) == 9


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    file = write(tmp_path, [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "1 + 2 ="}])
    assert "no such file. A path is relative to the folder of the search file" in refusal(file=tmp_path / "no")
    assert "is a folder" in refusal(file=tmp_path)
    assert "line 2: has no text or number in its field 'answer'; it has: prompt" in refusal(file=file)
    assert "line 1: has no text or number in its field 'question'" in refusal(file=file, prompt="{question}")
    file.write_text('{"prompt": "a", "answer": "b"}\n\n["a", "b"]\n')
    assert "line 3: is not a JSON object" in refusal(file=file)
    file.write_text('{"prompt": "a", "answer": \n')
    assert "line 1: is not JSON" in refusal(file=file)
    good = b'{"prompt": "a", "answer": "b"}\n'
    for broken in (b"\xff\xfe", '{"prompt": "ä", "answer": "b"}\n'.encode("latin-1"), "あ".encode("shift-jis")):
        file.write_bytes(good + broken)
        assert "line 2: is not UTF-8" in refusal(file=file)
        assert "Save the file as UTF-8." in refusal(file=file)
    for broken in (
        '{"prompt": "\\ud83d", "answer": "b"}',
        '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}",
        '{"a": ' + "9" * 9000,
    ):
        file.write_bytes(good + broken.encode())
        assert "line 2: is not JSON" in refusal(file=file)
    with file.open("wb") as stream:
        stream.write(good)
        stream.truncate(1_900_000_000)  # zeros, which take no room on the disk
    assert "line 2: has more than 8,000,000 bytes" in refusal(file=file)
    file.unlink()
    os.mkfifo(file)
    assert "is a named pipe" in refusal(file=file)
    file.unlink()
    for answer in ("", " \n", None):
        write(tmp_path, [{"prompt": "a", "answer": answer}])
        assert "line 1: has" in refusal(file=file)


def test_splits_that_cannot_be_used(tmp_path: Path) -> None:
    file = write(tmp_path, ITEMS)
    assert "leaves no items for the" in refusal(file=write(tmp_path, ITEMS[:1], "one.jsonl"), **TEMPLATES)
    assert "leaves no items for the search split" in refusal(file=write(tmp_path, [], "none.jsonl"))
    other = write(tmp_path, [{"question": "?", "answer": 1}, ITEMS[3], ITEMS[4]], "other.jsonl")
    said = refusal(file=file, held_out_file=other, **TEMPLATES)
    assert f"other.jsonl, line 2: is an item of {file} too, with 1 more" in said


@pytest.mark.parametrize("template", ["{", "{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "a}"])
def test_templates_that_are_none(template: str) -> None:
    with pytest.raises(ValidationError):
        LikelihoodSettings(file=Path("items.jsonl"), prompt=template)


def test_items_that_do_not_fit_the_model(tmp_path: Path) -> None:
    file = write(tmp_path, [{"prompt": "a" * n, "answer": "b"} for n in range(20, 60)])
    assert "the model has 60 embeddings" in refusal_of(tiny_live(vocabulary=60), file)
    evaluator = LikelihoodSettings(file=file).build()
    lengths = [len(prompt) for prompt, _ in pairs(evaluator)]
    long = [index for index, length in enumerate(lengths) if length > 30]
    small = tiny_live(context=30)
    asked = [prompts_of(evaluator, Reader.of(small), "search", index)[0] for index in range(len(lengths))]
    assert [each.lost for each in asked] == [max(0, length - 30) for length in lengths]
    # What is left of one that is too long is scored as an item of its own would be.
    whole = score(evaluator, small, "search", [lengths.index(30)]).scores["log_likelihood"]
    np.testing.assert_allclose(
        score(evaluator, small, "search", long).scores["log_likelihood"], [whole[0]] * len(long), 1e-5
    )
    answers = write(tmp_path, [{"prompt": f"a{n}", "answer": "b" * (20 + n)} for n in range(20)])
    assert re.search(r"line \d+: its answer is \d+ tokens long", refusal_of(tiny_live(context=20), answers))


def test_an_answer_without_tokens_of_its_own(tmp_path: Path) -> None:
    live = tiny_live()
    whole = live.tokenizer.encode
    live.tokenizer.encode = lambda text, **more: whole(text, **more)[:3]  # a tokenizer that cuts long texts off
    file = write(tmp_path, [{"prompt": f"abc{n}", "answer": "d"} for n in range(9)])
    assert "its answer 'd' adds no token to those of its prompt" in refusal_of(live, file)


@pytest.mark.parametrize("answer", [" {answer}", "{answer}.", " {answer} times {question}"])
def test_the_end_token_is_scored_where_the_template_says_it(miniature: LiveModel, tmp_path: Path, answer: str) -> None:
    file, end = write(tmp_path, ITEMS), miniature.tokenizer.eos_token
    plain, ended = (
        prompts_of(
            LikelihoodSettings(file=file, prompt="Q: {question}", answer=text).build(),
            Reader.of(miniature),
            "search",
            0,
        )
        for text in (answer, answer + end)
    )
    assert miniature.tokenizer.eos_token_id not in plain[0].ids
    assert ended[0].ids == [*plain[0].ids, miniature.tokenizer.eos_token_id]
    assert ended[0].scored == plain[0].scored + 1
