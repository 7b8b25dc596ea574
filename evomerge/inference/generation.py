"""Greedy answers of a live model to many prompts at once.

The answer to a prompt does not depend on the other prompts, except for an unavoidable effect of batching: with more or
longer rows, sums are accumulated in another order, and logits differ in their last bits. If two tokens are equally
likely up to those bits, the other one may be chosen. The same prompts always form the same batches, unless memory runs
out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from evomerge.inference.progress import report_answered
from evomerge.inference.requests import BatchSize

if TYPE_CHECKING:
    import torch

    from evomerge.checkpoints.live import LiveModel
    from evomerge.inference.image_tokens import PictureRows

log = logging.getLogger(__name__)

Found = TypeVar("Found")

_AUTO = 256
"""The initial value for ``auto``. With more rows a forward pass takes longer, and throughput hardly improves."""

GREEDY = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "temperature": 1.0, "top_p": 1.0, "top_k": 50,
}  # fmt: skip
"""These override the model's generation_config.json. The last line has no effect, but other values cause warnings."""

_IDLE = {
    "_from_model_config", "bos_token_id", "cache_implementation", "do_sample", "early_stopping", "eos_token_id",
    "epsilon_cutoff", "eta_cutoff", "length_penalty", "max_length", "max_new_tokens", "min_p", "output_attentions",
    "output_hidden_states", "output_logits", "output_scores", "pad_token_id", "return_dict_in_generate", "temperature",
    "top_k", "top_p", "transformers_version", "typical_p", "use_cache",
}  # fmt: skip
"""Settings that do not affect which token is the most likely: of sampling, beams, or the values returned."""

_FACTORS = {"encoder_repetition_penalty", "guidance_scale", "num_beam_groups", "num_beams", "repetition_penalty"}
"""Settings that have no effect when they are 1. The others have no effect when they are 0, false or empty."""


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded: prompts that differ in this are not decoded in the same batch.

    Attributes:
        max_new_tokens: the maximum number of tokens of an answer.
        stop: stop strings; an answer ends before the first of them, and at the model's end token.
        batch_size: the maximum number of prompts in one forward pass.
        settings: settings for ``model.generate``, for anything but plain greedy decoding.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    batch_size: BatchSize = "auto"
    settings: tuple[tuple[str, float], ...] = ()


def answer_groups(
    live: LiveModel,
    groups: Sequence[Sequence[Sequence[int]]],
    how: Decoding,
    choose: Callable[[Sequence[int]], None],
    shown: PictureRows | None = None,
) -> list[list[str]]:
    """The answers to several groups of prompts, given as token ids, decoded together.

    Args:
        live: a transformers model.
        groups: one for each of the models that ``live`` can be, row by row.
        how: the same for all.
        choose: called before each forward pass with the group of every row; a single number applies to all rows.
        shown: pictures of the prompts, group after group; None if there are none.

    Raises:
        torch.OutOfMemoryError: not even one row fits into memory.
    """
    from evomerge.inference.decoding import Decoder, Groups, NoTableError
    from evomerge.inference.stopping import TextEnds

    prompts = [ids for group in groups for ids in group]
    if not prompts:
        return [[] for _ in groups]
    ends = live.model.generation_config.eos_token_id
    last = frozenset([ends] if isinstance(ends, int) else ends or ())
    batch_size: BatchSize | None = None  # for transformers' own loop, if the table cannot be used
    owners = Groups([number for number, group in enumerate(groups) for _ in group], choose)
    try:
        ended = TextEnds(live.tokenizer, how.stop)
        decoder = Decoder(live.model, prompts, how.max_new_tokens, last, ended, owners, shown)
        if shaping(live.model.generation_config.to_diff_dict(), {**GREEDY, **dict(how.settings)}):
            batch_size = how.batch_size
    except NoTableError as error:
        batch_size = 1 if error.alone else how.batch_size
    if batch_size is not None:
        answers, first = [], 0
        for number, group in enumerate(groups):
            choose([number])
            rows = range(first, first + len(group))
            answers.append(_in_batches(live, dict(zip(rows, group, strict=True)), how, batch_size, shown))
            first += len(group)
        return answers
    _room(live.model).fit(how.batch_size, len(prompts), live.device, decoder.run)
    texts = iter([text_of(live.tokenizer, tokens, how.stop) for tokens in decoder.answers])
    return [[next(texts) for _ in group] for group in groups]


def shaping(own: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The settings that deviate from plain greedy decoding: those given, over the model's own."""
    said = {**own, **settings}
    return [
        name for name, value in said.items() if name not in _IDLE and value and (name not in _FACTORS or value != 1)
    ]


class Room:
    """How many rows fit into memory, found by running out of it."""

    def __init__(self) -> None:
        self._most: int | None = None

    def rows(self, batch_size: BatchSize) -> int:
        """As many as are wanted, or as fitted before."""
        rows = _AUTO if batch_size == "auto" else batch_size
        return min(rows, self._most or rows)

    def fit(self, batch_size: BatchSize, count: int, device: torch.device, work: Callable[[int], Found]) -> Found:
        """Call ``work`` with a number of rows, at most ``count``, and return its result.

        If it runs out of memory, ``work`` is called again with half as many rows, and must keep what it has done.

        Raises:
            torch.OutOfMemoryError: not even one row fits.
        """
        import torch

        rows = min(self.rows(batch_size), count)
        while True:
            try:
                return work(rows)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
            # Only here has the exception been freed, and with it the memory held by its stack frames.
            self._most = rows = rows // 2
            log.info("no room for more than %d rows at once", rows)
            if device.type == "cuda":
                torch.cuda.empty_cache()


_rooms: WeakKeyDictionary[Any, Room] = WeakKeyDictionary()


def _room(model: Any) -> Room:
    """The limit for the lifetime of a model, which is that of its worker."""
    return _rooms.setdefault(model, Room())


def _in_batches(
    live: LiveModel,
    prompts: Mapping[int, Sequence[int]],
    how: Decoding,
    batch_size: BatchSize,
    shown: PictureRows | None,
) -> list[str]:
    """Answers from transformers' own loop: a batch is done when its last row is. The longest prompts come first."""
    answers: dict[int, str] = {}
    order = sorted(prompts, key=lambda i: (-len(prompts[i]), prompts[i]))

    def work(rows: int) -> None:
        while left := order[len(answers) :]:
            batch = left[:rows]
            width = len(prompts[batch[0]])
            pictures = shown.inputs(live.model, batch, width) if shown else {}
            answers.update(zip(batch, _answer(live, [prompts[i] for i in batch], how, pictures), strict=True))
            report_answered(len(batch))

    _room(live.model).fit(batch_size, len(prompts), live.device, work)
    return [answers[i] for i in prompts]


def _answer(live: LiveModel, rows: Sequence[Sequence[int]], how: Decoding, pictures: Mapping[str, Any]) -> list[str]:
    """The answers of one batch."""
    import torch
    from transformers import StoppingCriteriaList

    from evomerge.inference.stopping import StopAtText

    width, pad, settings = max(len(ids) for ids in rows), live.tokenizer.pad_token_id, {**GREEDY, **dict(how.settings)}
    padded = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in rows], device=live.device)
    lengths = torch.tensor([len(ids) for ids in rows], device=live.device)
    mask = torch.arange(width, device=live.device) >= width - lengths[:, None]
    watched = how.stop and settings["num_beams"] == 1  # beams change rows
    criterion = StopAtText(live.tokenizer, how.stop, width, len(rows)) if watched else None
    with torch.inference_mode():
        tokens = live.model.generate(
            input_ids=padded,
            attention_mask=mask.long(),
            max_new_tokens=how.max_new_tokens,
            stopping_criteria=StoppingCriteriaList([criterion] if criterion else []),
            pad_token_id=pad,
            **settings,
            **pictures,
        )
    ends = criterion.lengths.tolist() if criterion else [tokens.shape[1]] * len(rows)
    # If no token ends a sequence by itself, transformers lets finished rows continue instead of padding them.
    return [text_of(live.tokenizer, ids[width:end], how.stop) for ids, end in zip(tokens.tolist(), ends, strict=True)]


def text_of(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """Decode the tokens, up to the first of the stop strings."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    ends = [text.index(ending) for ending in stop if ending in text]
    return text[: min(ends, default=len(text))]
