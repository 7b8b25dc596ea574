"""How likely a model finds given texts after given prompts: one prefill for a pair, and nothing is decoded.

Prompts and texts are cut into tokens as lm-eval does it, and a test holds the numbers equal to its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluators.base import Split
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


@dataclass(frozen=True)
class Pair:
    """A prompt and what may come after it; ``place`` says where it was read, for people."""

    prompt: str
    answer: str
    place: str


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


class Prefill:
    """The pairs of both splits, ready to be scored by one live model after another.

    Args:
        pairs: of each split, in order.
        batch_tokens: most tokens in one forward pass, padding counted, unless a single pair has more.
    """

    def __init__(self, pairs: Mapping[Split, Sequence[Pair]], batch_tokens: int) -> None:
        self._pairs = pairs
        self._batch_tokens = batch_tokens
        self._model: object = None
        self._tokens: dict[Split, list[_Tokens]] = {}

    def score(self, live: LiveModel, split: Split, indices: Sequence[int]) -> dict[int, Likelihood]:
        """The likelihood of the pairs at these positions of the split, each once.

        Raises:
            InputError: a pair of the split does not fit the model's context, vocabulary or tokens.
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
            found = [_encode(live.tokenizer, pair) for pair in self._pairs[split]]
            for pair, tokens in zip(self._pairs[split], found, strict=True):
                _check_fits(live, pair, tokens)
            self._tokens[split] = found
        return self._tokens[split]


def _encode(tokenizer: Any, pair: Pair) -> _Tokens:
    """As lm-eval: spaces at the end of a prompt go to the answer, whose tokens are those that the whole has more.

    lm_eval.api.model.TemplateLM._encode_pair. A token that reaches over the border would count as the prompt's.
    """
    prompt = pair.prompt.rstrip()
    answer = pair.prompt[len(prompt) :] + pair.answer
    if prompt:
        before = tokenizer.encode(prompt)
        after = tokenizer.encode(prompt + answer)[len(before) :]
    else:  # something must come before the first token
        before = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
        after = tokenizer.encode(answer, add_special_tokens=False)
    if not after:
        raise InputError(
            pair.place, f"its answer {pair.answer!r} adds no token to those of its prompt", "Leave it out."
        )
    return _Tokens([*before, *after], len(after), len(answer.encode("utf-8", "surrogatepass")))


def _check_fits(live: LiveModel, pair: Pair, tokens: _Tokens) -> None:
    context = getattr(live.model.config, "max_position_embeddings", None)
    length = len(tokens.ids) - 1  # nothing is predicted after the last token, so it is not fed in
    if context is not None and length > context:
        problem = f"is {length} tokens long, prompt and answer; the model's context is {context}"
        raise InputError(pair.place, problem, "Shorten the item or leave it out.")
    rows = live.model.get_input_embeddings().weight.shape[0]
    if (highest := max(tokens.ids)) >= rows:
        problem = f"the tokenizer gives token {highest}, and the model has {rows} embeddings"
        raise InputError(pair.place, problem, "Take the tokenizer of a source that has all of its tokens.")


def _batches(items: Sequence[_Tokens], most: int) -> Iterator[list[int]]:
    """Positions of the items in batches of up to ``most`` tokens, the longest first: too large a one fails at once."""
    batch: list[int] = []
    for position in sorted(range(len(items)), key=lambda i: (-len(items[i].ids), items[i].ids)):
        if batch and len(items[batch[0]].ids) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def _log_likelihoods(live: LiveModel, items: Sequence[_Tokens], most: int) -> list[float]:
    """log p(answer | prompt) of every item, in order; sums of natural logarithms."""
    import torch

    found = [0.0] * len(items)
    for batch in _batches(items, most):
        rows = [torch.tensor(items[i].ids, device=live.device) for i in batch]
        starts = [len(items[i].ids) - items[i].scored for i in batch]  # of the answers
        first = min(starts)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, where nothing looks back at it
        lengths = torch.tensor([len(row) for row in rows], device=live.device)
        mask = torch.arange(ids.shape[1], device=live.device) < lengths[:, None]
        sums = []
        with torch.inference_mode():
            logits = live.model(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1].long(),
                use_cache=False,
                logits_to_keep=ids.shape[1] - first,
            ).logits  # [rows, width - first, vocabulary]: of the tokens from ``first`` on
            for row, tokens, start in zip(logits, rows, starts, strict=True):
                own = row[start - first : len(tokens) - first].float()
                chosen = own.gather(1, tokens[start:, None]).squeeze(1)
                sums.append((chosen - own.logsumexp(1)).sum(dtype=torch.float64))
        for position, total in zip(batch, torch.stack(sums).tolist(), strict=True):
            found[position] = total
    return found
