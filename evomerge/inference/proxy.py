"""A smooth, differentiable proxy of a model's quality: how unlikely right answers are, averaged over items.

For an item whose right answer has probability p it is log(1 - log p): similar to -log p for answers that are nearly
certain, and to its logarithm for answers that are far from likely. The mean of -log p itself is dominated by the items
that are furthest from right, whose scores do not change; with the logarithm, these count by their relative change.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from evomerge.checkpoints.backward import Listening
from evomerge.inference.prefill import Tokens, answer_logs, kept_columns, padded
from evomerge.inference.progress import report_answered
from evomerge.inference.reading import Prompt

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel

MAX_TOKENS = 2048
"""The maximum number of tokens in one forward and backward pass, unless a single item has more: with this many, the
cost of a pass that does not depend on tokens (reading every weight of the sources) no longer matters."""

_LOGITS_BYTES = 1 << 27
"""The maximum bytes of logits in one pass, unless a single item has more; what is computed from them needs more."""

SHARE_OF_FREE = 0.25
"""The share of free memory that activations kept for the backward pass may use. If a pass would need more, each layer
keeps only its input and is computed again, which costs another forward pass."""

_KEPT_FACTOR = 34
"""About how many numbers, in units of the width of the hidden state, a layer keeps for each token (Korthikanti et al.,
"Reducing activation recomputation in large transformer models", arXiv 2205.05198, section 4, for 16-bit numbers)."""

Loss = Callable[[Tensor], Tensor]
"""(log p of a whole answer, a natural logarithm) -> its contribution to the loss, which is a mean of these scalars."""


def saturating(log: Tensor) -> Tensor:
    """log(1 - log p): the proxy."""
    return torch.log1p(-log)


@dataclass(frozen=True)
class _Item(Tokens):
    """An item in the form the model sees, its weight in the mean, and the position of its prompt."""

    weight: float
    number: int


def differentiate_proxy(
    live: LiveModel, prompts: Sequence[Prompt], weights: Sequence[float], listening: Listening
) -> float:
    """Compute the proxy, and run backward passes through the model.

    Args:
        as for ``loss_parts``; each pass adds its share to the gradient.

    Returns:
        The proxy, computed over whole answers with natural logarithms.
    """
    proxy = 0.0
    with closing(loss_parts(live, prompts, weights, listening)) as parts:
        for part in parts:
            part.backward()  # type: ignore[no-untyped-call]
            proxy += float(part.detach())
    return proxy


def loss_parts(
    live: LiveModel,
    prompts: Sequence[Prompt],
    weights: Sequence[float],
    listening: Listening,
    loss: Loss = saturating,
    told: Callable[[Sequence[int]], None] = lambda rows: None,
) -> Generator[Tensor]:
    """A loss of right answers, in parts that sum to it; run backward on each before requesting the next.

    Items are scored like in ``log_likelihoods``, except for rounding: they are batched into as few passes as possible.

    Args:
        prompts: each with its answer.
        weights: the weight of each prompt; the loss is their weighted mean.
        listening: a context that is open during the forward pass of a part, and until the next is requested.
        loss: the loss of one answer.
        told: called before a part with the positions of the prompts of its rows.

    Yields:
        scalars with a graph, in float32 or higher precision.
    """
    total = sum(weights)
    pairs = enumerate(zip(prompts, weights, strict=True))
    items = [_Item(prompt.fed, prompt.scored, weight / total, number) for number, (prompt, weight) in pairs]
    for batch in _batches(items, live):
        told([item.number for item in batch])
        with listening(_is_large(batch, live)):
            with torch.enable_grad():
                part = _part(live, batch, loss)
            yield part
        report_answered(len(batch))


def _batches(items: Sequence[_Item], live: LiveModel) -> Iterator[list[_Item]]:
    """The items in batches of similar lengths, the longest first, so that one that is too large fails early."""
    row_logits = live.model.get_input_embeddings().weight.shape[0] * live.model.dtype.itemsize
    batch: list[_Item] = []
    for item in sorted(items, key=lambda item: len(item.ids), reverse=True):
        more = [*batch, item]
        rows, width, kept = len(more), len(more[0].ids) - 1, _kept(more)
        if batch and (rows * width > MAX_TOKENS or rows * kept * row_logits > _LOGITS_BYTES):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _kept(batch: Sequence[_Item]) -> int:
    """How many of the last columns need logits if rows are padded on the right to the width of the first."""
    width = len(batch[0].ids) - 1
    return max(kept_columns(width, item) for item in batch)


def kept_bytes(tokens: int, width: int, layers: int, itemsize: int) -> int:
    """About how many bytes layers keep during a forward pass of this many tokens, with hidden states of that width."""
    return tokens * width * _KEPT_FACTOR * itemsize * layers


def _is_large(batch: Sequence[_Item], live: LiveModel) -> bool:
    """Whether a forward pass would keep more than it may."""
    model, tokens = live.model, len(batch) * (len(batch[0].ids) - 1)
    width = model.get_input_embeddings().weight.shape[1]
    needed = kept_bytes(tokens, width, len(live.stack.path if live.stack else ()), model.dtype.itemsize)
    if live.device.type == "cuda":
        free = sum(torch.cuda.mem_get_info(device)[0] for device in live.devices or (live.device,))
    else:
        free = psutil.virtual_memory().available
    return needed > SHARE_OF_FREE * free


def _part(live: LiveModel, batch: Sequence[_Item], loss: Loss) -> Tensor:
    """sum_i w_i loss(log p(answer_i | prompt_i)), with a graph: a scalar, in float32 or higher precision."""
    width, kept = len(batch[0].ids) - 1, _kept(batch)
    ids, mask = padded(batch, width)
    logits = live.model(
        input_ids=ids.to(live.device), attention_mask=mask.to(live.device), use_cache=False, logits_to_keep=kept
    ).logits  # [rows, kept, vocabulary], for the last columns
    total: Tensor = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    for row, item in zip(logits, batch, strict=True):
        logs = answer_logs(row, kept - kept_columns(width, item), item, total.dtype)
        total = total + item.weight * loss(logs.sum())
    return total
