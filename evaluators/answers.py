"""What the evaluators of generated answers share: prompts from a file of items, greedy answers, a score for each."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from evaluators.base import Split
from evaluators.benchmarks import benchmark_of, count
from evaluators.item_files import Line, check_template, digest, fill, read_lines, split_items
from evaluators.prompts import Asked, Example, Examples, FewshotSettings, Reader, asked_prompt

if TYPE_CHECKING:
    import torch

    from evomerge.checkpoints.live import LiveModel


class AnswersSettings(FewshotSettings):
    """What the search file says of prompts and of how they are answered. Answers are greedy.

    Attributes:
        file: the items, a JSON object on each line.
        held_out_file: items to confirm on, where they are apart.
        held_out: without such a file, the share of items to confirm on. A hash of the prompt decides of each.
        prompt: what the model is given, a template: ``{question}`` stands for that field of the item.
        answer: the right answer, a template as ``prompt`` is. Only worked examples need one, unless an evaluator grades
            by it.
        max_new_tokens: most tokens of an answer.
        stop: texts that end an answer; they are no part of it.
        batch_size: prompts at once.
    """

    file: Path
    held_out_file: Path | None = None
    held_out: float = Field(default=0.5, gt=0, lt=1)
    prompt: str = "{prompt}"
    answer: str = "{answer}"
    max_new_tokens: int = Field(default=256, ge=1)
    stop: tuple[str, ...] = ()
    batch_size: int = Field(default=16, ge=1)

    @field_validator("prompt", "answer")
    @classmethod
    def _is_a_template(cls, text: str) -> str:
        return check_template(text)

    @field_validator("stop")
    @classmethod
    def _stops(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if "" in texts:
            raise ValueError("an empty text would end every answer at once")
        return texts


@dataclass(frozen=True)
class Question:
    """``reference`` is the right answer, empty where none is needed; ``place`` is for people.

    ``benchmark`` has it as a test item; ``line`` is what it was made of.
    """

    prompt: str
    reference: str
    place: str
    benchmark: str | None
    line: Line

    @property
    def hash(self) -> str:
        return digest([self.prompt, self.reference])

    @property
    def asks(self) -> str:
        return self.prompt


class AnswersEvaluator(ABC):
    """Prompts that a live model answers; a subclass grades each answer.

    Attributes:
        name: that of the file.
        version: hash of what grades, of every prompt and reference, and of the settings that shape answers.
        metrics: the one metric of the subclass.
    """

    def __init__(self, settings: AnswersSettings, metric: str, grading: Sequence[str]) -> None:
        """``metric`` is of what is better higher; ``grading`` names what grades, with its version."""
        self.name = settings.file.stem
        self.metrics: Mapping[str, bool] = {metric: True}
        self.measured: frozenset[str] = frozenset()
        self.seconds: Mapping[str, float] = {}
        self.answers: Mapping[int, str] = {}
        self._answering = settings
        self._items = split_items(
            lambda file: [self._question(line) for line in read_lines(file)],
            settings.file, settings.held_out_file, settings.held_out,
        )  # fmt: skip
        self._hashes = {split: [item.hash for item in items] for split, items in self._items.items()}
        self._examples = Examples(settings.num_fewshot, self._worked(), self.name)
        shaping = [settings.max_new_tokens, settings.stop, settings.shaping]
        self.version = digest([*grading, self._hashes, shaping, [example.answer for example in self._examples.all]])

    def items(self, split: Split) -> Sequence[str]:
        """A hash of each item's prompt and reference, in the order of the file."""
        return self._hashes[split]

    def texts(self, split: Split) -> list[tuple[str, str]]:
        """Each item's prompt and reference."""
        return [(item.prompt, item.reference) for item in self._items[split]]

    def asked(self, reader: Reader, split: Split, index: int) -> list[Asked]:
        """The item's prompt."""
        item = self._items[split][index]
        most = self._answering.max_new_tokens
        return [asked_prompt(reader, self._answering, item.prompt, most, item.place, self._examples.of(item.hash))]

    def test_items(self, split: Split) -> dict[str, int]:
        """How many items are a public benchmark's test items."""
        return count(item.benchmark for item in self._items[split])

    def score(self, model: LiveModel, split: Split, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Have the model answer the items at these positions and grade it: float32 [len(indices)] for the metric.

        Raises:
            InputError: the model's context has no room for answers, or it lacks a token of its tokenizer.
        """
        from evaluators.generation import grade_answers

        items, asked = self._items[split], self._answering
        if outside := [index for index in indices if not 0 <= index < len(items)]:
            raise IndexError(f"{self.name} has {len(items)} items in its {split} split; there is no item {outside[0]}")
        reader = Reader.of(model)
        prompts = {index: found for index in indices for found in self.asked(reader, split, index)}
        _, answers, seconds = grade_answers(
            model, prompts, lambda _, answer: answer,
            asked.max_new_tokens, asked.stop, asked.batch_size,
        )  # fmt: skip
        started = time.perf_counter()
        answered = [(items[index], answer) for index, answer in answers.items()]
        grades = dict(zip(answers, self._grade(answered, model.device), strict=True))
        self.answers = answers
        self.seconds = seconds | {"score": time.perf_counter() - started} if grades else {}
        values = np.array([grades[index] for index in indices], dtype=np.float32)
        return dict.fromkeys(self.metrics, values)

    def _question(self, line: Line) -> Question:
        """The item that a line of the file is; one without a reference unless a subclass has it otherwise."""
        return Question(fill("prompt", self._answering.prompt, line), "", line.place, benchmark_of(line.fields), line)

    def _worked(self) -> list[Example]:
        """The items that worked examples may be taken from, with their answers; none where none are wanted."""
        first = self._items["search"][: self._answering.num_fewshot + 1] if self._answering.num_fewshot else []
        return [Example(q.prompt, fill("answer", self._answering.answer, q.line), q.hash) for q in first]

    @abstractmethod
    def _grade(self, answered: Sequence[tuple[Question, str]], device: torch.device) -> Sequence[float]:
        """The score of each answer; ``device`` is the live model's."""
