"""The status of a search: the models that `status --json` prints and every screen draws."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel

from evomerge.report.compositions import Composition
from evomerge.report.confirmed import Choice, Effort
from evomerge.report.entries import ConfirmedEntry, Constraint, Entry, FeatureRange, Scalar, entry, kind_of
from evomerge.report.picks import Pick
from evomerge.report.quadratics import QuadraticState
from evomerge.report.spending import Cost
from evomerge.search.estimation.combined import Range
from evomerge.search.estimation.preference import Preference
from evomerge.store import CandidateRow, Estimate, SearchRecord
from evomerge.store.events import ItemErrors
from evomerge.store.record import Racing
from evomerge.store.rows import Status

_MAX_MESSAGE = 300  # characters of a failure's message


class Counts(BaseModel):
    """Candidates by outcome: asked = done + eliminated + failed + cached + running + waiting.

    Eliminated candidates left their race early because they were too poor, or were rejected by the screen.
    """

    asked: int
    done: int
    eliminated: int
    failed: int
    cached: int
    running: int

    @classmethod
    def of(cls, by_status: Mapping[Status, int]) -> Self:
        """The counts from those of a store."""
        return cls(asked=sum(by_status.values()), **{name: by_status[name] for name in by_status if name != "asked"})

    @property
    def finished(self) -> int:
        """The number of candidates that will not be scored any further."""
        return self.done + self.eliminated + self.failed + self.cached


class Budget(BaseModel):
    """The bounds of the search, and what it has spent."""

    candidates: int | None
    hours: float | None
    hours_spent: float
    cost: float | None = None


class ScreenState(BaseModel):
    """The screen, and how far it can be trusted.

    ``tau`` is Kendall's tau over the latest ``pairs`` of candidates scored by both, None while there are too few;
    ``left_out`` counts the candidates that were never scored on the objectives.
    """

    metric: str
    objective: str
    items: int
    least_tau: float
    tau: float | None
    pairs: int
    on: bool
    left_out: int


class ProxyState(BaseModel):
    """The latest descent of the proxy: its generation, its rate, and the value of the proxy before and after.

    ``tau`` is Kendall's tau of the proxy and the objectives over the latest ``points`` from descents, None while there
    are too few; ``on`` says whether the proxy is still followed.
    """

    step: int
    rate: float
    before: float
    after: float
    tau: float | None = None
    points: int = 0
    on: bool = True

    @property
    def agreement(self) -> str:
        """The agreement with the objective, in words."""
        known = "not known yet" if self.tau is None else f"tau {self.tau:.2f} over {self.points} points"
        return f"agreement with the objective {known}{'' if self.on else '; it rests'}"


class Slow(BaseModel):
    """A node, or a worker on an ordinary node, that takes far longer than the others.

    ``seconds`` is the time per item, including merging: the median over the latest ``candidates`` that it has scored on
    all items.
    """

    kind: Literal["node", "worker"]
    name: str
    seconds: float
    candidates: int
    others_seconds: float
    others_candidates: int


class Scalarised(BaseModel):
    """A scalarisation of several objectives, with its ``direction``.

    ``best`` and ``worst`` are the losses by which objectives are scaled on the search split, if the scalarisation
    scales them: those of the front and the baselines. None while nothing is scored.
    """

    name: str
    direction: Literal["maximize", "minimize"]
    best: list[float] | None
    worst: list[float] | None


class Unscored(BaseModel):
    """A baseline that could not be scored on a split, and why; nothing is compared with it there."""

    id: str
    label: str
    origin: str
    split: Literal["search", "held_out"]
    reason: str
    message: str

    @property
    def text(self) -> str:
        """A sentence about it."""
        where = "" if self.split == "search" else " on held-out items"
        cause = textwrap.shorten(self.message, _MAX_MESSAGE, placeholder=" ...")
        problem = f"{self.id} ({kind_of(self.origin, self.label)}) could not be scored{where}"
        return f"{problem}, so nothing is compared with it. {self.reason.replace('_', ' ')}: {cause}"


class SearchStatus(BaseModel):
    """The status of a search.

    ``picks`` are the choices so far: the best if one objective or a ``scalarisation`` decides, otherwise the best at
    each objective and the knee. ``best`` is the best on the search split, or the knee of a front, and ``best_by_role``
    has the ids of all choices there. ``winner`` is the best on held-out items; None before confirmation and for a
    front. ``conclusions`` are sentences about the results, and ``unscored`` has the baselines that could not be scored.

    ``wanted`` is the number of items of each of the ``measures``, and ``items`` the total number of their item scores,
    without the screen's. ``item_response`` is empty before the first fit. ``refined`` says which groups were split last
    in a coarse-to-fine search, and is empty otherwise. ``quadratics`` are those of the optimizer ``map``.
    """

    name: str
    state: str
    why: str
    space: str
    optimizer: str
    parameters: int
    candidates: Counts
    items: int
    budget: Budget
    cost: Cost | None = None
    directions: dict[str, str]
    wanted: dict[str, int]
    constraints: dict[str, Constraint]
    features: dict[str, FeatureRange] = {}
    racing: Racing | None
    screen: ScreenState | None
    proxy: ProxyState | None = None
    item_response: dict[str, ItemErrors]
    quadratics: QuadraticState | None = None
    refined: str = ""
    sources: list[str]
    best: Entry | None
    baselines: list[Entry]
    front: list[str]
    front_entries: list[Entry]
    failures: dict[str, int]
    unscored: list[Unscored] = []
    seconds: dict[str, float]
    slow: list[Slow]
    confirmed: list[ConfirmedEntry]
    confirmed_baselines: list[Entry]
    winner: str | None
    choice: Choice | None
    confirmation: Effort | None = None
    scalarisation: dict[str, Any] | None = None
    scalar: Scalarised | None = None
    picks: list[Pick] = []
    best_by_role: dict[str, str] = {}
    compositions: list[Composition] = []
    conclusions: list[str] = []

    @property
    def numbers(self) -> dict[str, str]:
        """The numbers that candidates are judged by, with directions: the scalarisation, then the objectives."""
        return self.directions if self.scalar is None else {self.scalar.name: self.scalar.direction, **self.directions}

    @property
    def measures(self) -> list[str]:
        """The names of the numbers that candidates are judged by, then the constraints, then the features."""
        return [*self.numbers, *self.constraints, *self.features]

    def wanted_of(self, name: str) -> int:
        """The number of search items of one of the ``measures``."""
        if self.scalar is not None and name == self.scalar.name:
            return sum(self.wanted[objective] for objective in self.directions)
        return self.wanted[name]

    def entry(self, row: CandidateRow, record: SearchRecord) -> Entry:
        """A candidate on the search split, with the value of the scalarisation."""
        plain = entry(row, record)
        origin = next((mark.origin for mark in self.baselines if mark.id == plain.id), plain.origin)
        named = plain.model_copy(update={"origin": origin})
        return with_scalar(named, self.scalar, preference_of(self.directions, self.scalarisation))

    def confirmed_values(self, candidate: str) -> Mapping[str, Estimate]:
        """A candidate's or baseline's objectives on the held-out split; empty if it has none."""
        confirmed = self.confirmed_entry(candidate)
        return {} if confirmed is None else confirmed.objectives

    def confirmed_entry(self, candidate: str) -> Entry | None:
        """A candidate or baseline on the held-out split; None if it was not scored there."""
        return next((e for e in [*self.confirmed, *self.confirmed_baselines] if e.id == candidate), None)


def preference_of(directions: Mapping[str, str], scalarisation: Mapping[str, object] | None) -> Preference:
    """The preference of a search, from the fields of a status."""
    return Preference.of({name: way == "maximize" for name, way in directions.items()}, scalarisation)


def with_scalar(shown: Entry, scalar: Scalarised | None, preference: Preference) -> Entry:
    """A candidate on the search split with the value of the scalarisation, if known."""
    if scalar is None or scalar.best is None or scalar.worst is None:
        return shown
    if len(shown.objectives) < len(preference.objectives):
        return shown
    losses = preference.losses([shown.objectives])
    number = preference.order(losses, np.array([scalar.best, scalar.worst]))[0]
    if math.isnan(number):
        return shown
    own_scalar = Scalar(
        name=scalar.name,
        mean=preference.sign * float(number) + 0.0,  # no negative zero
        stderr=None,
        n=sum(value.n for value in shown.objectives.values()),
    )
    return shown.model_copy(update={"scalar": own_scalar})


def scale_of(status: SearchStatus, split: Literal["search", "held_out"]) -> Range | None:
    """The ranges by which a scalarisation scales objectives on a split: those of the front and the baselines, or of all
    models with held-out scores. None while nothing is scored there.
    """
    if split == "search":
        known = status.scalar
        if known is None or known.best is None or known.worst is None:
            return None
        return Range(np.array(known.best), np.array(known.worst))
    shown = [*status.confirmed, *status.confirmed_baselines]
    return Range.of(preference_of(status.directions, status.scalarisation).losses([e.objectives for e in shown]))
