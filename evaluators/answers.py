"""Shared by the evaluators of generated answers: prompts from a file of items, greedy decoding, a score per answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import Field, field_validator

from evaluators.base import Evaluator, Graded, Item, Outcome, Split, texts
from evaluators.benchmarks import benchmark_of
from evaluators.item_files import check_template, digest, fill, split_items
from evaluators.lengths import CountedSettings
from evaluators.pictures import PictureSettings, check_pictures, content_of
from evaluators.prompts import Example, Examples, ItemRequests, asked_prompt
from evomerge.inference.media import Media
from evomerge.inference.reading import Reader
from evomerge.inference.requests import Generate, Request, Response
from evomerge.json_lines import Line, read_lines


class AnswersSettings(PictureSettings, CountedSettings):
    """The settings of prompts and of how they are answered. Decoding is greedy by default.

    Attributes:
        file: the items, one JSON object per line.
        held_out_file: the items for confirmation, if they are in a separate file.
        held_out: without such a file, the share of items for confirmation. The split is decided by a hash of the
            prompt or, for items with pictures, of the pictures.
        prompt: the model's input, a template: ``{question}`` stands for that field of the item.
        answer: the right answer, a template like ``prompt``. It is only required for worked examples, unless an
            evaluator grades by it.
        max_new_tokens: the maximum number of tokens of an answer.
        stop: stop strings, which end an answer and are not part of it.
        batch_size: prompts per batch.
        num_beams: the number of beams for beam search; 1 means no beam search.
        repetition_penalty: above 1, tokens that already occur in the prompt or answer become less likely.
    """

    file: Path
    held_out_file: Path | None = None
    held_out: float = Field(default=0.5, gt=0, lt=1)
    prompt: str = "{prompt}"
    answer: str = "{answer}"
    max_new_tokens: int = Field(default=256, ge=1)
    stop: tuple[str, ...] = ()
    batch_size: int = Field(default=16, ge=1)
    num_beams: int = Field(default=1, ge=1, le=64)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)

    @property
    def decoding(self) -> list[object]:
        """The settings that affect an answer besides its prompt, for an evaluator's version."""
        other = (
            [] if self.num_beams == 1 and self.repetition_penalty == 1 else [self.num_beams, self.repetition_penalty]
        )
        return [self.max_new_tokens, self.stop, self.shaping, *other]

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

    def build_and_try(self) -> Evaluator:
        """``build``, and decode every picture once."""
        evaluator = self.build()
        check_pictures(evaluator.splits)
        return evaluator


@dataclass(frozen=True)
class Question:
    """``reference`` is the right answer, empty if none is needed; ``place`` is for messages.

    ``benchmark`` is the public benchmark that it is a test item of; ``line`` is the line it was made from; ``media``
    are its pictures.
    """

    prompt: str
    reference: str
    place: str
    benchmark: str | None
    line: Line
    media: tuple[Media, ...] = ()

    @property
    def hash(self) -> str:
        return digest([self.prompt, self.reference, *content_of(self.media)])

    @property
    def asks(self) -> object:  # so that all questions about a picture are in the same split
        return content_of(self.media) or self.prompt

    @property
    def item(self) -> Item:
        return Item(self.hash, self.prompt, self.reference, self.benchmark, self.media, place=self.place)


class AnswersEvaluator(Evaluator):
    """Prompts that a live model answers; a subclass grades each answer.

    Attributes:
        name: the name of the file.
        version: hash of the grader, of every prompt and reference, and of the settings that affect answers.
        metrics: the one metric of the subclass.
    """

    def __init__(self, settings: AnswersSettings, metric: str, grading: Sequence[str]) -> None:
        """``metric`` is a metric for which higher is better; ``grading`` names the grader and its version."""
        self.name = settings.file.stem
        self.metrics: Mapping[str, bool] = {metric: True}
        self._answering = settings
        self._questions = split_items(
            lambda file: [self._with_pictures(self._question(line), file.parent) for line in read_lines(file)],
            settings.file, settings.held_out_file, settings.held_out,
        )  # fmt: skip
        self.splits = {split: [question.item for question in questions] for split, questions in self._questions.items()}
        self._requests = ItemRequests(self._make)
        hashes = {split: [item.id for item in items] for split, items in self.splits.items()}
        self._examples = Examples(settings.num_fewshot, self._worked(), self.name)
        self.version = digest([*grading, hashes, settings.decoding, [example.answer for example in self._examples.all]])

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Request]:
        """The items' prompts."""
        return self._requests(reader, split, indices)

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """One grade per answer."""
        answers = dict(zip(indices, texts(responses), strict=True))
        grades = self._grade([(self._questions[split][index], answer) for index, answer in answers.items()])
        values = np.array(grades, dtype=np.float32)
        return Graded(dict.fromkeys(self.metrics, values), answers)

    def _make(self, reader: Reader, split: Split, index: int) -> list[Request]:
        item, how = self._questions[split][index], self._answering
        examples = self._examples.of(item.hash)
        prompt = asked_prompt(reader, how, item.prompt, how.max_new_tokens, item.place, examples, item.media)
        return [Generate(prompt, how.max_new_tokens, how.stop, how.batch_size, how.num_beams, how.repetition_penalty)]

    def _with_pictures(self, question: Question, folder: Path) -> Question:
        return replace(question, media=self._answering.pictures(question.line, question.prompt, folder))

    def _question(self, line: Line) -> Question:
        """The item for a line of the file; it has no reference unless a subclass adds one."""
        return Question(fill("prompt", self._answering.prompt, line), "", line.place, benchmark_of(line.fields), line)

    def _worked(self) -> list[Example]:
        """The items available as worked examples, with their answers; empty if none are wanted."""
        first = self._questions["search"][: self._answering.num_fewshot + 1] if self._answering.num_fewshot else []
        return [Example(q.prompt, fill("answer", self._answering.answer, q.line), q.hash, q.media) for q in first]

    @abstractmethod
    def _grade(self, answered: Sequence[tuple[Question, str]]) -> Sequence[float]:
        """The score of each answer."""
