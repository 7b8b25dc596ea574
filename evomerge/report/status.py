"""Where a search stands, as data: what `status --json` prints and every screen draws."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel

from evomerge.report.confirmed import UNCONFIRMED, UNCONFIRMED_WHY, Choice, Confirmed, Effort, confirmation, effort
from evomerge.report.entries import (
    ConfirmedEntry,
    Constraint,
    Entry,
    FeatureRange,
    Scalar,
    Value,
    candidate_id,
    constraints_of,
    entry,
    features_of,
    kind_of,
    origin_of,
)
from evomerge.report.picks import Pick, conclusions, picks_of
from evomerge.report.spending import Cost, cost_of, seconds_left
from evomerge.search.estimation.combined import Range
from evomerge.search.estimation.preference import BEST, KNEE, Preference
from evomerge.search.settings.folder import open_store
from evomerge.store import CandidateRow, SearchRecord, SearchRow, Store, current_holder
from evomerge.store.events import ConfirmFailed, Screening, State
from evomerge.store.events import ItemResponse as ItemResponseNews
from evomerge.store.record import Measure
from evomerge.store.summaries import Brief

_SLOW = 1.5  # times the others' median: candidates of one cluster differ by less, their medians by far less
_MOST_MESSAGE = 300  # characters of what a failure says
_LEAST_SCORED = 5  # candidates that a node or worker has scored before it is compared
_RECENT = 200  # candidates that the time split and the failures are taken from, so that a status costs the same always


class Counts(BaseModel):
    """Candidates by what became of them: asked = done + eliminated + failed + cached + running + those that wait.

    Eliminated are those that left their race early, as too poor, and those that the screen left out.
    """

    asked: int
    done: int
    eliminated: int
    failed: int
    cached: int
    running: int


class Budget(BaseModel):
    """What the search may spend and what it has spent."""

    candidates: int | None
    hours: float | None
    hours_spent: float
    cost: float | None = None


class Racing(BaseModel):
    """How candidates are raced: the rungs that the search file names, and what estimates unscored items."""

    rungs: list[int]
    confidence: float
    estimate: Literal["baseline", "item_response"]


class ScreenState(BaseModel):
    """The screen, and how far it can be trusted.

    ``tau`` is Kendall's, over the latest ``pairs`` of candidates scored by both, None while there are too few;
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


class ItemResponse(BaseModel):
    """Mean absolute errors of a measure's estimates from the first rung, on models that were left out of the fit.

    ``reference`` is by the best baseline's scores. Item response is ``used`` while its own error is the smaller one.
    """

    reference: float
    item_response: float
    p_irt: float
    used: bool


class Slow(BaseModel):
    """A node, or a worker of an ordinary node, that takes far longer than the others.

    ``seconds`` of an item, merging included: the median over the ``candidates`` that it has scored lately on all items.
    """

    kind: Literal["node", "worker"]
    name: str
    seconds: float
    candidates: int
    others_seconds: float
    others_candidates: int


class Scalarised(BaseModel):
    """The number that a scalarisation makes of several objectives, of which ``direction`` says what is better.

    ``best`` and ``worst`` are the losses that objectives are scaled by on the search split, where the scalarisation
    scales any: those of the front and the baselines. None while nothing is scored.
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
        """That as a sentence."""
        where = "" if self.split == "search" else " on held-out items"
        cause = textwrap.shorten(self.message, _MOST_MESSAGE, placeholder=" ...")
        problem = f"{self.id} ({kind_of(self.origin, self.label)}) could not be scored{where}"
        return f"{problem}, so nothing is compared with it. {self.reason.replace('_', ' ')}: {cause}"


class SearchStatus(BaseModel):
    """A search at one moment.

    ``picks`` is what it chose so far: the best where one objective or a ``scalarisation`` decides, else the best at
    each objective and the knee. ``best`` is the best on the search split, the knee of a front, and ``best_by_role``
    has all that is chosen there, by id. ``winner`` is the best on held-out items, None while there is none and where
    nothing decides. ``conclusions`` say in words what was found, and which baselines are ``unscored``.

    ``wanted`` says of how many items each of the ``measures`` is the mean, and ``items`` how many item scores
    of them were measured in all, the screen's apart. ``item_response`` is empty before the first fit.
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
    item_response: dict[str, ItemResponse]
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
    conclusions: list[str] = []

    @property
    def numbers(self) -> dict[str, str]:
        """What candidates are judged by, and which way is better: the scalarisation's number, then the objectives."""
        return self.directions if self.scalar is None else {self.scalar.name: self.scalar.direction, **self.directions}

    @property
    def measures(self) -> list[str]:
        """The names of the numbers that candidates are judged by, the constraints and the features, in this order."""
        return [*self.numbers, *self.constraints, *self.features]

    def wanted_of(self, name: str) -> int:
        """Of how many search items one of the ``measures`` is."""
        if self.scalar is not None and name == self.scalar.name:
            return sum(self.wanted[objective] for objective in self.directions)
        return self.wanted[name]

    def entry(self, row: CandidateRow, record: SearchRecord) -> Entry:
        """A candidate on the search split, with the number of the scalarisation."""
        plain = entry(row, record)
        origin = next((mark.origin for mark in self.baselines if mark.id == plain.id), plain.origin)
        named = plain.model_copy(update={"origin": origin})
        return with_scalar(named, self.scalar, preference_of(self.directions, self.scalarisation))

    def confirmed_values(self, candidate: str) -> Mapping[str, Value]:
        """A candidate's objectives on the held-out split, baselines included; empty when it has none."""
        confirmed = self.confirmed_entry(candidate)
        return {} if confirmed is None else confirmed.objectives

    def confirmed_entry(self, candidate: str) -> Entry | None:
        """A candidate on the held-out split, baselines included; None when it was not scored there."""
        return next((e for e in [*self.confirmed, *self.confirmed_baselines] if e.id == candidate), None)


def preference_of(directions: Mapping[str, str], scalarisation: Mapping[str, object] | None) -> Preference:
    """How a search chooses among models, in the words of a status."""
    return Preference.of({name: way == "maximize" for name, way in directions.items()}, scalarisation)


def with_scalar(shown: Entry, scalar: Scalarised | None, preference: Preference) -> Entry:
    """A candidate on the search split with the number of the scalarisation, where that is known."""
    if scalar is None or scalar.best is None or scalar.worst is None:
        return shown
    if len(shown.objectives) < len(preference.objectives):
        return shown
    losses = preference.losses([{name: value.mean for name, value in shown.objectives.items()}])
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


def scalarised(preference: Preference, rows: Sequence[CandidateRow | Brief]) -> Scalarised | None:
    """What decides between several objectives; ``rows`` are the front and the baselines. None for a front."""
    if preference.scalarisation is None:
        return None
    means = [{name: estimate["mean"] for name, estimate in row.objectives.items()} for row in rows]
    scale = Range.of(preference.losses(means))
    return Scalarised(
        name=preference.scalar,
        direction="maximize" if preference.sign < 0 else "minimize",
        best=None if scale is None else scale.best.tolist(),
        worst=None if scale is None else scale.worst.tolist(),
    )


def scale_of(status: SearchStatus, split: Literal["search", "held_out"]) -> Range | None:
    """The range that a scalarisation scales objectives by on a split: of the front and the baselines, or of all models
    with held-out scores. None while nothing is scored there.
    """
    if split == "search":
        known = status.scalar
        if known is None or known.best is None or known.worst is None:
            return None
        return Range(np.array(known.best), np.array(known.worst))
    shown = [*status.confirmed, *status.confirmed_baselines]
    means = [{name: value.mean for name, value in e.objectives.items()} for e in shown]
    return Range.of(preference_of(status.directions, status.scalarisation).losses(means))


def depths_of(store: Store) -> dict[str, int]:
    """How many layers each source has, from the baselines, of which most spaces make each source alone one.

    A source that is none counts as deep as the deepest of the others.
    """
    sources = store.search().record.sources
    alone = {row.label: json.loads(row.recipe) for row in store.candidates(step=0)}
    known = {name: len(alone[name].get("hops", ())) for name in sources if name in alone}
    return {name: known.get(name) or max(known.values(), default=0) for name in sources}


def read_status(folder: Path) -> SearchStatus:
    """The status of the search in a folder."""
    with open_store(folder) as store:
        return status_of(store)


def status_of(store: Store) -> SearchStatus:
    """The status of a search. Costs a few queries, however many candidates there are."""
    search = store.search()
    record = search.record
    counts, driven = _counts(store), current_holder(store) is not None
    recent = store.candidates(statuses=["done", "eliminated"], newest=_RECENT)
    failed = store.candidates(statuses=["failed"], newest=_RECENT)
    front = store.front()
    baselines = store.candidates(step=0)
    held = confirmation(store, search, baselines)
    directions = {o.name: "maximize" if o.maximise else "minimize" for o in record.objectives}
    sources = [row.label for row in baselines if row.origin == "source"] or list(record.sources)
    preference = Preference.of_search(search)
    scalar = scalarised(preference, [*front, *baselines])

    def shown(row: CandidateRow) -> Entry:
        named = entry(row, record).model_copy(update={"origin": origin_of(row, record.sources)})
        return with_scalar(named, scalar, preference)

    best = {role: shown(row) for role, row in best_on_search(store, search, front, baselines).items()}
    numbers = directions if scalar is None else {scalar.name: scalar.direction, **directions}
    state, why = _state(search, held, driven=driven)
    budget = _budget(store, search, driven=driven)
    status = SearchStatus(
        name=search.name,
        state=state,
        why=why,
        space=describe_space(record.space),
        optimizer=record.optimizer.name,
        parameters=len(record.parameters),
        candidates=counts,
        items=_items(store, search, counts.done),
        budget=budget,
        cost=_cost(search, counts, budget, runs=driven and state == "running"),
        directions=directions,
        wanted={m.name: m.items for m in record.measures},
        constraints=constraints_of(record),
        features=features_of(record),
        racing=_racing(record),
        screen=_screen(store, search),
        item_response=_item_response(store),
        sources=sources,
        best=best.get(BEST, best.get(KNEE)),
        baselines=[shown(row) for row in baselines if row.objectives],
        front=[candidate_id(row.number) for row in front],
        front_entries=[shown(row) for row in front],
        failures=dict(Counter([*(row.failure["reason"] for row in failed if row.failure), *_unconfirmed(store)])),
        unscored=list(_unscored(store, baselines, record.sources, held)),
        seconds=_mean_seconds(recent),
        slow=slow_ones(_paces(recent, record.measures)),
        confirmed=held.entries,
        confirmed_baselines=held.baselines,
        winner=held.winner,
        choice=held.choice,
        confirmation=effort(store, search, baselines, held, is_driven=driven),
        scalarisation=record.optimizer.scalarisation,
        scalar=scalar,
        picks=picks_of(best, held, numbers, sources),
        best_by_role={role: e.id for role, e in best.items()},
    )
    return status.model_copy(update={"conclusions": conclusions(status)})


def _state(search: SearchRow, held: Confirmed, *, driven: bool) -> tuple[str, str]:
    """What a search is doing, and why."""
    if search.state in ("running", "paused", "confirming") and not driven:
        return "interrupted", search.why
    if search.state == "finished" and not driven and held.choice is not None and not held.choice.made:
        return UNCONFIRMED, UNCONFIRMED_WHY
    return search.state, search.why


def _counts(store: Store) -> Counts:
    counts = store.counts()
    return Counts(
        asked=sum(counts.values()),
        done=counts["done"],
        eliminated=counts["eliminated"],
        failed=counts["failed"],
        cached=counts["cached"],
        running=counts["running"],
    )


def _budget(store: Store, search: SearchRow, *, driven: bool) -> Budget:
    spent_s = search.spent_s + (unrecorded_s(store) if driven else 0.0)
    budget = search.record.budget
    return Budget(candidates=budget.candidates, hours=budget.hours, hours_spent=spent_s / 3600, cost=budget.cost)


def _cost(search: SearchRow, counts: Counts, budget: Budget, *, runs: bool) -> Cost | None:
    """What the search has cost, and while it runs what is to come."""
    spent_s = budget.hours_spent * 3600
    if (cost := cost_of(search, spent_s)) is None or not runs:
        return cost
    finished = counts.done + counts.eliminated + counts.failed + counts.cached
    return cost.with_left(seconds_left(budget, finished, spent_s, cost))


def best_on_search(
    store: Store, search: SearchRow, front: Sequence[CandidateRow], baselines: Sequence[CandidateRow]
) -> dict[str, CandidateRow]:
    """What is chosen on the search split, by role."""
    preference = Preference.of_search(search)
    if len(preference.objectives) > 1:
        return chosen_of_front(preference, front, baselines)
    ((name, up),) = preference.objectives.items()
    rows = store.best(name, maximise=up)
    return {BEST: rows[0]} if rows else {}


AnyRow = TypeVar("AnyRow", CandidateRow, Brief)


def chosen_of_front(preference: Preference, front: Sequence[AnyRow], baselines: Sequence[AnyRow]) -> dict[str, AnyRow]:
    """What is chosen among several objectives, by role. Whatever is best by any preference is on the front."""
    losses, among = (
        preference.losses([{name: estimate["mean"] for name, estimate in row.objectives.items()} for row in rows])
        for rows in (front, [*front, *baselines])
    )
    return {role: front[at] for role, at in preference.choose(losses, among).items()}


def unrecorded_s(store: Store) -> float:
    """Seconds that a driver at work has spent since it last wrote them down, with a tell; pauses are not spent."""
    wanted = {"lease": 1, "tell": 1, "state": _RECENT}
    events = [event for kind, newest in wanted.items() for event in store.events(kinds=(kind,), newest=newest)]
    spent, since = 0.0, math.nan  # since when it runs; NaN while it does not
    for event in sorted(events, key=lambda event: event.seq):
        runs = not math.isnan(since)
        if event.kind == "lease":  # whatever the driver before it left unrecorded is lost
            spent, since = 0.0, math.nan
        elif event.kind == "tell":
            spent, since = 0.0, event.time if runs else math.nan
        elif event.read(State).state == "running":
            since = event.time
        else:
            paused = event.read(State).state == "paused"
            spent, since = (spent + event.time - since if runs else spent) if paused else 0.0, math.nan
    return spent if math.isnan(since) else spent + time.time() - since


def _items(store: Store, search: SearchRow, done: int) -> int:
    """How many item scores of objectives and constraints were measured."""
    record = search.record
    measures = record.measures
    if record.racing is None and record.screen is None:
        return done * _distinct_items(measures)  # and no row needs to be looked at
    return store.items_scored([measure.name for measure in _largest(measures)])


def _largest(measures: Sequence[Measure]) -> list[Measure]:
    """Of the measures on one evaluator the one with the most items, which holds those of all."""
    most: dict[int, Measure] = {}
    for measure in measures:
        if measure.evaluator not in most or measure.items > most[measure.evaluator].items:
            most[measure.evaluator] = measure
    return list(most.values())


def _distinct_items(measures: Sequence[Measure]) -> int:
    """How many items a candidate is scored on for all of its measures."""
    return sum(measure.items for measure in _largest(measures))


def _racing(record: SearchRecord) -> Racing | None:
    return None if record.racing is None else Racing(**record.racing.model_dump())


def _screen(store: Store, search: SearchRow) -> ScreenState | None:
    """The screen as the driver last spoke of it."""
    screen = search.record.screen
    if screen is None:
        return None
    events = store.events(kinds=("screen",), newest=1)
    last = events[0].read(Screening) if events else Screening(pairs=0, tau=math.nan, on=False)
    objective = search.record.objectives[screen.objective].name
    return ScreenState(
        metric=screen.metric,
        objective=objective,
        items=screen.items,
        least_tau=screen.least_tau,
        tau=None if math.isnan(last.tau) else last.tau,
        pairs=last.pairs,
        on=last.on,
        left_out=store.eliminated_without(objective),
    )


def _item_response(store: Store) -> dict[str, ItemResponse]:
    """What the driver last said of item response, by measure."""
    events = store.events(kinds=("item response",), newest=1)
    return {
        name: ItemResponse(**fitted.model_dump())
        for event in events
        for name, fitted in event.read(ItemResponseNews).root.items()
    }


def _unconfirmed(store: Store) -> list[str]:
    """Why candidates could not be scored on the held-out split."""
    events = store.events(kinds=("confirm failed",), newest=_RECENT)
    return [f"{failed.reason} in confirmation" for failed in (e.read(ConfirmFailed) for e in events) if failed.final]


def _unscored(
    store: Store, baselines: Sequence[CandidateRow], sources: Collection[str], held: Confirmed
) -> Iterator[Unscored]:
    """Baselines that have failed, on the search split or else on the held-out split."""
    events = store.events(kinds=("confirm failed",), newest=_RECENT)
    there = {failed.candidate: failed.payload for failed in (e.read(ConfirmFailed) for e in events) if failed.final}
    confirmed = {baseline.id for baseline in held.baselines}
    for row in baselines:
        failure = row.failure if row.status == "failed" else there.get(row.number)
        if failure is None or candidate_id(row.number) in confirmed:
            continue
        yield Unscored(
            id=candidate_id(row.number),
            label=row.label,
            origin=origin_of(row, sources),
            split="search" if row.status == "failed" else "held_out",
            reason=str(failure.get("reason", "")),
            message=str(failure.get("message", "")),
        )


def _mean_seconds(rows: Sequence[CandidateRow]) -> dict[str, float]:
    """Mean seconds of each phase over these candidates."""
    phases = dict.fromkeys(phase for row in rows for phase in row.timings)
    return {phase: float(np.mean([row.timings.get(phase, 0.0) for row in rows])) for phase in phases}


def _paces(rows: Sequence[CandidateRow], measures: Sequence[Measure]) -> list[tuple[str, float]]:
    """Worker and seconds an item of each candidate that was scored on all items, so that like is compared with like.

    What several workers have scored of a candidate, rung by rung, counts as the last one's: that had most of the items.
    """
    wanted = {m.name: m.items for m in measures}
    items = _distinct_items(measures)
    return [
        (row.worker, sum(row.timings.values()) / items)
        for row in rows
        if row.timings and all(row.objectives.get(name, {"n": 0})["n"] >= n for name, n in wanted.items())
    ]


def slow_ones(paces: Sequence[tuple[str, float]]) -> list[Slow]:
    """The nodes that are slow, by worker and seconds an item of candidates; and the slow workers of the other nodes."""
    nodes = _outliers("node", [(worker.partition("@")[2], pace) for worker, pace in paces if "@" in worker])
    known = {node.name for node in nodes}
    return nodes + _outliers(
        "worker", [(worker, pace) for worker, pace in paces if worker.partition("@")[2] not in known]
    )


def _outliers(kind: Literal["node", "worker"], paces: Sequence[tuple[str, float]]) -> list[Slow]:
    by: dict[str, list[float]] = {}
    for name, pace in paces:
        by.setdefault(name, []).append(pace)
    by = {name: seconds for name, seconds in sorted(by.items()) if len(seconds) >= _LEAST_SCORED}
    slow = []
    for name, ours in by.items():
        others = [pace for other, theirs in by.items() if other != name for pace in theirs]
        if others and statistics.median(ours) > _SLOW * statistics.median(others):
            medians = {"seconds": statistics.median(ours), "others_seconds": statistics.median(others)}
            slow.append(Slow(kind=kind, name=name, candidates=len(ours), others_candidates=len(others), **medians))
    return slow


def describe_space(space: Mapping[str, object]) -> str:
    """The space in a few words: its kind unless it is a parameter space, how paths are encoded, method, granularity."""
    details = [str(space[key]) for key in ("encoding", "method", "granularity") if space.get(key) is not None]
    kind = [] if space["kind"] == "parameter_space" else [str(space["kind"]).replace("_", " ")]
    return " ".join([*kind, *details])
