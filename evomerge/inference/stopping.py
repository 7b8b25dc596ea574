"""Stops each answer of a batch at its own stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class StopAtText(StoppingCriteria):  # type: ignore[misc]
    """Stops each row of a batch at the first of several stop strings.

    lm-eval's own criterion ends a batch only once the same string has ended every row. Rows that end with different
    strings then run to the token limit, and what follows a special token (which decoding omits) becomes part of the
    answer, so that an item's score depends on the other items in the batch.

    Attributes:
        lengths: int64 [rows], tokens of prompt and answer when the row ended; until then the maximum.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt: int, rows: int) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._prompt = prompt
        # As in lm-eval: two more tokens than the string itself, because a model may tokenize it differently.
        self._window = 2 + max(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        self._open = list(range(rows))
        self._done = torch.zeros(rows, dtype=torch.bool)
        self.lengths = torch.full((rows,), torch.iinfo(torch.int64).max)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        answers = input_ids[:, self._prompt :][:, -self._window :].tolist()
        tails = self._tokenizer.batch_decode([answers[row] for row in self._open])
        for row, tail in zip(self._open, tails, strict=True):
            if any(text in tail for text in self._texts):
                self._done[row] = True
                self.lengths[row] = input_ids.shape[1]
        self._open = [row for row in self._open if not self._done[row]]
        return self._done.to(input_ids.device)


_MAX_TAILS = 100_000
"""How many tails are remembered per tokenizer and strings: about 20 MB."""

_Tails = dict[tuple[int, ...], bool]
_tails: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, ...], _Tails]] = WeakKeyDictionary()


class TextEnds:
    """Checks which of several growing answers have reached a stop string.

    A string of n bytes is spelled by at most n tokens, except for tokens without text, so only the last few tokens of
    an answer are decoded at each step, and each such tail only once per tokenizer: answers to the items of a task end
    in similar ways, and so do those of successive candidates.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = [text for text in texts if text]
        # One more token, because a tokenizer may strip a space from the first one that it decodes, and another because
        # that one may begin in the middle of a character.
        self._window = 2 + max((len(text.encode()) for text in self._texts), default=0)
        self._known = _tails.setdefault(tokenizer, {}).setdefault(tuple(self._texts), {})

    def __call__(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each answer has ended; called at every step, with all tokens of each answer so far."""
        if not self._texts:
            return [False] * len(answers)
        tails = [tuple(answer[-self._window :]) for answer in answers]
        if len(self._known) > _MAX_TAILS:
            self._known.clear()
        if new := [tail for tail in dict.fromkeys(tails) if tail not in self._known]:
            for tail, text in zip(new, self._tokenizer.batch_decode([list(tail) for tail in new]), strict=True):
                self._known[tail] = self._says_one(text)
        return [
            # Decoders treat some first tokens differently from later ones, so the whole answer is checked as well.
            self._known[tail] and self._says_one(self._tokenizer.decode(answer))
            for tail, answer in zip(tails, answers, strict=True)
        ]

    def _says_one(self, text: str) -> bool:
        return any(ending in text for ending in self._texts)
