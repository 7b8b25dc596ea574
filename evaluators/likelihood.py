"""The likelihood of right answers: one prefill per item, without decoding.

Whether an answer is right provides one bit per item, and none if all candidates fail or all succeed. Its likelihood
changes with every change of the model, so a few items suffice to tell candidates apart. It says how likely the model is
to write this particular answer, not whether it would find it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from evaluators.base import Evaluator, Graded, Item, Outcome, Split, likelihoods
from evaluators.benchmarks import benchmark_of
from evaluators.item_files import check_template, digest, fill, split_items
from evaluators.prompts import Example, Examples, FewshotSettings, ItemRequests, asked_pair
from evomerge.errors import InputError
from evomerge.inference.reading import Reader
from evomerge.inference.requests import Likelihood, Request, Response
from evomerge.json_lines import read_lines

METRICS = {"log_likelihood": True, "bits_per_byte": False}
"""Each metric, and whether higher is better."""


class LikelihoodSettings(FewshotSettings):
    """The settings of prompts and answers.

    ``prompt`` and ``answer`` are templates: ``{question}`` stands for that field of the item, ``{{`` for a brace.

    Attributes:
        file: the items, one JSON object per line.
        held_out_file: the items for confirmation, if they are in a separate file.
        held_out: without such a file, the share of items for confirmation. The split is decided by a hash of the
            prompt.
        prompt: the model's input; it may be empty.
        answer: the answer to score; a space between prompt and answer belongs to it.
        batch_tokens: the maximum number of tokens in one forward pass, including padding, unless one item has more.
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
                item that is in both splits.
        """
        return LikelihoodEvaluator(self)

    def build_whole(self) -> LikelihoodEvaluator:
        """The same with every item of ``file`` in the search split, for uses without confirmation.

        Raises:
            InputError: as for ``build``; or there is no item.
        """
        return LikelihoodEvaluator(self, whole=True)


@dataclass(frozen=True)
class _Pair:
    """A prompt and its answer; ``place`` is for messages, ``benchmark`` is the public benchmark that it is a test item
    of, ``group`` the kind of item that it says it is."""

    prompt: str
    answer: str
    place: str
    benchmark: str | None
    group: str = ""

    @property
    def hash(self) -> str:
        return digest([self.prompt, self.answer])

    @property
    def asks(self) -> str:  # a text without a prompt is identified by its answer
        return self.prompt or self.answer


class LikelihoodEvaluator(Evaluator):
    """Prompts with their answers, ready to be scored with one live model after another.

    Attributes:
        name: the name of the file.
        version: hash of every prompt and answer.
        metrics: ``log_likelihood``, the mean over the answer's tokens of log p(token | all before it), natural
            logarithm; ``bits_per_byte``, -log2 p(answer | prompt) divided by the answer's UTF-8 bytes, which can be
            compared between models with different tokenizers.
    """

    def __init__(self, settings: LikelihoodSettings, *, whole: bool = False) -> None:
        """``whole`` leaves no item for the held-out split."""
        self.name = settings.file.stem
        self.metrics: Mapping[str, bool] = METRICS
        self._pairs: Mapping[Split, Sequence[_Pair]] = (
            {"search": _all_of(settings), "held_out": []}
            if whole
            else split_items(
                lambda file: list(_read(settings, file)), settings.file, settings.held_out_file, settings.held_out
            )
        )
        self.splits = {
            split: [
                Item(pair.hash, pair.prompt, pair.answer, pair.benchmark, place=pair.place, group=pair.group)
                for pair in pairs
            ]
            for split, pairs in self._pairs.items()
        }
        hashes = {split: [item.id for item in items] for split, items in self.splits.items()}
        self._settings = settings
        self._examples = Examples(
            settings.num_fewshot,
            [Example(pair.prompt, pair.answer, pair.hash) for pair in self._pairs["search"]],
            self.name,
        )
        self.version = digest(["likelihood 1", hashes, settings.shaping])
        self._requests = ItemRequests(self._make)

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Request]:
        """The items' prompts, each with its answer."""
        return self._requests(reader, split, indices)

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """Both metrics of each answer."""
        answers = likelihoods(responses)
        per_token = [answer.log / answer.tokens for answer in answers]
        bits = [-answer.log / math.log(2) / answer.size for answer in answers]
        return Graded({"log_likelihood": np.array(per_token, np.float32), "bits_per_byte": np.array(bits, np.float32)})

    def _make(self, reader: Reader, split: Split, index: int) -> list[Request]:
        pair = self._pairs[split][index]
        examples = self._examples.of(pair.hash)
        prompt = asked_pair(reader, self._settings, pair.prompt, pair.answer, pair.place, examples)
        return [Likelihood(prompt, self._settings.batch_tokens)]


# ---- items -----------------------------------------------------------------------------------------------------------


def _all_of(settings: LikelihoodSettings) -> list[_Pair]:
    """Every item of the file. Raises InputError: there is none."""
    if not (pairs := list(_read(settings, settings.file))):
        raise InputError(str(settings.file), "holds no items")
    return pairs


def _read(settings: LikelihoodSettings, file: Path) -> Iterator[_Pair]:
    for line in read_lines(file):
        prompt, answer = fill("prompt", settings.prompt, line), fill("answer", settings.answer, line)
        if not answer.strip():
            raise InputError(line.place, "has an empty answer", "Leave the item out.")
        yield _Pair(prompt, answer, line.place, benchmark_of(line.fields), str(line.fields.get("group", "")))
