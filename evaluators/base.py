"""The evaluator interface: what to ask a model, and how to grade its responses, item by item.

There are two phases, so that the requests of all objectives and of several candidates reach the engine together, and
answers are graded while it continues: ``Evaluator.requests`` says what to ask, ``Evaluator.grade`` turns responses into
scores. An evaluator that cannot know its requests in advance is an ``ImperativeEvaluator``, which is given the model.
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

if TYPE_CHECKING:  # settings are also read without a model, and torch takes seconds to import
    from evomerge.checkpoints.live import LiveModel
    from evomerge.inference.media import Media
    from evomerge.inference.reading import Prompt, Reader

Kind = TypeVar("Kind")

Split = Literal["search", "held_out"]

MODEL = "a model"
ModelReference = Annotated[str, MODEL]
"""A setting that names a model: its folder, which a search file may give relative to itself, or an id on the hub."""

OptionalModel = Annotated[str | None, MODEL]
"""The same for an optional model."""

FOLDER = "a folder"
"""Marks a setting whose path is that of a folder, not a file."""

ItemScores = Mapping[str, NDArray[np.float32]]
"""For each metric, float32 [n_items]: the score of every requested item, in the order requested."""


@dataclass(frozen=True)
class Item:
    """One item of a split.

    Attributes:
        id: a content hash: equal ids mean equal items, in either split.
        question: its question, for display; empty if it has none.
        answer: the right answer, for display; empty if it has none.
        benchmark: the public benchmark that it is a test item of, according to ``evaluators.benchmarks``, or None. A
            search on such items requires the user's consent.
        media: its content other than text.
        place: the file and line it was read from, for messages; empty if it came from no file.
        group: the kind of item that it says it is: routers of experts may be fitted to keep groups apart.
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
        """The question, stripped, and the content of its pictures; empty for an item that asks nothing."""
        question = self.question.strip()
        return (question, *(one.sha256 for one in self.media)) if question or self.media else ()


@dataclass(frozen=True)
class Graded:
    """The results for some items.

    Attributes:
        scores: the scores of all items, by metric.
        answers: what the model wrote or chose, if anything, by the item's position in the split. For people to read
            beside the scores.
        seconds: the time by phase ("generate" is the model's part, "score" the grading), if an evaluator knows it
            better than a measurement from outside would.
        drawings: small copies of the pictures made for items, PNG or JPEG, by position in the split.
    """

    scores: ItemScores
    answers: Mapping[int, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    drawings: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Direct:
    """A request that bypasses the engine: a function that receives the live model, and the engine to use.

    Attributes:
        run: the function; its return value becomes the ``Outcome``'s value.
        prompts: the prompts that it will give the model, as far as known: to check before a search whether items fit.
    """

    run: Callable[[LiveModel, Engine], Any]
    prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The response to a ``Direct``."""

    value: Any


def texts(responses: Sequence[Response | Outcome]) -> list[str]:
    """The texts generated for several ``Generate`` requests."""
    return [_as(Text, response).text for response in responses]


def likelihoods(responses: Sequence[Response | Outcome]) -> list[LogLikelihood]:
    """The results of several ``Likelihood`` requests."""
    return [_as(LogLikelihood, response) for response in responses]


def _as(kind: type[Kind], response: Response | Outcome) -> Kind:
    if not isinstance(response, kind):
        raise TypeError(f"an engine gave {type(response).__name__} where {kind.__name__} was asked for")
    return response


class Evaluator(ABC):
    """Scores models on the items of two splits.

    An evaluator is built once and lives as long as its worker, so everything expensive (reading data, building prompts)
    happens in its constructor or on first use.

    Attributes:
        name: a short display name, such as the task's.
        version: changes whenever the same model could get a different score; part of the cache key of every score.
        metrics: each metric, and whether higher is better.
        measured: metrics that are measured rather than computed, such as speed: they vary from one run to the next.
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
        """A display name for the item at a position: where it was read, or its index."""
        return self.items(split)[index].place or f"item {index} of its {split.replace('_', '-')} items"

    @abstractmethod
    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Request | Direct]:
        """The requests for the items at these positions, each given once, item after item.

        Also called without a model, for single items: to show them, and to check before a search whether items fit.

        Args:
            reader: how the model reads text: the chat template, the length limit and the tokens depend on it.

        Raises:
            InputError: an item cannot be scored with such a model.
        """

    def first_prompts(self, reader: Reader) -> Sequence[Prompt]:
        """The prompts for the first item of the search split, to show before a search.

        Raises:
            InputError: the item cannot be scored with such a model.
        """
        return prompts_of(self, reader, "search", 0)

    @abstractmethod
    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """Score items by the responses to what ``requests`` returned for the same items, in the same order.

        Deterministic except for ``measured`` metrics: the same model and indices give the same numbers. An item's score
        does not depend on the other items, except for the last bits, which batching affects.
        """


def prompts_of(evaluator: Evaluator, reader: Reader, split: Split, index: int) -> list[Prompt]:
    """The prompts for the item at a position, as far as they are known without a model.

    Raises:
        InputError: the item cannot be scored with such a model.
    """
    requests = evaluator.requests(reader, split, [index])
    groups = (request.prompts if isinstance(request, Direct) else (request.prompt,) for request in requests)
    return [prompt for group in groups for prompt in group]


class ImperativeEvaluator(Evaluator):
    """An evaluator that is given the model, because it cannot know its requests in advance.

    It may need several rounds of answers, a process of its own, or access to the model itself. With an engine that
    holds several models, it runs for each model separately.
    """

    @abstractmethod
    def score(self, live: LiveModel, engine: Engine, split: Split, indices: Sequence[int]) -> Graded:
        """Score the items at these positions, each given once; the guarantees of ``grade`` apply here, too.

        Args:
            live: the model to score.
            engine: answers requests with that model, faster than the model itself: ``respond_to(engine, requests)``.
        """

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Direct]:
        """A single request, which does the scoring."""
        return [Direct(partial(self._run, split, list(indices)))]

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """The result of ``score``."""
        (outcome,) = responses
        assert isinstance(outcome, Outcome)
        graded: Graded = outcome.value
        return graded

    def _run(self, split: Split, indices: Sequence[int], live: LiveModel, engine: Engine) -> Graded:
        return self.score(live, engine, split, indices)


class EvaluatorSettings(BaseModel):
    """The settings of an evaluator in the search file; every evaluator has a subclass.

    Two objectives with equal settings share one evaluator.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def known_metrics(self) -> Collection[str] | None:
        """The evaluator's metrics if they are known before it is built; None if they depend on its data or code.

        This imports nothing heavy, so that a wrong metric is reported immediately.

        Raises:
            InputError: something named in the settings does not exist.
        """
        return None

    def check(self) -> None:
        """Reject settings that are wrong by themselves, such as code that the user has not consented to.

        This imports nothing heavy, reads no data and runs no user code. ``build`` makes the same checks.

        Raises:
            InputError: names the setting.
        """

    def build(self) -> Evaluator:
        """Read the data and create the evaluator.

        Raises:
            InputError: an unknown task or metric, an empty or overlapping split, data that cannot be read.
        """
        raise NotImplementedError

    def build_and_try(self) -> Evaluator:
        """``build`` at the start of a search, which also tries out what needs no model, within a short time limit.

        Raises:
            InputError: as for ``build``, or something fails regardless of the model, or does not finish.
        """
        return self.build()
