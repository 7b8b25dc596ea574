"""The status of a search, read from its store with a few short queries."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from evomerge.report.compositions import Composition, compositions_of
from evomerge.report.conclusions import conclusions
from evomerge.report.confirmed import UNCONFIRMED, UNCONFIRMED_WHY, Confirmed, confirmation, effort
from evomerge.report.entries import (
    Entry,
    constraints_of,
    entry,
    features_of,
    origin_of,
)
from evomerge.report.failures import driver_failure, is_driven
from evomerge.report.picks import picks_of
from evomerge.report.quadratics import quadratics_of
from evomerge.report.search_status import (
    Budget,
    Counts,
    ProxyState,
    Scalarised,
    ScreenState,
    SearchStatus,
    Slow,
    Unscored,
    with_scalar,
)
from evomerge.report.spending import Cost, cost_of, seconds_left
from evomerge.search.estimation.combined import Range
from evomerge.search.estimation.preference import BEST, KNEE, Preference
from evomerge.search.settings.folder import open_store
from evomerge.store import CandidateRow, SearchRow, Store
from evomerge.store.events import Agreed, ConfirmFailed, Descent, ItemErrors, ItemResponse, Refined, Screening, State
from evomerge.store.record import Measure, SearchRecord
from evomerge.store.rows import AnyCandidate, ListedCandidate

_SLOW = 1.5  # times the others' median: candidates in one cluster differ by less, and medians by far less
_MIN_SCORED = 5  # candidates that a node or worker has scored before it is compared
_RECENT = 200  # candidates from which times and failures are computed, so that the cost of a status is bounded


def scalarised(preference: Preference, rows: Sequence[ListedCandidate]) -> Scalarised | None:
    """The scalarisation of several objectives; ``rows`` are the front and the baselines. None without one."""
    if preference.scalarisation is None:
        return None
    scale = Range.of(preference.losses([row.objectives for row in rows]))
    return Scalarised(
        name=preference.scalar,
        direction="maximize" if preference.sign < 0 else "minimize",
        best=None if scale is None else scale.best.tolist(),
        worst=None if scale is None else scale.worst.tolist(),
    )


def depths_of(store: Store) -> dict[str, int]:
    """The number of layers of each source, from its baseline, which most spaces have for each source.

    A source without a baseline counts as deep as the deepest of the others.
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
    """The status of a search. Takes a few queries, however many candidates there are."""
    search = store.search()
    record = search.record
    counts, driven = Counts.of(store.counts()), is_driven(store)
    recent = store.candidates(statuses=["done", "eliminated"], newest=_RECENT)
    front, baselines = store.front(), store.candidates(step=0)
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
    (state, why), budget = _state(store, search, held, driven=driven), _budget(store, search, driven=driven)
    found = SearchStatus(
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
        racing=record.racing,
        screen=_screen(store, search),
        proxy=_proxy(store),
        item_response=_item_response(store),
        quadratics=quadratics_of(store, search),
        refined=_refined(store),
        sources=sources,
        best=best.get(BEST, best.get(KNEE)),
        baselines=[shown(row) for row in baselines if row.objectives],
        front=[row.id for row in front],
        front_entries=[shown(row) for row in front],
        failures=_failures(store),
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
    return _concluded(found, record)


def _concluded(status: SearchStatus, record: SearchRecord) -> SearchStatus:
    """The status with everything that is derived from its other fields."""
    status = status.model_copy(update={"compositions": list(_compositions(record, status))})
    return status.model_copy(update={"conclusions": conclusions(status)})


def _failures(store: Store) -> dict[str, int]:
    """The reasons of the latest failures, also in the confirmation, with their numbers."""
    failed = store.candidates(statuses=["failed"], newest=_RECENT)
    return dict(Counter([*(row.failure["reason"] for row in failed if row.failure), *_unconfirmed(store)]))


def _compositions(record: SearchRecord, status: SearchStatus) -> Iterator[Composition]:
    """Objectives that need several skills, on held-out items once any model has scores there."""
    held = {entry.id: entry for entry in [*status.confirmed_baselines, *status.confirmed]}
    best = [] if status.best is None else [status.best]
    searched = {entry.id: entry for entry in [*status.baselines, *status.front_entries, *best]}
    return compositions_of(record.compositions, status.directions, held or searched, held_out=bool(held))


def _state(store: Store, search: SearchRow, held: Confirmed, *, driven: bool) -> tuple[str, str]:
    """The state of a search, and the reason."""
    why = driver_failure(store) or search.why
    if search.state in ("running", "paused", "confirming") and not driven:
        return "interrupted", why
    if search.state == "finished" and not driven and held.choice is not None and not held.choice.made:
        return UNCONFIRMED, UNCONFIRMED_WHY
    return search.state, why


def _budget(store: Store, search: SearchRow, *, driven: bool) -> Budget:
    spent_s = search.spent_s + (unrecorded_s(store) if driven else 0.0)
    budget = search.record.budget
    return Budget(candidates=budget.candidates, hours=budget.hours, hours_spent=spent_s / 3600, cost=budget.cost)


def _cost(search: SearchRow, counts: Counts, budget: Budget, *, runs: bool) -> Cost | None:
    """The cost of the search, and while it is running the cost to come."""
    spent_s = budget.hours_spent * 3600
    if (cost := cost_of(search, spent_s)) is None or not runs:
        return cost
    return cost.with_left(seconds_left(budget, counts.finished, spent_s, cost))


def best_on_search(
    store: Store, search: SearchRow, front: Sequence[CandidateRow], baselines: Sequence[CandidateRow]
) -> dict[str, CandidateRow]:
    """The choices on the search split, by role."""
    preference = Preference.of_search(search)
    if len(preference.objectives) > 1:
        return chosen_of_front(preference, front, baselines)
    ((name, up),) = preference.objectives.items()
    rows = store.best(name, maximise=up)
    return {BEST: rows[0]} if rows else {}


def chosen_of_front(
    preference: Preference, front: Sequence[AnyCandidate], baselines: Sequence[AnyCandidate]
) -> dict[str, AnyCandidate]:
    """The choices among several objectives, by role. The best by any preference is always on the front."""
    losses, among = (preference.losses([row.objectives for row in rows]) for rows in (front, [*front, *baselines]))
    return {role: front[at] for role, at in preference.choose(losses, among).items()}


def unrecorded_s(store: Store) -> float:
    """Seconds that the running driver has spent since it last recorded them, with a tell; pauses do not count."""
    wanted = {"lease": 1, "tell": 1, "state": _RECENT}
    events = [event for kind, newest in wanted.items() for event in store.events(kinds=(kind,), newest=newest)]
    spent, since = 0.0, math.nan  # the start of the running interval; NaN while it is not running
    for event in sorted(events, key=lambda event: event.seq):
        runs = not math.isnan(since)
        if event.kind == "lease":  # unrecorded time of the previous driver is lost
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
    """The number of measured item scores of objectives and constraints."""
    record = search.record
    measures = record.measures
    if record.racing is None and record.screen is None:
        return done * _distinct_items(measures)  # without reading any rows
    return store.items_scored([measure.name for measure in _largest(measures)])


def _largest(measures: Sequence[Measure]) -> list[Measure]:
    """For each evaluator, the measure with the most items, which include those of its other measures."""
    most: dict[int, Measure] = {}
    for measure in measures:
        if measure.evaluator not in most or measure.items > most[measure.evaluator].items:
            most[measure.evaluator] = measure
    return list(most.values())


def _distinct_items(measures: Sequence[Measure]) -> int:
    """The number of items that a candidate is scored on for all of its measures."""
    return sum(measure.items for measure in _largest(measures))


def _screen(store: Store, search: SearchRow) -> ScreenState | None:
    """The screen as last recorded by the driver."""
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


def _refined(store: Store) -> str:
    """The latest split of groups in a coarse-to-fine search."""
    events = store.events(kinds=("refined",), newest=1)
    return events[0].read(Refined).text if events else ""


def _item_response(store: Store) -> dict[str, ItemErrors]:
    """The latest record of item response theory, by measure."""
    events = store.events(kinds=("item response",), newest=1)
    return events[0].read(ItemResponse).root if events else {}


def _unconfirmed(store: Store) -> list[str]:
    """Why candidates could not be scored on the held-out split."""
    events = store.events(kinds=("confirm failed",), newest=_RECENT)
    return [f"{failed.reason} in confirmation" for failed in (e.read(ConfirmFailed) for e in events) if failed.final]


def _unscored(
    store: Store, baselines: Sequence[CandidateRow], sources: Collection[str], held: Confirmed
) -> Iterator[Unscored]:
    """Baselines that have failed on the search split, or otherwise on the held-out split."""
    events = store.events(kinds=("confirm failed",), newest=_RECENT)
    there = {failed.candidate: failed.payload for failed in (e.read(ConfirmFailed) for e in events) if failed.final}
    confirmed = {baseline.id for baseline in held.baselines}
    for row in baselines:
        failure = row.failure if row.status == "failed" else there.get(row.number)
        if failure is None or row.id in confirmed:
            continue
        yield Unscored(
            id=row.id,
            label=row.label,
            origin=origin_of(row, sources),
            split="search" if row.status == "failed" else "held_out",
            reason=str(failure.get("reason", "")),
            message=str(failure.get("message", "")),
        )


def _mean_seconds(rows: Sequence[CandidateRow]) -> dict[str, float]:
    """The mean seconds of each phase over these candidates."""
    phases = dict.fromkeys(phase for row in rows for phase in row.timings)
    return {phase: float(np.mean([row.timings.get(phase, 0.0) for row in rows])) for phase in phases}


def _paces(rows: Sequence[CandidateRow], measures: Sequence[Measure]) -> list[tuple[str, float]]:
    """The worker and the seconds per item of each candidate that was scored on all items, so that they are comparable.

    If several workers have scored a candidate, rung by rung, it counts for the last one, which had most of the items.
    """
    wanted = {m.name: m.items for m in measures}
    items = _distinct_items(measures)
    return [
        (row.worker, sum(row.timings.values()) / items)
        for row in rows
        if row.timings and all(name in row.objectives and row.objectives[name].n >= n for name, n in wanted.items())
    ]


def slow_ones(paces: Sequence[tuple[str, float]]) -> list[Slow]:
    """Slow nodes, from workers and seconds per item of candidates, and slow workers on the other nodes."""
    nodes = _outliers("node", [(worker.partition("@")[2], pace) for worker, pace in paces if "@" in worker])
    known = {node.name for node in nodes}
    return nodes + _outliers(
        "worker", [(worker, pace) for worker, pace in paces if worker.partition("@")[2] not in known]
    )


def _outliers(kind: Literal["node", "worker"], paces: Sequence[tuple[str, float]]) -> list[Slow]:
    by: dict[str, list[float]] = {}
    for name, pace in paces:
        by.setdefault(name, []).append(pace)
    by = {name: seconds for name, seconds in sorted(by.items()) if len(seconds) >= _MIN_SCORED}
    slow = []
    for name, ours in by.items():
        others = [pace for other, theirs in by.items() if other != name for pace in theirs]
        if others and statistics.median(ours) > _SLOW * statistics.median(others):
            medians = {"seconds": statistics.median(ours), "others_seconds": statistics.median(others)}
            slow.append(Slow(kind=kind, name=name, candidates=len(ours), others_candidates=len(others), **medians))
    return slow


def describe_space(space: Mapping[str, object]) -> str:
    """The space in a few words: its kind unless it is a parameter space, the encoding of paths, the method, etc."""
    said = [space.get(key) for key in ("encoding", "method", "basis", "granularity")]
    details = [
        " or ".join(value) if isinstance(value, list | tuple) else str(value) for value in said if value is not None
    ]
    kind = [] if space["kind"] == "parameter_space" else [str(space["kind"]).replace("_", " ")]
    return " ".join([*kind, *details, *_profile(space.get("profile"))])


def _profile(profile: object) -> list[str]:
    """A profile over depth in a few words, if there is one."""
    match profile:
        case None:
            return []
        case {"cosines": cosines}:
            return [f"profile of {cosines} cosines"]
        case _:
            return [f"profile of {profile}"]


def _proxy(store: Store) -> ProxyState | None:
    """The latest descent of the proxy; None if there was none."""
    events = store.events(kinds=("descent",), newest=1)
    if not events:
        return None
    descent = events[0].read(Descent)
    before, after = descent.proxy
    known = store.events(kinds=("proxy",), newest=1)
    agreed = known[0].read(Agreed) if known else Agreed(points=0, tau=math.nan, on=True)
    return ProxyState(
        step=descent.step, rate=descent.rate, before=before, after=after,
        tau=None if math.isnan(agreed.tau) else agreed.tau, points=agreed.points, on=agreed.on,
    )  # fmt: skip
