"""How likely a model finds the right answers: one prefill for an item, and nothing is decoded.

Whether an answer is right says one bit of an item, and none where all candidates fail or all succeed; its likelihood
moves with every change of the model, so that few items tell candidates apart. It says how well the model would have
written these very answers, not that it would have found them.

Prompts and answers are cut into tokens as lm-eval does it, and a test holds the numbers equal to its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from evaluators.base import EvaluatorSettings, Split
from evaluators.item_files import check_template, digest, fill, read_lines, split_items
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


class LikelihoodSettings(EvaluatorSettings):
    """What the search file says of prompts and answers.

    ``prompt`` and ``answer`` are templates: ``{question}`` stands for that field of the item, ``{{`` for a brace.

    Attributes:
        file: the items, a JSON object on each line.
        held_out_file: items to confirm on, where they are apart.
        held_out: without such a file, the share of items to confirm on. A hash of the prompt decides of each.
        prompt: what the model is given; it may be empty.
        answer: what it should say. It is scored, and a space between prompt and answer belongs to it.
        batch_tokens: most tokens in one forward pass, padding counted, unless a single item has more.
    """

    kind: Literal["likelihood"] = "likelihood"
    file: Path
    held_out_file: Path | None = None
    held_out: float = Field(default=0.5, gt=0, lt=1)
    prompt: str = "{prompt}"
    answer: str = "{answer}"
    batch_tokens: int = Field(default=8192, ge=1)

    @field_validator("prompt", "answer")
    @classmethod
    def _is_a_template(cls, text: str) -> str:
        return check_template(text)

    def build(self) -> LikelihoodEvaluator:
        """Read the items and fill the templates.

        Raises:
            InputError: a file or a line that cannot be read, a missing field, an empty answer, an empty split, or an
                item that is in both.
        """
        return LikelihoodEvaluator(self)


@dataclass(frozen=True)
class _Item:
    """``place`` says where it was read, for people."""

    prompt: str
    answer: str
    place: str

    @property
    def hash(self) -> str:
        return digest([self.prompt, self.answer])

    @property
    def asks(self) -> str:  # a text without a prompt is told by itself
        return self.prompt or self.answer


@dataclass(frozen=True)
class _Tokens:
    """An item as the model sees it: the token ids, of which the last ``scored`` are the answer's, in ``size`` bytes."""

    ids: Sequence[int]
    scored: int
    size: int


class LikelihoodEvaluator:
    """Prompts with their answers, ready to be scored by one live model after another.

    Attributes:
        name: that of the file.
        version: hash of every prompt and answer.
        metrics: ``log_likelihood``, the mean over the answer's tokens of log p(token | all before it), natural
            logarithm; ``bits_per_byte``, -log2 p(answer | prompt) by the bytes of the answer in UTF-8, which can be
            compared between models with other tokens.
    """

    def __init__(self, settings: LikelihoodSettings) -> None:
        self.name = settings.file.stem
        self.metrics: Mapping[str, bool] = {"log_likelihood": True, "bits_per_byte": False}
        self.measured: frozenset[str] = frozenset()
        self.seconds: Mapping[str, float] = {}
        self._batch_tokens = settings.batch_tokens
        self._items = split_items(
            lambda file: list(_read(settings, file)), settings.file, settings.held_out_file, settings.held_out
        )
        self._hashes = {split: [item.hash for item in items] for split, items in self._items.items()}
        self.version = digest(["likelihood 1", self._hashes])
        self._model: object = None
        self._tokens: dict[Split, list[_Tokens]] = {}

    def items(self, split: Split) -> Sequence[str]:
        """A hash of each item's prompt and answer, in the order of the file."""
        return self._hashes[split]

    def score(self, model: LiveModel, split: Split, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Score the items at these positions of the split: float32 [len(indices)] for each metric.

        Raises:
            InputError: an item does not fit the model's context, vocabulary or tokens.
        """
        count = len(self._items[split])
        if outside := [index for index in indices if not 0 <= index < count]:
            raise IndexError(f"{self.name} has {count} items in its {split} split; there is no item {outside[0]}")
        tokens = self._tokens_of(model, split)
        started = time.perf_counter()
        distinct = list(dict.fromkeys(indices))
        sums = _log_likelihoods(model, [tokens[index] for index in distinct], self._batch_tokens)
        found = dict(zip(distinct, sums, strict=True))
        self.seconds = {"generate": time.perf_counter() - started}
        per_token = [found[index] / tokens[index].scored for index in indices]
        bits = [-found[index] / math.log(2) / tokens[index].size for index in indices]
        return {"log_likelihood": np.array(per_token, np.float32), "bits_per_byte": np.array(bits, np.float32)}

    def _tokens_of(self, live: LiveModel, split: Split) -> list[_Tokens]:
        """The items of a split as tokens, made when a model is first seen."""
        if self._model is not live.model:
            self._model, self._tokens = live.model, {}
        if split not in self._tokens:
            found = [_encode(live.tokenizer, item) for item in self._items[split]]
            for item, tokens in zip(self._items[split], found, strict=True):
                _check_fits(live, item, tokens)
            self._tokens[split] = found
        return self._tokens[split]


# ---- items -----------------------------------------------------------------------------------------------------------


def _read(settings: LikelihoodSettings, file: Path) -> Iterator[_Item]:
    for line in read_lines(file):
        prompt, answer = fill("prompt", settings.prompt, line), fill("answer", settings.answer, line)
        if not answer.strip():
            raise InputError(line.place, "has an empty answer", "Leave the item out.")
        yield _Item(prompt, answer, line.place)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def _encode(tokenizer: Any, item: _Item) -> _Tokens:
    """As lm-eval: spaces at the end of a prompt go to the answer, whose tokens are those that the whole has more.

    lm_eval.api.model.TemplateLM._encode_pair. A token that reaches over the border would count as the prompt's.
    """
    prompt = item.prompt.rstrip()
    answer = item.prompt[len(prompt) :] + item.answer
    if prompt:
        before = tokenizer.encode(prompt)
        after = tokenizer.encode(prompt + answer)[len(before) :]
    else:  # something must come before the first token
        before = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
        after = tokenizer.encode(answer, add_special_tokens=False)
    if not after:
        raise InputError(
            item.place, f"its answer {item.answer!r} adds no token to those of its prompt", "Leave it out."
        )
    return _Tokens([*before, *after], len(after), len(answer.encode("utf-8", "surrogatepass")))


def _check_fits(live: LiveModel, item: _Item, tokens: _Tokens) -> None:
    context = getattr(live.model.config, "max_position_embeddings", None)
    length = len(tokens.ids) - 1  # nothing is predicted after the last token, so it is not fed in
    if context is not None and length > context:
        problem = f"is {length} tokens long, prompt and answer; the model's context is {context}"
        raise InputError(item.place, problem, "Shorten the item or leave it out.")
    rows = live.model.get_input_embeddings().weight.shape[0]
    if (highest := max(tokens.ids)) >= rows:
        problem = f"the tokenizer gives token {highest}, and the model has {rows} embeddings"
        raise InputError(item.place, problem, "Take the tokenizer of a source that has all of its tokens.")


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
