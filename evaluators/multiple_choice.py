"""Multiple-choice questions: which choice a model finds most likely, and by how much. Nothing is decoded.

The numbers equal lm-eval's for such tasks, which a test verifies. ``margin`` is added because it changes with every
change of the model, even while the chosen answer stays the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from evaluators.base import Evaluator, Graded, Item, Outcome, Split, likelihoods
from evaluators.benchmarks import benchmark_of
from evaluators.item_files import check_template, digest, fill, split_items
from evaluators.pictures import PictureSettings, check_pictures, content_of
from evaluators.prompts import Example, Examples, ItemRequests, asked_pair
from evomerge.errors import InputError
from evomerge.inference.media import Media
from evomerge.inference.reading import Reader
from evomerge.inference.requests import Likelihood, Request, Response
from evomerge.json_lines import Line, read_lines

METRICS = {"acc": True, "acc_norm": True, "acc_bytes": True, "margin": True}
"""Each metric, and whether higher is better."""


class MultipleChoiceSettings(PictureSettings):
    """The settings of questions and choices.

    An item has ``choices``, a list of texts, and ``answer``: the text of the right one, or its index from 0.

    Attributes:
        file: the items, one JSON object per line.
        held_out_file: the items for confirmation, if they are in a separate file.
        held_out: without such a file, the share of items for confirmation. The split is decided by a hash of the
            prompt or, for items with pictures, of the pictures.
        prompt: the model's input, a template: ``{question}`` stands for that field of the item.
        choice: how a choice is written after it, a template with ``{choice}``.
        batch_tokens: the maximum number of tokens in one forward pass, including padding, unless one choice has more.
    """

    kind: Literal["multiple_choice"] = "multiple_choice"
    file: Path
    held_out_file: Path | None = None
    held_out: float = Field(default=0.5, gt=0, lt=1)
    prompt: str = "{question}"
    choice: str = " {choice}"
    batch_tokens: int = Field(default=8192, ge=1)

    @field_validator("prompt", "choice")
    @classmethod
    def _is_a_template(cls, text: str) -> str:
        return check_template(text)

    @field_validator("choice")
    @classmethod
    def _has_the_choice(cls, text: str) -> str:
        if "{choice}" not in text:
            raise ValueError("it has no {choice}")
        return text

    def known_metrics(self) -> Collection[str]:
        return METRICS

    def build(self) -> MultipleChoiceEvaluator:
        """Read the items and fill the templates.

        Raises:
            InputError: a file or a line that cannot be read, a missing field, an item without several choices or whose
                answer is not one of them, an empty split, or an item that is in both splits.
        """
        return MultipleChoiceEvaluator(self)

    def build_and_try(self) -> MultipleChoiceEvaluator:
        """``build``, and decode every picture once."""
        evaluator = self.build()
        check_pictures(evaluator.splits)
        return evaluator


@dataclass(frozen=True)
class _Question:
    """``written`` are the choices as they follow the prompt; ``right`` is the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    written: tuple[str, ...]
    right: int
    place: str
    benchmark: str | None
    media: tuple[Media, ...] = ()

    @property
    def hash(self) -> str:
        return digest([self.prompt, self.written, self.right, *content_of(self.media)])

    @property
    def asks(self) -> object:
        return content_of(self.media) or self.prompt

    @property
    def item(self) -> Item:
        return Item(self.hash, self.prompt, self.choices[self.right], self.benchmark, self.media, place=self.place)


class MultipleChoiceEvaluator(Evaluator):
    """Questions with choices, ready to be scored with one live model after another.

    Attributes:
        name: the name of the file.
        version: hash of every prompt, choice and right answer.
        metrics: given log p of each choice after the prompt: ``acc``, 1 if that of the right choice is the highest,
            else 0; ``acc_norm``, the same divided by the choice's characters, and ``acc_bytes``, by its UTF-8 bytes
            (named as in lm-eval); ``margin``, the right choice's minus the highest of the others, natural logarithm.
    """

    def __init__(self, settings: MultipleChoiceSettings) -> None:
        self.name = settings.file.stem
        self.metrics: Mapping[str, bool] = METRICS
        self._questions = split_items(
            lambda file: list(_read(settings, file)), settings.file, settings.held_out_file, settings.held_out
        )
        self.splits = {split: [question.item for question in questions] for split, questions in self._questions.items()}
        hashes = {split: [item.id for item in items] for split, items in self.splits.items()}
        self._settings = settings
        self._examples = Examples(
            settings.num_fewshot,
            [Example(q.prompt, q.written[q.right], q.hash, q.media) for q in self._questions["search"]],
            self.name,
        )
        self.version = digest(["multiple_choice 1", hashes, settings.shaping])
        self._requests = ItemRequests(self._make)

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Request]:
        """The items' prompts, each with each of its choices."""
        return self._requests(reader, split, indices)

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """All metrics of each item, and the most likely choice."""
        logs = iter([answer.log for answer in likelihoods(responses)])
        grades, answers = [], {}
        for index in indices:
            question = self._questions[split][index]
            own = list(islice(logs, len(question.choices)))
            answers[index] = question.choices[int(np.argmax(own))]
            grades.append(_grade(question, own))
        values = np.array(grades, dtype=np.float32).reshape(-1, len(self.metrics))
        return Graded(dict(zip(self.metrics, values.T.copy(), strict=True)), answers)

    def _make(self, reader: Reader, split: Split, index: int) -> list[Request]:
        asked, settings = self._questions[split][index], self._settings
        examples = self._examples.of(asked.hash)
        prompts = [
            asked_pair(reader, settings, asked.prompt, text, asked.place, examples, asked.media)
            for text in asked.written
        ]
        return [Likelihood(prompt, settings.batch_tokens) for prompt in prompts]


def _grade(item: _Question, logs: Sequence[float]) -> tuple[float, float, float, float]:
    """The metrics of an item, in order, from log p of its choices. On ties the first is chosen."""
    log = np.array(logs)
    characters = np.array([len(choice) for choice in item.choices])
    size = np.array([len(choice.encode("utf-8", "surrogatepass")) for choice in item.choices])
    chosen = [int(np.argmax(values)) == item.right for values in (log, log / characters, log / size)]
    margin = log[item.right] - np.delete(log, item.right).max()
    return float(chosen[0]), float(chosen[1]), float(chosen[2]), float(margin)


# ---- items -----------------------------------------------------------------------------------------------------------

_EXAMPLE = 'Write a line such as {"question": "1 + 1?", "choices": ["2", "3"], "answer": 0}.'


def _read(settings: MultipleChoiceSettings, file: Path) -> Iterator[_Question]:
    for line in read_lines(file):
        choices = _choices(line)
        prompt = fill("prompt", settings.prompt, line)
        written = tuple(
            fill("choice", settings.choice, Line({**line.fields, "choice": choice}, line.place)) for choice in choices
        )
        media = settings.pictures(line, prompt, file.parent)
        yield _Question(prompt, choices, written, _right(line, choices), line.place, benchmark_of(line.fields), media)


def _choices(line: Line) -> tuple[str, ...]:
    choices: Any = line.fields.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise InputError(line.place, f"its choices are not a list of several texts: {str(choices)[:100]}", _EXAMPLE)
    return tuple(choices)


def _right(line: Line, choices: Sequence[str]) -> int:
    answer: Any = line.fields.get("answer")
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    problem = f"its answer {answer!r} is neither one of its {len(choices)} choices nor its number; the first is 0"
    raise InputError(line.place, problem, "Fix the item or leave it out.")
