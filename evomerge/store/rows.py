"""What goes into the store and what comes out of it."""

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


Known = Annotated[float | None, BeforeValidator(_none_if_nan)]
"""A number that may not be known: NaN, which JSON has no word for, is null."""


class Estimate(BaseModel):
    """A measure of a model: the mean over ``n`` items and its standard error, as the metric gives it.

    One item says nothing of how far its mean may be off: its error is None. A mean that is not known is NaN, in JSON
    null.
    """

    model_config = ConfigDict(frozen=True)

    mean: Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
    stderr: Known
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
    """What the model of one attempt answered to items of one split, for people to read.

    Args:
        evaluator: the evaluator's version.
        items: positions in the split.
        texts: the answer to each.
        drawings: small copies of the pictures that were made with the model, PNG or JPEG, by the item's position: of
            items of ``items`` or others.
    """

    evaluator: str
    split: str
    items: Sequence[int]
    texts: Sequence[str]
    drawings: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class ItemTexts:
    """What the items of a split ask, in order.

    Args:
        texts: (question, right answer) of each, the latter empty where there is none.
        pictures: the hashes of those that each shows; empty where no item shows any.
        thumbnails: small copies of them, PNG or JPEG, by hash.
    """

    evaluator: str
    split: str
    texts: Sequence[tuple[str, str]]
    pictures: Sequence[Sequence[str]] = ()
    thumbnails: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class NewCandidate:
    """A candidate as it is asked for. ``recipe`` is JSON text."""

    number: int
    origin: str
    recipe: str
    recipe_hash: str
    genome: Genome | None = None
    label: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class RaceEnd:
    """How a race ended for a candidate: "done", "eliminated", or "cached" when its scores are those of ``same_as``.

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
        by_candidate: the niche of each candidate that was told and has one, by number.
        elites: each candidate that became an elite, or is one no more, by number.
    """

    by_candidate: Mapping[int, Sequence[int]]
    elites: Mapping[int, bool]


def candidate_id(number: int) -> str:
    """How a candidate is named to people: c0042."""
    return f"c{number:04d}"


def number_of(id_: str) -> int:
    """The number of a candidate by what ``candidate_id`` names it, with or without the letter."""
    return int(id_.removeprefix("c"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ListedCandidate:
    """A candidate and what is known of it, scores of items apart, as a list shows it. Times are seconds since 1970.

    ``failure`` holds at least "reason" and "message"; after a failure that is tried again, that of the last attempt.
    ``timings`` are seconds by phase. ``losses`` is what the optimizer was told, None before it was told. ``eligible``:
    scored on every item that the objectives want, and within all constraints. An "eliminated" candidate left its race
    before that, as too poor for the optimizer to learn from; ``objectives`` are then estimates from fewer items.
    ``niche`` is its bin along each feature of the search, from 0, and ``elite`` says that it is among the best there.
    ``change`` is norm(W - W0) / norm(W0) over its weights, W0 those of the search's base; None where it is not known.
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
        """How it is named to people: c0042."""
        return candidate_id(self.number)

    @property
    def seconds(self) -> float:
        """What was spent on it, over all phases."""
        return sum(self.timings.values())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CandidateRow(ListedCandidate):
    """The whole of a candidate: with its recipe, as JSON text, and its genome, which take longer to read."""

    recipe: str
    genome: Genome | None


AnyCandidate = TypeVar("AnyCandidate", bound=ListedCandidate)

AnyEvent = TypeVar("AnyEvent", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class EventRow:
    """Something that happened; ``seq`` grows with every event of a store. ``payload`` is its content as JSON."""

    seq: int
    time: float
    kind: str
    candidate: int | None
    attempt: int | None
    payload: dict[str, Any]
    content: BaseModel | None = field(default=None, compare=False, repr=False)

    def read(self, event: type[AnyEvent]) -> AnyEvent:
        """What it says, as a class of ``events`` for its kind. TypeError for that of another kind."""
        if not isinstance(self.content, event):
            raise TypeError(f"an event {self.kind!r} is not a {event.__name__}")
        return self.content


@dataclass(frozen=True)
class SearchRow:
    """The search itself. ``why`` says in words what ended it; ``spent_s`` are seconds in which a driver was at work,
    ``worker_s`` and ``gpu_s`` those that workers and their GPUs were held, in ``held_s`` seconds of the clock.

    ``settings``, the resolved search file, and ``fingerprints`` are JSON as it stands in the store at ``place``: for
    whoever writes them again. ``record`` is what they say.
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
        """What the search is.

        Raises:
            InputError: it is not what a program of ours has written.
        """
        try:
            return SearchRecord.of(self)
        except ValueError as error:
            raise damaged(self.place, str(error)) from None


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """One ask or tell of the optimizer: the candidates, in the order asked or told; ``seq`` is that of its event."""

    kind: Literal["ask", "tell"]
    seq: int
    step: int
    candidates: tuple[int, ...]
