"""The types that are written to the store and read from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict

from evomerge.genome import Genome
from evomerge.prices import WorkerTime
from evomerge.store.engine import damaged
from evomerge.store.record import SearchRecord

Status = Literal["asked", "running", "done", "eliminated", "failed", "cached"]
STATUSES: tuple[Status, ...] = get_args(Status)

Verb = Literal["pause", "resume", "stop", "cancel", "reread"]


def _none_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


NullableFloat = Annotated[float | None, BeforeValidator(_none_if_nan)]
"""A number that may be unknown: NaN, which JSON cannot represent, becomes null."""


class Estimate(BaseModel):
    """A measure of a model: the mean over ``n`` items and its standard error, as computed by the metric.

    The error of a single item is unknown and therefore None. An unknown mean is NaN, and null in JSON.
    """

    model_config = ConfigDict(frozen=True)

    mean: Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
    stderr: NullableFloat
    n: int


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One evaluator's scores of one candidate on items of one split.

    Args:
        evaluator: the evaluator's version.
        split: "search" or "held_out".
        items: int32 [n], positions in the split.
        metrics: for each metric, float32 [n]: the score of every item, in the order of ``items``.
    """

    evaluator: str
    split: str
    items: NDArray[np.int32]
    metrics: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """The answers of one attempt's model to items of one split, for people to read.

    Args:
        evaluator: the evaluator's version.
        items: positions in the split.
        texts: the answer to each item.
        drawings: thumbnails of the pictures that were made with the model, PNG or JPEG, by item position. The items
            need not be in ``items``.
    """

    evaluator: str
    split: str
    items: Sequence[int]
    texts: Sequence[str]
    drawings: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class ItemTexts:
    """The texts and pictures of the items of a split, in order.

    Args:
        texts: (question, right answer) of each item; the answer is empty if there is none.
        pictures: the hashes of the pictures of each item; empty if no item has pictures.
        thumbnails: small copies of the pictures, PNG or JPEG, by hash.
    """

    evaluator: str
    split: str
    texts: Sequence[tuple[str, str]]
    pictures: Sequence[Sequence[str]] = ()
    thumbnails: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class NewCandidate:
    """A candidate that is asked for. ``recipe`` is JSON text."""

    number: int
    origin: str
    recipe: str
    recipe_hash: str
    genome: Genome | None = None
    label: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class RaceEnd:
    """How a race ended for a candidate: "done", "eliminated", or "cached" if it reuses the scores of ``same_as``.

    ``eligible`` says whether it may be on the front and be confirmed.
    """

    number: int
    status: Status
    objectives: Mapping[str, Estimate]
    eligible: bool
    same_as: int | None = None


@dataclass(frozen=True, slots=True)
class Niches:
    """What a tell changed in the grid of a search with features.

    Attributes:
        by_candidate: the niches of the told candidates that have one, by number.
        elites: whether a candidate is an elite now, for each candidate for which that changed, by number.
    """

    by_candidate: Mapping[int, Sequence[int]]
    elites: Mapping[int, bool]


def candidate_id(number: int) -> str:
    """The display id of a candidate, such as c0042."""
    return f"c{number:04d}"


def number_of(id_: str) -> int:
    """The number of a candidate from its display id, with or without the letter."""
    return int(id_.removeprefix("c"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ListedCandidate:
    """A candidate as shown in lists, without the scores of items. Times are seconds since 1970.

    ``failure`` has at least "reason" and "message"; while a failed candidate is retried, it is that of the last
    attempt. ``timings`` are seconds by phase. ``losses`` are those told to the optimizer, None before. ``eligible``
    means that it was scored on all items of the objectives and satisfies all constraints. An "eliminated" candidate
    left its race earlier because it was too poor for the optimizer to learn from; its ``objectives`` are estimates from
    fewer items. ``niche`` is its bin along each feature of the search, from 0, and ``elite`` says that it is among the
    best there. ``change`` is norm(W - W0) / norm(W0) over its weights, with W0 those of the search's base; None if
    unknown.
    """

    number: int
    step: int
    origin: str
    label: str
    status: Status
    recipe_hash: str
    same_as: int | None
    attempts: int
    worker: str
    on_front: bool
    niche: list[int] | None
    elite: bool
    eligible: bool
    objectives: dict[str, Estimate]
    losses: list[float] | None
    change: float | None
    timings: dict[str, float]
    failure: dict[str, Any] | None
    asked_at: float
    finished_at: float | None

    @property
    def id(self) -> str:
        """Its display id, such as c0042."""
        return candidate_id(self.number)

    @property
    def seconds(self) -> float:
        """The time spent on it, over all phases."""
        return sum(self.timings.values())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CandidateRow(ListedCandidate):
    """A complete candidate, with its recipe as JSON text and its genome, which take longer to read."""

    recipe: str
    genome: Genome | None


AnyCandidate = TypeVar("AnyCandidate", bound=ListedCandidate)

AnyEvent = TypeVar("AnyEvent", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class EventRow:
    """A recorded event; ``seq`` grows with every event of a store. ``payload`` is its content as JSON."""

    seq: int
    time: float
    kind: str
    candidate: int | None
    attempt: int | None
    payload: dict[str, Any]
    content: BaseModel | None = field(default=None, compare=False, repr=False)

    def read(self, event: type[AnyEvent]) -> AnyEvent:
        """Its content as the class in ``events`` for its kind. Raises TypeError for the class of another kind."""
        if not isinstance(self.content, event):
            raise TypeError(f"an event {self.kind!r} is not a {event.__name__}")
        return self.content


@dataclass(frozen=True)
class SearchRow:
    """The search itself. ``why`` says what ended it; ``spent_s`` is how long drivers were running, in seconds.
    ``worker_s`` and ``gpu_s`` are the worker and GPU seconds used, in ``held_s`` seconds of wall-clock time.

    ``settings``, the resolved search file, and ``fingerprints`` are JSON as in the store at ``place``, for code that
    writes them back. ``record`` is the parsed form.
    """

    place: str
    name: str
    schema_version: int
    created_at: float
    state: str
    why: str
    spent_s: float
    settings: dict[str, Any]
    fingerprints: dict[str, Any]
    environment: dict[str, Any]
    worker_s: float = 0.0
    gpu_s: float = 0.0
    held_s: float = 0.0

    @property
    def worker_time(self) -> WorkerTime:
        return WorkerTime(self.worker_s, self.gpu_s, self.held_s)

    @cached_property
    def record(self) -> SearchRecord:
        """The parsed definition of the search.

        Raises:
            InputError: it was not written by this program.
        """
        try:
            return SearchRecord.of(self)
        except ValueError as error:
            raise damaged(self.place, str(error)) from None


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """One ask or tell of the optimizer: the candidates in the order asked or told; ``seq`` is that of its event."""

    kind: Literal["ask", "tell"]
    seq: int
    step: int
    candidates: tuple[int, ...]
