"""A smooth proxy of how good a model is, to be differentiated: how unlikely right answers are, the mean over items.

Of an item whose right answer has the chance p it is log(1 - log p): as -log p for answers that are nearly certain, and
its logarithm for answers that are far from likely. The mean of -log p itself is ruled by the items that are furthest
from right, whose scores do not change; those count here by as much as they change in proportion.
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
from evomerge.inference.answering import answered
from evomerge.inference.prefill import Tokens, answer_logs, kept_columns, padded
from evomerge.inference.reading import Prompt

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel

MAX_TOKENS = 2048
"""In one forward and backward pass, unless a single item has more: of many more, what a pass costs beside its tokens
(a look at every weight of the sources) no longer counts."""

_LOGITS_BYTES = 1 << 27
"""Most bytes of logits in one pass, unless a single item has more; what follows from them takes several times that."""

SHARE_OF_FREE = 0.25
"""Of the free memory: what may be kept of a forward pass for the backward pass. Where a pass would need more, each
layer keeps what it was given alone and is computed again, which costs another forward pass."""

_KEPT_FACTOR = 34
"""About how many numbers of the width of the hidden state a layer keeps for each token (Korthikanti et al., "Reducing
activation recomputation in large transformer models", arXiv 2205.05198, section 4, in numbers of 16 bits)."""

Loss = Callable[[Tensor], Tensor]
"""(log p of a whole answer, a natural logarithm) -> what it adds to the loss: scalars, of which the loss is a mean."""


def saturating(log: Tensor) -> Tensor:
    """log(1 - log p): the proxy."""
    return torch.log1p(-log)


@dataclass(frozen=True)
class _Item(Tokens):
    """An item as the model sees it, its weight in the mean, and which of the prompts it is."""

    weight: float
    number: int


def differentiate_proxy(
    live: LiveModel, prompts: Sequence[Prompt], weights: Sequence[float], listening: Listening
) -> float:
    """Compute the proxy, and run backward passes through the model.

    Args:
        as of ``loss_parts``; each pass adds its share to the gradient.

    Returns:
        The proxy, of whole answers; logarithms are natural ones.
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
    """A loss of right answers, in parts that sum to it: each to be run backward before the next is asked for.

    Items are scored as ``log_likelihoods`` scores them, but for rounding: they are batched to be few passes.

    Args:
        prompts: each with its answer.
        weights: how much each counts; the loss is their weighted mean.
        listening: open around the forward pass of a part, and until the next is asked for.
        loss: of one answer.
        told: before a part, which of the prompts its rows are of, by position.

    Yields:
        scalars in float32 at least, with a graph.
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
        answered(len(batch))


def _batches(items: Sequence[_Item], live: LiveModel) -> Iterator[list[_Item]]:
    """The items in batches of like lengths, the longest first: too large a one fails at once."""
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
    """Of how many last columns logits are needed, rows being padded on the right to the width of the first."""
    width = len(batch[0].ids) - 1
    return max(kept_columns(width, item) for item in batch)


def kept_bytes(tokens: int, width: int, layers: int, itemsize: int) -> int:
    """About how many bytes layers keep of a forward pass of so many tokens, with hidden states of that width."""
    return tokens * width * _KEPT_FACTOR * itemsize * layers


def _is_large(batch: Sequence[_Item], live: LiveModel) -> bool:
    """Whether what a forward pass would keep is more than there should be."""
    model, tokens = live.model, len(batch) * (len(batch[0].ids) - 1)
    width = model.get_input_embeddings().weight.shape[1]
    needed = kept_bytes(tokens, width, len(live.stack.path if live.stack else ()), model.dtype.itemsize)
    if live.device.type == "cuda":
        free = sum(torch.cuda.mem_get_info(device)[0] for device in live.devices or (live.device,))
    else:
        free = psutil.virtual_memory().available
    return needed > SHARE_OF_FREE * free


def _part(live: LiveModel, batch: Sequence[_Item], loss: Loss) -> Tensor:
    """sum_i w_i loss(log p(answer_i | prompt_i)), with a graph: a scalar, in float32 at least."""
    width, kept = len(batch[0].ids) - 1, _kept(batch)
    ids, mask = padded(batch, width)
    logits = live.model(
        input_ids=ids.to(live.device), attention_mask=mask.to(live.device), use_cache=False, logits_to_keep=kept
    ).logits  # [rows, kept, vocabulary]: of the last columns
    total: Tensor = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    for row, item in zip(logits, batch, strict=True):
        logs = answer_logs(row, kept - kept_columns(width, item), item, total.dtype)
        total = total + item.weight * loss(logs.sum())
    return total
