"""Log-likelihoods of given texts after given prompts: one prefill per pair, without decoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.inference.image_tokens import PictureRows
from evomerge.inference.progress import report_answered
from evomerge.inference.reading import Prompt
from evomerge.inference.requests import Likelihood, LogLikelihood

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from evomerge.checkpoints.live import LiveModel
    from evomerge.inference.image_tokens import ImageTokens

_MIN_STEP = 16
"""Rows are padded to a multiple of this many tokens, and of an eighth of the power of two below their length."""

_MIN_ROWS = 16
"""The head's matrix multiplication gets at least this many rows: with one to three, float32 rounds differently."""

_LOGITS_BYTES = 1 << 28
"""The maximum bytes of logits in one forward pass, unless a single item needs more."""


def log_likelihoods(
    live: LiveModel, requests: Sequence[Likelihood], tokens: ImageTokens | None = None
) -> list[LogLikelihood]:
    """log p(answer | prompt) of every request, in order; ``tokens`` provides image tokens, if prompts have pictures.

    On a CPU a request's result is the same bit for bit whatever other requests are in its batch: its width does not
    depend on them, and a matrix multiplication rounds a row the same way among any other rows, given a minimum number
    of rows.
    """
    by_number: dict[int, LogLikelihood] = {}
    for most in dict.fromkeys(request.batch_tokens for request in requests):
        prompts = {n: request.prompt for n, request in enumerate(requests) if request.batch_tokens == most}
        shown = PictureRows(tokens, list(prompts.values()))
        logs = _sums(live, [Tokens(prompt.fed, prompt.scored) for prompt in prompts.values()], most, shown)
        for (number, prompt), log in zip(prompts.items(), logs, strict=True):
            by_number[number] = LogLikelihood(log, prompt.scored, _size(prompt))
    return [by_number[number] for number in range(len(requests))]


@dataclass(frozen=True)
class Tokens:
    """A pair in the form the model sees: token ids, of which the last ``scored`` are the answer's."""

    ids: Sequence[int]
    scored: int


def _size(prompt: Prompt) -> int:
    # Trailing spaces of a prompt count as part of the answer, as in lm-eval.
    answer = prompt.text[len(prompt.text.rstrip()) :] + prompt.answer
    return len(answer.encode("utf-8", "surrogatepass"))


def _width(fed: int, context: int | None) -> int:
    """The padded width of an item with this many tokens, whatever the other items; at most an eighth more from 128 on.

    There is always padding unless the context has no room for it: without padding, transformers computes without a
    mask, with another kernel, which rounds differently.
    """
    step = max(_MIN_STEP, 1 << max(0, fed.bit_length() - 4))
    width = (fed // step + 1) * step
    return width if context is None else max(fed, min(width, context))


def _batches(items: Sequence[Tokens], most: int, context: int | None, row_logits: int) -> Iterator[list[int]]:
    """Positions of the items in batches of equal width, the widest first, so that one that is too large fails early.

    Args:
        most: the maximum number of tokens in a batch of several items.
        row_logits: bytes of the logits of one token.
    """
    alike: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for position, item in enumerate(items):
        fed = len(item.ids) - 1
        width = _width(fed, context)
        alike[width, width == fed].append(position)
    for (width, _), positions in sorted(alike.items(), reverse=True):
        positions.sort(key=lambda i: (items[i].scored, items[i].ids))
        batch: list[int] = []
        for position in positions:  # the last one in a batch has the most logits
            rows, kept = len(batch) + 1, kept_columns(width, items[position])
            if batch and (rows * width > most or rows * kept * row_logits > _LOGITS_BYTES):
                yield batch
                batch = []
            batch.append(position)
        yield batch


def kept_columns(width: int, item: Tokens) -> int:
    """How many of the last columns an item needs logits for if its row is padded to ``width``."""
    return width - (len(item.ids) - 1 - item.scored)


def padded(items: Sequence[Tokens], width: int) -> tuple[Tensor, Tensor]:
    """The token ids of items as model input, and the attention mask: int64 [items, width] each.

    Padded on the right, which no earlier token attends to.
    """
    import torch

    ids, mask = torch.zeros(2, len(items), width, dtype=torch.int64)
    for row, item in enumerate(items):
        fed = torch.tensor(item.ids[:-1])
        ids[row, : len(fed)], mask[row, : len(fed)] = fed, 1
    return ids, mask


def answer_logs(logits: Tensor, first: int, item: Tokens, dtype: torch.dtype) -> Tensor:
    """The log-probability of each token of an item's answer: [tokens], computed in ``dtype``.

    Args:
        logits: the logits of the item's row [columns, vocabulary]; those of the answer begin at column ``first``.
    """
    import torch

    answer = torch.tensor(item.ids[-item.scored :], device=logits.device)
    own = logits[first : first + len(answer)].to(dtype)
    return own.gather(1, answer[:, None]).squeeze(1) - own.logsumexp(1)


def _sums(live: LiveModel, items: Sequence[Tokens], most: int, shown: PictureRows) -> list[float]:
    """log p(answer | prompt) of every item, in order; sums of natural logarithms."""
    import torch

    totals = [0.0] * len(items)
    context = getattr(live.model.config.get_text_config(), "max_position_embeddings", None)
    row_logits = live.model.get_input_embeddings().weight.shape[0] * live.model.dtype.itemsize
    for batch in _batches(items, most, context, row_logits):
        width = _width(len(items[batch[0]].ids) - 1, context)
        kept = min(width, max(_MIN_ROWS, *(kept_columns(width, items[i]) for i in batch)))
        ids, mask = padded([items[i] for i in batch], width)
        sums = []
        with torch.inference_mode():
            logits = live.model(
                input_ids=ids.to(live.device),
                attention_mask=mask.to(live.device),
                use_cache=False,
                logits_to_keep=kept,
                **shown.inputs(live.model, batch, width, right=True),
            ).logits  # [rows, kept, vocabulary], for the last columns
            for row, i in zip(logits, batch, strict=True):
                logs = answer_logs(row, kept - kept_columns(width, items[i]), items[i], torch.float32)
                sums.append(logs.sum(dtype=torch.float64))
        for position, total in zip(batch, torch.stack(sums).tolist(), strict=True):
            totals[position] = total
        report_answered(len(batch))
    return totals
