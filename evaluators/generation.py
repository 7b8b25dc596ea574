"""Greedy answers of a live model to prompts, many at once: what every evaluator of generated text shares.

The answer to a prompt does not depend on the prompts beside it, but for what no batching escapes: with more rows, or
longer ones, sums are added up in another order, and logits differ in their last bits. Where two tokens are equally
likely but for those bits, the other one may be chosen. The same prompts always make the same batches, unless memory
runs out.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from weakref import WeakKeyDictionary

from pydantic import Field

from evaluators.prompts import Asked, PromptSettings, Reader, asked_prompt, told_too_long

if TYPE_CHECKING:
    import torch

    from evomerge.checkpoints.live import LiveModel

log = logging.getLogger(__name__)

Grade = TypeVar("Grade")
Found = TypeVar("Found")

BatchSize = Annotated[int, Field(ge=1)] | Literal["auto"]
"""Most prompts in one forward pass. Where memory runs out on a GPU, half as many are from then on."""

_AUTO = 256
"""Where ``auto`` starts. With more rows a forward pass takes longer, and answers become hardly more a second."""

GREEDY = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "temperature": 1.0, "top_p": 1.0, "top_k": 50,
}  # fmt: skip
"""Over what the model's generation_config.json says. The last line has no effect, but other values are warned of."""

_IDLE = {
    "_from_model_config", "bos_token_id", "cache_implementation", "do_sample", "early_stopping", "eos_token_id",
    "epsilon_cutoff", "eta_cutoff", "length_penalty", "max_length", "max_new_tokens", "min_p", "output_attentions",
    "output_hidden_states", "output_logits", "output_scores", "pad_token_id", "return_dict_in_generate", "temperature",
    "top_k", "top_p", "transformers_version", "typical_p", "use_cache",
}  # fmt: skip
"""Settings that do not change which token is the likeliest: of sampling, of beams, of what transformers returns."""

_FACTORS = {"encoder_repetition_penalty", "guidance_scale", "num_beam_groups", "num_beams", "repetition_penalty"}
"""Settings that change nothing when they are 1. The others change nothing when they are 0, false or empty."""


def generate(
    live: LiveModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: BatchSize,
    settings: PromptSettings | None = None,
) -> list[str]:
    """The model's greedy answer to each prompt, in order, without the prompt.

    A prompt that leaves no room for an answer in the model's context loses its beginning; that is logged, once for the
    same prompts.

    Args:
        live: its tokenizer puts special tokens at the start of prompts, if it has any; they are no part of an answer.
        prompts: what is asked, without a chat template.
        max_new_tokens: most tokens of an answer.
        stop: an answer ends before the first of these texts, and at the model's end token.
        batch_size: most prompts in one forward pass.
        settings: how prompts are put to the model; as they are when None.

    Raises:
        InputError: the context has no room for ``max_new_tokens``, or the model lacks a token of its tokenizer.
    """
    reader, how = Reader.of(live), settings or PromptSettings()
    asked = [asked_prompt(reader, how, text, max_new_tokens, f"prompt {i + 1}") for i, text in enumerate(prompts)]
    if told := told_too_long([each for each in asked if each.lost]):
        _warn(told)
    return answer_asked(live, asked, max_new_tokens, stop, batch_size)


def answer_asked(
    live: LiveModel, asked: Sequence[Asked], max_new_tokens: int, stop: Sequence[str], batch_size: BatchSize
) -> list[str]:
    """As ``generate``, for prompts that are rendered and cut into tokens; one that is too long loses its beginning."""
    if not asked:
        return []
    return answer_tokens(live, [each.ids[each.lost :] for each in asked], max_new_tokens, stop, batch_size)


def answer_tokens(
    live: LiveModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: BatchSize,
) -> list[str]:
    """As ``generate``, for prompts of one token at least that fit the model."""
    if live.engine is not None:
        return live.engine.answer(prompts, max_new_tokens, stop)
    request = Request(prompts, max_new_tokens, tuple(stop), batch_size)
    if (answering := _answering.get(live.model)) is not None:
        return answering(request)
    return answer_requests(live, [request], lambda rows: None)[0]


@dataclass(frozen=True)
class Request:
    """What ``answer_tokens`` is asked, but for the model."""

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stop: tuple[str, ...]
    batch_size: BatchSize


_answering: WeakKeyDictionary[Any, Callable[[Request], list[str]]] = WeakKeyDictionary()


@contextlib.contextmanager
def answered_by(live: LiveModel, answer: Callable[[Request], list[str]]) -> Iterator[None]:
    """Within, another function gives the answers that are asked of the model, whichever evaluator asks for them."""
    _answering[live.model] = answer
    try:
        yield
    finally:
        del _answering[live.model]


def answer_requests(
    live: LiveModel, requests: Sequence[Request], choose: Callable[[Sequence[int]], None]
) -> list[list[str]]:
    """The answers to several requests that differ in their prompts alone, decoded in one go.

    Args:
        live: a transformers model, without a serving engine.
        requests: one for each of the models that ``live`` can be, row by row.
        choose: is told before each forward pass which request every row is of; a single number stands for all rows.

    Raises:
        torch.OutOfMemoryError: there is no room for one row.
    """
    from evaluators.decoding import Decoder, Groups, NoTableError
    from evaluators.stopping import TextEnds

    first = requests[0]
    ends = live.model.generation_config.eos_token_id
    last = frozenset([ends] if isinstance(ends, int) else ends or ())
    batch_size: BatchSize | None = None  # of transformers' own loop, where there is no table
    prompts = [ids for request in requests for ids in request.prompts]
    groups = Groups([number for number, request in enumerate(requests) for _ in request.prompts], choose)
    try:
        ended = TextEnds(live.tokenizer, first.stop)
        decoder = Decoder(live.model, prompts, first.max_new_tokens, last, ended, groups)
        if shaping(live.model, GREEDY):
            batch_size = first.batch_size
    except NoTableError as error:
        batch_size = 1 if error.alone else first.batch_size
    if batch_size is not None:
        found = []
        for number, request in enumerate(requests):
            choose([number])
            found.append(_in_batches(live, request.prompts, first.max_new_tokens, first.stop, batch_size))
        return found
    _room(live.model).fit(first.batch_size, len(prompts), live.device, decoder.run)
    texts = iter([_text(live.tokenizer, tokens, first.stop) for tokens in decoder.answers])
    return [[next(texts) for _ in request.prompts] for request in requests]


def shaping(model: Any, settings: Mapping[str, Any]) -> list[str]:
    """The settings by which the answers would not be plainly greedy: those given, over the model's own."""
    said = {**model.generation_config.to_diff_dict(), **settings}
    return [
        name for name, value in said.items() if name not in _IDLE and value and (name not in _FACTORS or value != 1)
    ]


class Room:
    """How many rows memory has room for, found by running out of it."""

    def __init__(self) -> None:
        self._most: int | None = None

    def rows(self, batch_size: BatchSize) -> int:
        """As many as are wanted, or as there was room for before."""
        rows = _AUTO if batch_size == "auto" else batch_size
        return min(rows, self._most or rows)

    def fit(self, batch_size: BatchSize, count: int, device: torch.device, work: Callable[[int], Found]) -> Found:
        """What ``work`` gives for a number of rows, no more than ``count``.

        ``work`` is called again with half of them when it runs out of memory, and has to keep what it has done.

        Raises:
            torch.OutOfMemoryError: there is no room for one.
        """
        import torch

        rows = min(self.rows(batch_size), count)
        while True:
            try:
                return work(rows)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
            # Only here is the exception gone, and with it what the frames that it went through held.
            self._most = rows = rows // 2
            log.info("no room for more than %d rows at once", rows)
            if device.type == "cuda":
                torch.cuda.empty_cache()


_rooms: WeakKeyDictionary[Any, Room] = WeakKeyDictionary()


def _room(model: Any) -> Room:
    """The same for a model's life, which is that of its worker."""
    return _rooms.setdefault(model, Room())


def grade_answers(
    live: LiveModel,
    prompts: Mapping[int, Asked],
    grade: Callable[[int, str], Grade],
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: BatchSize,
) -> tuple[dict[int, Grade], dict[int, str], dict[str, float]]:
    """What ``grade`` gives for the model's answer to each prompt, and the answer, by the prompts' numbers.

    Returns:
        Grades, answers, and the seconds by phase.

    """
    started = time.perf_counter()
    texts = answer_asked(live, list(prompts.values()), max_new_tokens, stop, batch_size)
    answers = dict(zip(prompts, texts, strict=True))
    answered = time.perf_counter()
    grades = {number: grade(number, answer) for number, answer in answers.items()}
    return grades, answers, {"generate": answered - started, "score": time.perf_counter() - answered}


@cache
def _warn(message: str) -> None:
    """Once for each message, because the same items come again with every candidate."""
    log.warning(message)


def _in_batches(
    live: LiveModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str], batch_size: BatchSize
) -> list[str]:
    """Answers by transformers' own loop: a batch is done when its last row is. The longest prompts come first."""
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))

    def work(rows: int) -> None:
        while left := order[len(answers) :]:
            batch = left[:rows]
            texts = _answer(live, [prompts[i] for i in batch], max_new_tokens, stop)
            answers.update(zip(batch, texts, strict=True))

    _room(live.model).fit(batch_size, len(prompts), live.device, work)
    return [answers[i] for i in range(len(prompts))]


def _answer(live: LiveModel, rows: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
    """The answers of one batch."""
    import torch
    from transformers import StoppingCriteriaList

    from evaluators.stopping import StopAtText

    width, pad = max(len(ids) for ids in rows), live.tokenizer.pad_token_id
    padded = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in rows], device=live.device)
    lengths = torch.tensor([len(ids) for ids in rows], device=live.device)
    mask = torch.arange(width, device=live.device) >= width - lengths[:, None]
    criterion = StopAtText(live.tokenizer, stop, width, len(rows)) if stop else None
    with torch.inference_mode():
        tokens = live.model.generate(
            input_ids=padded,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList([criterion] if criterion else []),
            pad_token_id=pad,
            **GREEDY,
        )
    ends = criterion.lengths.tolist() if criterion else [tokens.shape[1]] * len(rows)
    # Where no token ends a sequence by itself, transformers lets ended rows run on instead of padding them.
    return [_text(live.tokenizer, ids[width:end], stop) for ids, end in zip(tokens.tolist(), ends, strict=True)]


def _text(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """The tokens as text, up to the first of the stop texts."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    ends = [text.index(ending) for ending in stop if ending in text]
    return text[: min(ends, default=len(text))]
