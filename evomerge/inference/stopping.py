"""Ending the answers of a batch, each at its own stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class StopAtText(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch at the first of some texts.

    lm-eval's own criterion ends a batch only when one and the same text has ended every row. Rows that end by different
    texts then run to the token limit, and what follows a special token (which decoding leaves out) becomes part of the
    answer, so that an item's score depends on its neighbours in the batch.

    Attributes:
        lengths: int64 [rows], tokens of prompt and answer when the row ended; the most there can be until it does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt: int, rows: int) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._prompt = prompt
        # As lm-eval: two tokens more than the text's own, because a model may spell it with others.
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
"""Remembered of a tokenizer and its texts: some 20 MB."""

_Tails = dict[tuple[int, ...], bool]
_tails: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, ...], _Tails]] = WeakKeyDictionary()


class TextEnds:
    """Tells of growing answers which have come to the first of some texts.

    A text of n bytes is spelled by n tokens at most, but for tokens that say nothing, so only the last few tokens of an
    answer are decoded at each step, and each such tail once in a tokenizer's life: answers to the items of a task end
    alike, and so do those of one candidate after another.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = [text for text in texts if text]
        # One token more, because a tokenizer may take a space from the first one that it decodes; and one that began
        # in the midst of a character.
        self._window = 2 + max((len(text.encode()) for text in self._texts), default=0)
        self._known = _tails.setdefault(tokenizer, {}).setdefault(tuple(self._texts), {})

    def __call__(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each answer ends; the answers of one step, all their tokens so far."""
        if not self._texts:
            return [False] * len(answers)
        tails = [tuple(answer[-self._window :]) for answer in answers]
        if len(self._known) > _MAX_TAILS:
            self._known.clear()
        if new := [tail for tail in dict.fromkeys(tails) if tail not in self._known]:
            for tail, text in zip(new, self._tokenizer.batch_decode([list(tail) for tail in new]), strict=True):
                self._known[tail] = self._says_one(text)
        return [
            # Decoders write some first tokens otherwise than later ones, so the whole answer has the last word.
            self._known[tail] and self._says_one(self._tokenizer.decode(answer))
            for tail, answer in zip(tails, answers, strict=True)
        ]

    def _says_one(self, text: str) -> bool:
        return any(ending in text for ending in self._texts)
