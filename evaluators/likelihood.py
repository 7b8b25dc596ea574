"""How likely a model finds the right answers: one prefill for an item, and nothing is decoded.

Whether an answer is right says one bit of an item, and none where all candidates fail or all succeed; its likelihood
moves with every change of the model, so that few items tell candidates apart. It says how well the model would have
written these very answers, not that it would have found them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from evaluators.base import Split
from evaluators.benchmarks import benchmark_of, count
from evaluators.item_files import check_template, digest, fill, read_lines, split_items
from evaluators.prefill import Prefill
from evaluators.prompts import Asked, Example, Examples, FewshotSettings, Reader, asked_pair
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


METRICS = {"log_likelihood": True, "bits_per_byte": False}
"""Each metric, and whether higher is better."""


class LikelihoodSettings(FewshotSettings):
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

    def known_metrics(self) -> Collection[str]:
        return METRICS

    def build(self) -> LikelihoodEvaluator:
        """Read the items and fill the templates.

        Raises:
            InputError: a file or a line that cannot be read, a missing field, an empty answer, an empty split, or an
                item that is in both.
        """
        return LikelihoodEvaluator(self)


@dataclass(frozen=True)
class _Item:
    """A prompt and what may come after it; ``place`` is for people, ``benchmark`` has it as a test item."""

    prompt: str
    answer: str
    place: str
    benchmark: str | None

    @property
    def hash(self) -> str:
        return digest([self.prompt, self.answer])

    @property
    def asks(self) -> str:  # a text without a prompt is told by itself
        return self.prompt or self.answer


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
        self.metrics: Mapping[str, bool] = METRICS
        self.measured: frozenset[str] = frozenset()
        self.seconds: Mapping[str, float] = {}
        self.answers: Mapping[int, str] = {}
        self._items = split_items(
            lambda file: list(_read(settings, file)), settings.file, settings.held_out_file, settings.held_out
        )
        self._hashes = {split: [item.hash for item in items] for split, items in self._items.items()}
        self._settings = settings
        self._examples = Examples(
            settings.num_fewshot,
            [Example(item.prompt, item.answer, item.hash) for item in self._items["search"]],
            self.name,
        )
        self.version = digest(["likelihood 1", self._hashes, settings.shaping])
        self._prefill = Prefill(self._pairs, settings.batch_tokens)

    def items(self, split: Split) -> Sequence[str]:
        """A hash of each item's prompt and answer, in the order of the file."""
        return self._hashes[split]

    def texts(self, split: Split) -> list[tuple[str, str]]:
        """Each item's prompt and answer."""
        return [(item.prompt, item.answer) for item in self._items[split]]

    def asked(self, reader: Reader, split: Split, index: int) -> list[Asked]:
        """The item's prompt with its answer."""
        item = self._items[split][index]
        examples = self._examples.of(item.hash)
        return [asked_pair(reader, self._settings, item.prompt, item.answer, item.place, examples)]

    def _pairs(self, reader: Reader, split: Split) -> list[Asked]:
        return [pair for index in range(len(self._items[split])) for pair in self.asked(reader, split, index)]

    def test_items(self, split: Split) -> dict[str, int]:
        """How many items are a public benchmark's test items."""
        return count(item.benchmark for item in self._items[split])

    def score(self, model: LiveModel, split: Split, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Score the items at these positions of the split: float32 [len(indices)] for each metric.

        Raises:
            InputError: an item does not fit the model's vocabulary, or its answer the context.
        """
        count = len(self._items[split])
        if outside := [index for index in indices if not 0 <= index < count]:
            raise IndexError(f"{self.name} has {count} items in its {split} split; there is no item {outside[0]}")
        started = time.perf_counter()
        found = self._prefill.score(model, split, indices)
        self.seconds = {"generate": time.perf_counter() - started}
        per_token = [found[index].log / found[index].tokens for index in indices]
        bits = [-found[index].log / math.log(2) / found[index].size for index in indices]
        return {"log_likelihood": np.array(per_token, np.float32), "bits_per_byte": np.array(bits, np.float32)}


# ---- items -----------------------------------------------------------------------------------------------------------


def _read(settings: LikelihoodSettings, file: Path) -> Iterator[_Item]:
    for line in read_lines(file):
        prompt, answer = fill("prompt", settings.prompt, line), fill("answer", settings.answer, line)
        if not answer.strip():
            raise InputError(line.place, "has an empty answer", "Leave the item out.")
        yield _Item(prompt, answer, line.place, benchmark_of(line.fields))
