"""Greedy decoding of many prompts at once: the same text as transformers gives for each prompt alone."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from helpers_checkpoints import save_tokenizer
from helpers_lm_eval import COUNTING_CODE, COUNTS, GENERATE, questions, write_all, write_task
from helpers_miniature import MINIATURES
from helpers_tiers import architectures
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import MODELS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from evaluators.lm_eval import LmEvalSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel
from evomerge.errors import InputError
from evomerge.inference import decoding
from evomerge.inference.decoding import Decoder, NoTableError
from evomerge.inference.generation import GREEDY, Room, shaping
from evomerge.inference.requests import Batch, Generate, Response, Text
from evomerge.inference.stopping import TextEnds
from evomerge.inference.transformers_engine import TransformersEngine, generate
from evomerge.testing.models import byte_tokenizer, tiny_live

pytestmark = pytest.mark.usefixtures("one_thread")

MAX = 9
SHOTS = "w1 w2 w3 w1 w2"
QUESTIONS = ["w4", "w5 w6 w7", "w8 w9 w10 w11 w12 w13", "w4 w5", "w14", "w15 w3 w3", "w20 w21 w22 w23 w24", "w5 w4"]
PROMPTS = [f"{SHOTS} {question}" for question in QUESTIONS]
IN_BATCHES = {"mistral", "gemma2", "gemma3", "phi3", "bloom", "mamba", "rwkv"}
"""A window of 4 tokens, a state in place of a cache, or inputs of their own at some step."""


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(folder, pad_token="<unk>")
    return PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")


def random_model(kind: str, changes: dict[str, Any], scale: float = 1.0) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def alone(live: LiveModel, ids: Sequence[int], most: int, **changes: Any) -> list[int]:
    """transformers' own answer to one prompt."""
    out = live.model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=most,
        pad_token_id=0,
        **GREEDY | changes,
    )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


def text_of(live: LiveModel, tokens: Sequence[int], stop: Sequence[str]) -> str:
    text: str = live.tokenizer.decode(tokens, skip_special_tokens=True)
    return min((text.split(ending)[0] for ending in stop), key=len, default=text)


def table(live: LiveModel, prompts: Sequence[Sequence[int]], most: int = MAX) -> Decoder:
    return Decoder(live.model, prompts, most, frozenset(), lambda answers: [False] * len(answers))


@pytest.mark.parametrize("name", architectures(MODELS))
def test_every_architecture_answers_as_for_each_prompt_alone(name: str, word_tokenizer: Any) -> None:
    encoded = [word_tokenizer.encode(prompt) for prompt in PROMPTS]
    for scale in (1.0, 0.4, 0.1):  # at which answers differ from prompt to prompt
        live = LiveModel(random_model(*MODELS[name], scale), word_tokenizer)
        answers = [alone(live, ids, MAX) for ids in encoded]
        if len(set(map(tuple, answers))) > 3:
            break
    assert len(set(map(tuple, answers))) > 3
    if name in IN_BATCHES:
        with pytest.raises(NoTableError):
            table(live, encoded)
    else:
        table(live, encoded)
    for stop in ([], ["w7", "w9 w"]):
        expected = [text_of(live, answer, stop) for answer in answers]
        for batch_size in (3, 50):
            assert generate(live, PROMPTS, MAX, stop, batch_size) == expected


def test_a_window_that_never_moves_keeps_every_token(word_tokenizer: Any) -> None:
    kind, changes = MODELS["mistral"]
    longest = max(len(prompt.split()) for prompt in PROMPTS) + MAX
    encoded = [word_tokenizer.encode(prompt) for prompt in PROMPTS]
    live = LiveModel(random_model(kind, {**changes, "sliding_window": longest + 1}), word_tokenizer)
    table(live, encoded)
    expected = [text_of(live, alone(live, ids, MAX), []) for ids in encoded]
    assert generate(live, PROMPTS, MAX, [], 3) == expected
    live = LiveModel(random_model(kind, {**changes, "sliding_window": longest}), word_tokenizer)
    with pytest.raises(NoTableError):
        table(live, encoded)


LIVE = tiny_live(3)
LIVE.model.generation_config.eos_token_id = list(range(0, 259, 16))  # about every tenth answer ends at each token


@settings(max_examples=settings().max_examples // 4)
@given(
    st.lists(st.lists(st.integers(3, 258), min_size=1, max_size=9), min_size=1, max_size=9),
    st.lists(st.integers(3, 258), max_size=9),
    st.integers(1, 12), st.integers(1, 5), st.integers(1, 20), st.integers(0, 6),
)  # fmt: skip
def test_any_prompts_in_any_number_of_rows(
    ends: list[list[int]], shared: list[int], most: int, rows: int, prefill: int, columns: int
) -> None:
    prompts = [shared + end for end in ends]
    with mock.patch.multiple(decoding, _PREFILL_TOKENS_CPU=prefill, _COLUMNS=columns):
        decoder = Decoder(
            LIVE.model,
            prompts,
            most,
            frozenset(LIVE.model.generation_config.eos_token_id),
            TextEnds(LIVE.tokenizer, []),
        )
        decoder.run(rows)
    assert decoder.answers == [alone(LIVE, ids, most) for ids in prompts]


@pytest.mark.parametrize(("start", "stop"), [(1, 9), (3, 8), (4, 8), (7, 9), (5, 5)])
def test_columns_in_use_are_moved_where_they_are(start: int, stop: int) -> None:
    table = torch.arange(2 * 3 * 9 * 2).reshape(2, 3, 9, 2)
    expected, memory = table[:, :, start:stop].clone(), table.data_ptr()
    decoding._move_left(table, slice(start, stop), -2)
    assert torch.equal(table[:, :, : stop - start], expected)
    assert table.data_ptr() == memory


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of every forward pass of LIVE."""
    found: list[tuple[int, int]] = []
    forward = LIVE.model.forward

    def watched(input_ids: torch.Tensor, **rest: Any) -> Any:
        found.append((input_ids.shape[0], input_ids.shape[1]))
        return forward(input_ids=input_ids, **rest)

    watched.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(LIVE.model, "forward", watched)
    return found


def test_a_prefix_is_computed_once_and_ended_rows_not_at_all(passes: list[tuple[int, int]]) -> None:
    shared, rests = list(range(20, 50)), [[n, n + 1] for n in range(60, 72)]
    ends = frozenset(LIVE.model.generation_config.eos_token_id)
    decoder = Decoder(LIVE.model, [shared + rest for rest in rests], 16, ends, TextEnds(LIVE.tokenizer, []))
    assert passes == [(1, 30)]
    decoder.run(4)
    lengths = [len(answer) for answer in decoder.answers]
    assert len(set(lengths)) > 3
    assert sum(rows for rows, tokens in passes[1:] if tokens == 2) == 12
    assert sum(rows for rows, tokens in passes[1:] if tokens == 1) == sum(lengths) - 12  # a prefill gives one token
    assert len(passes) < 1 + max(lengths) * 3  # a batch of four is not waited for


# ---- memory ----------------------------------------------------------------------------------------------------------


def short_of_memory(live: LiveModel, most: int, from_call: int = 0) -> tuple[Any, list[int]]:
    """A forward pass of more rows fails; the rows of each."""
    forward, seen = live.model.forward, []

    def limited(input_ids: torch.Tensor, **rest: Any) -> Any:
        seen.append(input_ids.shape[0])
        if input_ids.shape[0] > most and len(seen) > from_call:
            raise torch.OutOfMemoryError("no room")
        return forward(input_ids=input_ids, **rest)

    limited.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return mock.patch.object(live.model, "forward", limited), seen


@pytest.mark.parametrize("from_call", [0, 7])
@pytest.mark.parametrize("batch_size", ["auto", 12])
@pytest.mark.parametrize("loop", ["table", "batches"])
def test_out_of_memory_halves_the_rows_and_goes_on(batch_size: Any, from_call: int, loop: str) -> None:
    live, prompts = tiny_live(5), [f"what is {n} + {n * n}?" for n in range(14)]
    if loop == "batches":
        live.model.generation_config.suppress_tokens = [1]
    expected = generate(live, prompts, 10, ["\n"], 3)
    patch, seen = short_of_memory(live, 3, from_call)
    with patch:
        assert generate(live, prompts, 10, ["\n"], batch_size) == expected
        assert max(seen) > 3
        del seen[:]
        assert generate(live, prompts, 10, ["\n"], batch_size) == expected
        assert max(seen) <= 3  # remembered
    patch, _ = short_of_memory(live, 0)
    with patch, pytest.raises(torch.OutOfMemoryError):
        generate(live, prompts, 10, ["\n"], batch_size)


def test_room_is_given_back_before_it_is_asked_for_again() -> None:
    """A table that the frames of the failed attempt still held would leave no room for the next."""
    alive: list[Any] = []

    class Large:
        def __init__(self) -> None:
            alive.append(self)

        def __del__(self) -> None:
            freed.append(True)

    freed: list[bool] = []

    def work(rows: int) -> int:
        large = Large()
        alive.clear()
        if rows > 2:
            assert large
            raise torch.OutOfMemoryError
        assert len(freed) == 2
        return rows

    assert Room().fit("auto", 8, torch.device("cpu"), work) == 2


def test_likelihoods_go_on_with_fewer_rows_too(tmp_path: Path) -> None:
    write_all(tmp_path, 6)
    evaluator = LmEvalSettings(task="choose", task_folders=(tmp_path,), allow_task_code=True).build()
    live = tiny_live(2)
    expected = score(evaluator, live, "held_out", range(6)).scores
    patch, seen = short_of_memory(live, 5)
    with patch:
        found = score(evaluator, live, "held_out", range(6)).scores
    assert max(seen) > 5
    assert {key: values.tolist() for key, values in found.items()} == {k: v.tolist() for k, v in expected.items()}


# ---- stop texts ------------------------------------------------------------------------------------------------------

BYTES, WORD_PIECES = byte_tokenizer(), AutoTokenizer.from_pretrained(MINIATURES / "base")


def as_bytes(text: str) -> list[int]:
    ids: list[int] = BYTES.encode(text, add_special_tokens=False)
    return ids


STOPS = st.lists(st.text("ab。\n答", min_size=1, max_size=6), min_size=1, max_size=3)


@given(st.text("ab。\n答", max_size=30), STOPS)
def test_an_answer_ends_at_the_token_that_completes_a_text(text: str, stops: list[str]) -> None:
    ended = TextEnds(BYTES, stops)
    tokens = as_bytes(text)
    for length in range(1, len(tokens) + 1):
        said = BYTES.decode(tokens[:length])
        assert ended([tokens[:length]]) == [any(stop in said for stop in stops)]
        if any(stop in said for stop in stops):
            break


@given(st.lists(st.integers(3, 758), min_size=1, max_size=20), st.integers(0, 19), st.integers(1, 6))
def test_whatever_tokens_spell_it(tokens: list[int], first: int, count: int) -> None:
    """Stop texts that lie across tokens, spelled in another way than the tokenizer would."""
    text = WORD_PIECES.decode(tokens)
    stop = text[first : first + count].strip("\ufffd")
    if not stop:
        return
    ended = TextEnds(WORD_PIECES, [stop])
    expected = next(n for n in range(1, len(tokens) + 1) if stop in WORD_PIECES.decode(tokens[:n]))
    found = next(n for n in range(1, len(tokens) + 1) if ended([tokens[:n]]) == [True])
    assert found == expected


def test_equal_tails_are_decoded_once() -> None:
    ended = TextEnds(BYTES, ["\n"])
    assert ended([as_bytes("abcd"), as_bytes("xbcd"), as_bytes("b\n")]) == [False, False, True]
    with mock.patch.object(type(BYTES), "batch_decode", side_effect=AssertionError("decoded again")):
        assert ended([as_bytes("long bcd")]) == [False]


# ---- what is not plainly greedy --------------------------------------------------------------------------------------


def test_what_shapes_answers() -> None:
    live = tiny_live()
    own = live.model.generation_config.to_diff_dict
    assert shaping(own(), {"temperature": 0.0, "do_sample": False, "top_p": 0.9, "num_beams": 1}) == []
    config = live.model.generation_config
    config.repetition_penalty, config.suppress_tokens, config.min_new_tokens = 1.05, [5], 1
    assert set(shaping(own(), GREEDY)) == {"suppress_tokens", "min_new_tokens"}
    assert "repetition_penalty" in shaping(own(), {})


def test_a_models_own_rules_hold() -> None:
    live, prompts = tiny_live(), [f"what is {n}?" for n in range(6)]
    plain = generate(live, prompts, 12, [], 4)
    common = max(set("".join(plain)) - {"\ufffd"}, key="".join(plain).count)
    live.model.generation_config.suppress_tokens = as_bytes(common)
    found = generate(live, prompts, 12, [], 4)
    assert not any(common in text for text in found)
    assert found == [text_of(live, alone(live, live.tokenizer.encode(prompt), 12), []) for prompt in prompts]


class FakeEngine:
    greedy_only = True

    def __init__(self) -> None:
        self.asked: list[Generate] = []

    def respond(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Response]]]:
        (batch,) = batches
        assert all(isinstance(request, Generate) for request in batch.requests)
        self.asked += batch.requests  # type: ignore[arg-type]
        yield 0, [Text("a" * (i + 1)) for i in range(len(batch.requests))]


@pytest.fixture
def task(tmp_path: Path) -> Callable[[str], LmEvalSettings]:
    splits = {split: questions(split, 5) for split in ("validation", "test")}
    (tmp_path / "counting.py").write_text(COUNTING_CODE)

    def write(changes: str = "") -> LmEvalSettings:
        write_task(tmp_path, "mine", GENERATE + changes + COUNTS, **splits)
        return LmEvalSettings(task="mine", task_folders=(tmp_path,), allow_task_code=True, batch_size=4)

    return write


def test_a_task_of_lm_eval_is_answered_by_the_engine(task: Callable[..., LmEvalSettings]) -> None:
    live, engine = tiny_live(), FakeEngine()
    evaluator = task().build()
    assert score(evaluator, live, "held_out", range(5), engine).scores["letters"].tolist() == [1, 2, 3, 4, 5]
    assert [live.tokenizer.decode(request.prompt.fed) for request in engine.asked] == [
        group[0].args[0] for group in evaluator._instances["held_out"]
    ]
    assert {request.max_new_tokens for request in engine.asked} == {8}
    assert all("</s>" in request.stop for request in engine.asked)
    live.model.generation_config.repetition_penalty = 1.2
    with pytest.raises(InputError, match="repetition_penalty, of the task or the model's generation_config"):
        score(evaluator, live, "held_out", range(5), engine)


@pytest.mark.parametrize("changes", ["  num_beams: 3\n", "  repetition_penalty: 3.0\n"])
def test_a_task_that_is_not_greedy_is_answered_by_transformers(
    task: Callable[..., LmEvalSettings], changes: str
) -> None:
    live = tiny_live()
    found = task(changes).build()
    with mock.patch.object(TransformersEngine, "respond", side_effect=AssertionError):
        shaped = score(found, live, "held_out", range(5)).scores["sum_of_codes"]
    plain = score(task().build(), live, "held_out", range(5)).scores["sum_of_codes"]
    assert shaped.tolist() != plain.tolist()


def test_nothing_of_a_table_outlives_its_answers() -> None:
    """Python's collector comes by too seldom for tables of gigabytes: they must go with the last reference."""
    live = tiny_live()
    gc.collect()
    gc.disable()
    try:
        generate(live, ["a b", "c", "d e f"], 4, (), 2)
        left = [found for found in gc.get_objects() if type(found).__module__ == decoding.__name__]
        assert not [found for found in left if isinstance(found, Decoder | decoding._Table | decoding._TableLayer)]
    finally:
        gc.enable()
