"""How likely a model finds given texts after given prompts: one prefill for a pair, and nothing is decoded.

``evaluators.prompts`` cuts prompts and texts into tokens, and a test holds the numbers equal to lm-eval's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluators.base import Split
from evaluators.prompts import Asked, Reader

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel

_LEAST_STEP = 16
"""Rows are padded to a multiple of so many tokens, and of an eighth of the power of two below their length."""

_LEAST_ROWS = 16
"""The head's matrix multiplies as many rows at least: products of one to three rows round otherwise in float32."""

_LOGITS_BYTES = 1 << 28
"""Most bytes of logits in one forward pass, unless a single item has more."""


@dataclass(frozen=True)
class Likelihood:
    """``log``: log p(answer | prompt), a natural logarithm; the answer has so many tokens, and bytes in UTF-8."""

    log: float
    tokens: int
    size: int


@dataclass(frozen=True)
class _Tokens:
    """A pair as the model sees it: the token ids, of which the last ``scored`` are the answer's, in ``size`` bytes."""

    ids: Sequence[int]
    scored: int
    size: int

    @classmethod
    def of(cls, asked: Asked) -> _Tokens:
        """What has room of a pair: one that is too long loses its beginning."""
        # Spaces at the end of a prompt count as the answer's, as in lm-eval.
        answer = asked.text[len(asked.text.rstrip()) :] + asked.answer
        return cls(asked.ids[asked.lost :], asked.scored, len(answer.encode("utf-8", "surrogatepass")))


class Prefill:
    """The pairs of both splits, ready to be scored by one live model after another.

    Args:
        pairs: those of a split, in order, as a model is given them.
        batch_tokens: most tokens in one forward pass, padding counted, unless a single pair has more.
    """

    def __init__(self, pairs: Callable[[Reader, Split], Sequence[Asked]], batch_tokens: int) -> None:
        self._pairs = pairs
        self._batch_tokens = batch_tokens
        self._model: object = None
        self._tokens: dict[Split, list[_Tokens]] = {}

    def score(self, live: LiveModel, split: Split, indices: Sequence[int]) -> dict[int, Likelihood]:
        """The likelihood of the pairs at these positions of the split, each once.

        Raises:
            InputError: a pair of the split does not fit the model's vocabulary, or its answer the context.
        """
        tokens = self._tokens_of(live, split)
        distinct = list(dict.fromkeys(indices))
        logs = _log_likelihoods(live, [tokens[index] for index in distinct], self._batch_tokens)
        return {i: Likelihood(log, tokens[i].scored, tokens[i].size) for i, log in zip(distinct, logs, strict=True)}

    def _tokens_of(self, live: LiveModel, split: Split) -> list[_Tokens]:
        """The pairs of a split as tokens, made when a model is first seen."""
        if self._model is not live.model:
            self._model, self._tokens = live.model, {}
        if split not in self._tokens:
            self._tokens[split] = [_Tokens.of(asked) for asked in self._pairs(Reader.of(live), split)]
        return self._tokens[split]


def _width(fed: int, context: int | None) -> int:
    """How wide an item of so many tokens is padded, whatever items are beside it; an eighth more at most, from 128 on.

    There is padding but where the context has no room for it: without any, transformers computes without a mask, by
    another kernel, which rounds otherwise.
    """
    step = max(_LEAST_STEP, 1 << max(0, fed.bit_length() - 4))
    width = (fed // step + 1) * step
    return width if context is None else max(fed, min(width, context))


def _batches(items: Sequence[_Tokens], most: int, context: int | None, row_logits: int) -> Iterator[list[int]]:
    """Positions of the items in batches of one width, the widest first: too large a one fails at once.

    Args:
        most: tokens in a batch of several items.
        row_logits: bytes of the logits of a token.
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
            rows, kept = len(batch) + 1, _kept(width, items[position])
            if batch and (rows * width > most or rows * kept * row_logits > _LOGITS_BYTES):
                yield batch
                batch = []
            batch.append(position)
        yield batch


def _kept(width: int, item: _Tokens) -> int:
    """Of how many last columns an item needs the logits, its row padded to ``width``."""
    return width - (len(item.ids) - 1 - item.scored)


def _log_likelihoods(live: LiveModel, items: Sequence[_Tokens], most: int) -> list[float]:
    """log p(answer | prompt) of every item, in order; sums of natural logarithms.

    On a processor an item's number is the same bit for bit whatever items are beside it: its width does not depend on
    them, and a matrix times a row rounds alike among any rows, if only they are not fewer than a few.
    """
    import torch

    found = [0.0] * len(items)
    context = getattr(live.model.config, "max_position_embeddings", None)
    row_logits = live.model.get_input_embeddings().weight.shape[0] * live.model.dtype.itemsize
    for batch in _batches(items, most, context, row_logits):
        width = _width(len(items[batch[0]].ids) - 1, context)
        kept = min(width, max(_LEAST_ROWS, *(_kept(width, items[i]) for i in batch)))
        ids, mask = torch.zeros(2, len(batch), width, dtype=torch.int64)
        for row, i in enumerate(batch):  # padded on the right, where nothing looks back at it
            fed = torch.tensor(items[i].ids[:-1])
            ids[row, : len(fed)], mask[row, : len(fed)] = fed, 1
        sums = []
        with torch.inference_mode():
            logits = live.model(
                input_ids=ids.to(live.device),
                attention_mask=mask.to(live.device),
                use_cache=False,
                logits_to_keep=kept,
            ).logits  # [rows, kept, vocabulary]: of the last columns
            for row, i in zip(logits, batch, strict=True):
                answer = torch.tensor(items[i].ids[-items[i].scored :], device=live.device)
                first = kept - _kept(width, items[i])
                own = row[first : first + len(answer)].float()
                chosen = own.gather(1, answer[:, None]).squeeze(1)
                sums.append((chosen - own.logsumexp(1)).sum(dtype=torch.float64))
        for position, total in zip(batch, torch.stack(sums).tolist(), strict=True):
            found[position] = total
    return found
