"""Greedy answers of a live model to prompts, in batches: what every evaluator of generated text shares.

The answer to a prompt does not depend on the prompts beside it, but for what no batching escapes: with more rows, or
longer ones, sums are added up in another order, and logits differ in their last bits. Where two tokens are equally
likely but for those bits, the other one may be chosen. The same prompts always make the same batches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel

log = logging.getLogger(__name__)

Grade = TypeVar("Grade")

GREEDY = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "temperature": 1.0, "top_p": 1.0, "top_k": 50,
}  # fmt: skip
"""Over what the model's generation_config.json says. The last line has no effect, but other values are warned of."""


def generate(
    live: LiveModel, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str], batch_size: int
) -> list[str]:
    """The model's greedy answer to each prompt, in order, without the prompt.

    A prompt that leaves no room for an answer in the model's context loses its beginning; that is logged, once for the
    same number of prompts.

    Args:
        live: its tokenizer puts special tokens at the start of prompts, if it has any; they are no part of an answer.
        prompts: given as they are, without a chat template.
        max_new_tokens: most tokens of an answer.
        stop: an answer ends before the first of these texts, and at the model's end token.
        batch_size: most prompts in one forward pass. Prompts of like lengths go together, the longest first.

    Raises:
        InputError: the context has no room for ``max_new_tokens``, or the model lacks a token of its tokenizer.
    """
    if not prompts:
        return []
    encoded = _encode(live, prompts, max_new_tokens)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(encoded[i]), encoded[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = _answer(live, [encoded[i] for i in batch], max_new_tokens, stop)
        for position, text in zip(batch, texts, strict=True):
            answers[position] = text
    return answers


def grade_answers(
    live: LiveModel,
    prompts: Mapping[int, str],
    grade: Callable[[int, str], Grade],
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
) -> tuple[dict[int, Grade], dict[str, float]]:
    """What ``grade`` gives for the model's answer to each prompt, by the prompts' numbers, and the seconds by phase.

    Raises:
        InputError: as ``generate``.
    """
    started = time.perf_counter()
    answers = generate(live, list(prompts.values()), max_new_tokens, stop, batch_size)
    answered = time.perf_counter()
    grades = {number: grade(number, answer) for number, answer in zip(prompts, answers, strict=True)}
    return grades, {"generate": answered - started, "score": time.perf_counter() - answered}


def _encode(live: LiveModel, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """The prompts as tokens, as many of the last as leave room for an answer."""
    encoded: list[list[int]] = [live.tokenizer.encode(prompt, verbose=False) for prompt in prompts]
    rows = live.model.get_input_embeddings().weight.shape[0]
    if (highest := max((token for ids in encoded for token in ids), default=0)) >= rows:
        problem = f"gives token {highest} ({live.tokenizer.decode([highest])!r}), and the model has {rows} embeddings"
        raise InputError("tokenizer", problem, "Take the tokenizer of a source that has all of its tokens.")
    if empty := [prompt for prompt, ids in zip(prompts, encoded, strict=True) if not ids]:
        raise InputError("prompt", f"{empty[0]!r} has no tokens to start an answer from", "Write something there.")
    context = getattr(live.model.config, "max_position_embeddings", None)
    if context is None:
        return encoded
    if (room := context - max_new_tokens) < 1:
        problem = f"is {max_new_tokens}, but prompt and answer together may have {context} tokens"
        raise InputError("max_new_tokens", problem, "Lower it.")
    if cut := sum(len(ids) > room for ids in encoded):
        _warn(f"{cut} of {len(prompts)} prompts lose their beginning: more than {room} tokens")
    return [ids[-room:] for ids in encoded]


@cache
def _warn(message: str) -> None:
    """Once for each message, because the same items come again with every candidate."""
    log.warning(message)


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
