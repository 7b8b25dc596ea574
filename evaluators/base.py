"""The contract of an evaluator: what it asks a model, and how it grades the responses, item by item.

Two phases, so that the requests of all objectives, and of several candidates, go to the engine at once, and answers are
graded while it goes on: ``Evaluator.requests`` says what to ask, ``Evaluator.grade`` turns responses into scores. What
cannot say beforehand what it asks is an ``ImperativeEvaluator``, which is given the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from evomerge.inference.requests import Engine, LogLikelihood, Request, Response, Text

if TYPE_CHECKING:  # settings are read where no model is, and torch takes seconds to import
    from evomerge.checkpoints.live import LiveModel
    from evomerge.inference.media import Media
    from evomerge.inference.reading import Prompt, Reader

Kind = TypeVar("Kind")

Split = Literal["search", "held_out"]

MODEL = "a model"
ModelReference = Annotated[str, MODEL]
"""A setting that names a model: its folder, which the search file may give relative to itself, or an id on the hub."""

OptionalModel = Annotated[str | None, MODEL]
"""The same where it may be left out."""

FOLDER = "a folder"
"""Marks a setting whose path is that of a folder, not of a file."""

ItemScores = Mapping[str, NDArray[np.float32]]
"""For each metric, float32 of shape [n_items]: the score of every item asked for, in the order asked."""


@dataclass(frozen=True)
class Item:
    """One item of a split.

    Attributes:
        id: a content hash: equal ids mean equal items, in whichever split.
        question: what it asks, for people; empty where it asks nothing.
        answer: the right answer, for people; empty where there is none.
        benchmark: the public benchmark that has it as a test item, as ``evaluators.benchmarks`` tells it; None where
            none has. A search on such items needs a person's consent.
        media: what it holds beside text.
        place: where it was read, for people: a file and a line; empty where it was in none.
        group: what kind of item it is, where it says so: routers of experts may be fitted to keep groups apart.
    """

    id: str
    question: str = ""
    answer: str = ""
    benchmark: str | None = None
    media: tuple[Media, ...] = ()
    place: str = field(default="", compare=False)
    group: str = field(default="", compare=False)

    @property
    def asks(self) -> tuple[str, ...]:
        """The question without outer blanks, and what its pictures show; empty of an item that asks nothing."""
        question = self.question.strip()
        return (question, *(one.sha256 for one in self.media)) if question or self.media else ()


@dataclass(frozen=True)
class Graded:
    """What came of some items.

    Attributes:
        scores: of every item, by metric.
        answers: what the model wrote, or chose, by the item's position in the split, where it did either. For people
            to read beside the scores.
        seconds: how long it took by phase ("generate" is the model's part, "score" the grading's), where an evaluator
            knows that better than who measures it from outside.
        drawings: small copies of the pictures that were made of items, PNG or JPEG, by the position in the split.
    """

    scores: ItemScores
    answers: Mapping[int, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    drawings: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Direct:
    """A request that no engine answers: a function that is given the live model itself, and the engine to ask.

    Attributes:
        run: what it returns is the ``Outcome``'s value.
        prompts: what the model will be given by it, as far as that is known: to see before a search whether items fit.
    """

    run: Callable[[LiveModel, Engine], Any]
    prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The response to a ``Direct``."""

    value: Any


def texts(responses: Sequence[Response | Outcome]) -> list[str]:
    """What the model wrote to each of several ``Generate``."""
    return [_as(Text, response).text for response in responses]


def likelihoods(responses: Sequence[Response | Outcome]) -> list[LogLikelihood]:
    """What each of several ``Likelihood`` came to."""
    return [_as(LogLikelihood, response) for response in responses]


def _as(kind: type[Kind], response: Response | Outcome) -> Kind:
    if not isinstance(response, kind):
        raise TypeError(f"an engine gave {type(response).__name__} where {kind.__name__} was asked for")
    return response


class Evaluator(ABC):
    """Scores models on the items of two splits.

    An evaluator is built once and kept for the life of its worker: whatever costs time (reading data, building
    prompts) happens in its construction, or the first time that it is asked.

    Attributes:
        name: short name for people, such as the task's.
        version: changes whenever the same model could get another score: part of the cache key of every score.
        metrics: each metric that it grades by, and whether higher is better.
        measured: metrics that are measured rather than computed, such as speed: the next time they are other numbers.
        splits: the items of both splits, in order.
    """

    name: str
    version: str
    metrics: Mapping[str, bool]
    measured: frozenset[str] = frozenset()
    splits: Mapping[Split, Sequence[Item]]

    def items(self, split: Split) -> Sequence[Item]:
        """The items of a split, in order."""
        return self.splits[split]

    def name_of(self, split: Split, index: int) -> str:
        """The item at a position, for people: where it was read, or which one it is."""
        return self.items(split)[index].place or f"item {index} of its {split.replace('_', '-')} items"

    @abstractmethod
    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Request | Direct]:
        """What to ask of a model for the items at these positions, each given once, item after item.

        Asked without a model, too, of single items: for people to read, and to see before a search whether items fit.

        Args:
            reader: how the model reads: a chat template, what fits and which tokens there are hang on it.

        Raises:
            InputError: an item cannot be scored with such a model.
        """

    def first_prompts(self, reader: Reader) -> Sequence[Prompt]:
        """What a model will be given for the first item of the search split, for people to read before a search.

        Raises:
            InputError: the item cannot be scored with such a model.
        """
        return prompts_of(self, reader, "search", 0)

    @abstractmethod
    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """The scores of items from the responses to what ``requests`` asked of the same ones, in its order.

        Deterministic but for what is ``measured``: the same model and indices give the same numbers. An item's score
        does not depend on the other items asked for, beyond the last bits that batching moves.
        """


def prompts_of(evaluator: Evaluator, reader: Reader, split: Split, index: int) -> list[Prompt]:
    """What a model will be given for the item at a position, as far as that is known before there is a model.

    Raises:
        InputError: the item cannot be scored with such a model.
    """
    requests = evaluator.requests(reader, split, [index])
    groups = (request.prompts if isinstance(request, Direct) else (request.prompt,) for request in requests)
    return [prompt for group in groups for prompt in group]


class ImperativeEvaluator(Evaluator):
    """An evaluator that is given the model: for what cannot say beforehand what it asks.

    Several rounds of answers, a process of its own, a look into the model: with an engine that has several models it is
    run for each of them alone.
    """

    @abstractmethod
    def score(self, live: LiveModel, engine: Engine, split: Split, indices: Sequence[int]) -> Graded:
        """Score the items at these positions, each given once; what ``grade`` says holds here, too.

        Args:
            live: the model that is scored.
            engine: answers requests with it, quicker than the model itself: ``respond_to(engine, requests)``.
        """

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Direct]:
        """One, which scores."""
        return [Direct(partial(self._run, split, list(indices)))]

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """What ``score`` returned."""
        (outcome,) = responses
        assert isinstance(outcome, Outcome)
        graded: Graded = outcome.value
        return graded

    def _run(self, split: Split, indices: Sequence[int], live: LiveModel, engine: Engine) -> Graded:
        return self.score(live, engine, split, indices)


class EvaluatorSettings(BaseModel):
    """What the search file says of an evaluator; each evaluator's file has its own subclass.

    Two objectives whose settings are equal share one evaluator.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def known_metrics(self) -> Collection[str] | None:
        """The evaluator's metrics, where they are known before it is built; None where only its data or code has them.

        It imports nothing heavy: a metric that is wrong is to be said at once.

        Raises:
            InputError: what the settings name is nowhere.
        """
        return None

    def check(self) -> None:
        """Refuse what the settings alone show to be wrong, such as code that nobody has consented to.

        It imports nothing heavy, reads no data and runs no code of a person's. ``build`` refuses the same.

        Raises:
            InputError: names the setting.
        """

    def build(self) -> Evaluator:
        """Read the data and make the evaluator.

        Raises:
            InputError: an unknown task or metric, an empty or overlapping split, data that cannot be read.
        """
        raise NotImplementedError

    def build_and_try(self) -> Evaluator:
        """``build`` where a search begins: what can be tried without a model is tried, and soon given up.

        Raises:
            InputError: as ``build`` does, or what was tried fails whatever the model, or comes to no end.
        """
        return self.build()
