"""Summaries of searches and candidates for lists and API responses, from cheap queries only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import yaml

from evomerge.errors import InputError
from evomerge.mergekit import dump_recipe
from evomerge.recipes.base import read_recipe
from evomerge.report.confirmed import UNCONFIRMED, UNCONFIRMED_WHY, confirmation, is_left_unconfirmed
from evomerge.report.parameters import parameters_of
from evomerge.report.picks import Pick, picks_of
from evomerge.report.search_status import Counts, Scalarised
from evomerge.report.spending import cost_of, seconds_left
from evomerge.report.status import chosen_of_front, scalarised, unrecorded_s
from evomerge.search.estimation.preference import BEST, KNEE, Preference, best_so_far
from evomerge.service.bodies import (
    CandidateDetail,
    CandidateName,
    CandidateSummary,
    Objective,
    SearchSummary,
)
from evomerge.service.drivers import Drivers, DriverState
from evomerge.service.reading import PerState
from evomerge.service.root import Root
from evomerge.store import SearchRow, Store, summaries
from evomerge.store.record import Measure
from evomerge.store.rows import ListedCandidate, candidate_id

_POINTS = 24  # in a sparkline
_LARGEST_FRONT = 2**31 - 1  # no limit
_RECENT = 200  # candidates over which the mean cost is taken

_KNOWN: dict[tuple[str, int, str], tuple[int, list[tuple[int, float]]]] = {}  # (newest event, best so far)
_MAX_KNOWN = 1000  # searches


def summaries_of(root: Root, drivers: Drivers) -> Iterator[SearchSummary]:
    """Summaries of all searches; one that cannot be opened has the state "unreadable" and the reason."""
    for name, result in root.each(lambda name, store: summary_of(name, store, drivers.state_of(name, store))):
        yield SearchSummary.unreadable(name, result) if isinstance(result, str) else result


def summary_of(name: str, store: Store, driver: DriverState) -> SearchSummary:
    """The summary of a search, under the name that it has here."""
    search, counts = store.search(), Counts.of(store.counts())
    spent_s = search.spent_s + (unrecorded_s(store) if driver.holds else 0.0)
    preference, baselines = Preference.of_search(search), summaries.baselines(store)
    front = (
        summaries.page(store, summaries.Order(), _LARGEST_FRONT, front=True) if len(preference.objectives) > 1 else []
    )
    best = _best(store, preference, front, baselines)
    scalar = scalarised(preference, [*front, *baselines])
    state, why = driver.state, driver.why
    if state == "finished" and is_left_unconfirmed(store):
        state, why = UNCONFIRMED, UNCONFIRMED_WHY
    steps = _steps(store, preference)
    source = _best_source(preference, baselines, scalar)
    budget = search.record.budget
    cost, runs = cost_of(search, spent_s), driver.holds and driver.state == "running"
    eta_s = seconds_left(budget, counts.finished, spent_s, cost) if runs else None
    return SearchSummary(
        name=name,
        state=state,
        why=why,
        driver=driver.holds,
        created_at=search.created_at,
        spent_s=spent_s,
        counts=counts,
        budget=budget,
        eta_s=eta_s,
        cost=None if cost is None else cost.with_left(eta_s),
        best=None if best is None else _named(best, preference, scalar),
        best_role=KNEE if KNEE in preference.roles else BEST,
        best_source=None if source is None else _named(source, preference, scalar),
        sparkline=sparkline(steps, counts.asked),
        gpu_hours=_gpu_hours(store, search, counts.done + counts.eliminated),
        objectives=[Objective(name=o.name, maximise=o.maximise) for o in search.record.objectives],
        scalar=None if scalar is None else Objective(name=scalar.name, maximise=scalar.direction == "maximize"),
        confirmed=_confirmed(store),
    )


def _named(row: ListedCandidate, preference: Preference, scalar: Scalarised | None) -> CandidateName:
    """A candidate's name and scores, with the value of the scalarisation."""
    name = CandidateName.model_validate(row)
    return name.model_copy(update={"scalar": _scalar_of(row, preference, scalar)})


def _scalar_of(row: ListedCandidate, preference: Preference, scalar: Scalarised | None) -> float | None:
    """The value of the scalarisation on the search split; None if it was not computed."""
    if not row.objectives or scalar is None or scalar.best is None or scalar.worst is None:
        return None
    losses = preference.losses([row.objectives])
    return preference.sign * float(preference.order(losses, np.array([scalar.best, scalar.worst]))[0])


def _confirmed_pick(store: Store) -> Pick | None:
    """The winner, or the knee of a front, on held-out items; None before confirmation."""
    search = store.search()
    rows = store.candidates(step=0)
    held = confirmation(store, search, rows)
    if not held.chosen:
        return None
    preference = Preference.of_search(search)
    ways = {name: "maximize" if up else "minimize" for name, up in preference.objectives.items()}
    if preference.scalar:
        ways = {preference.scalar: "maximize" if preference.sign < 0 else "minimize", **ways}
    picks = picks_of({}, held, ways, [row.label for row in rows if row.origin == "source"])
    return next((pick for pick in picks if pick.role in (BEST, KNEE)), None)


_confirmed: PerState[Pick | None] = PerState(_confirmed_pick)


def _best(
    store: Store, preference: Preference, front: Sequence[ListedCandidate], baselines: Sequence[ListedCandidate]
) -> ListedCandidate | None:
    """The best candidate on the search split, or the knee of a front."""
    (first, up), *others = preference.objectives.items()
    if not others:
        return next(iter(store.best(first, maximise=up)), None)
    chosen = chosen_of_front(preference, front, baselines)
    return chosen.get(BEST, chosen.get(KNEE))


def _steps(store: Store, preference: Preference) -> list[tuple[int, float]]:
    """The best so far. This reads all candidates, so the result is cached until the search has new events."""
    key = (store.place, store.search_id, repr(preference))
    newest = summaries.last_event(store)
    if (known := _KNOWN.get(key)) is not None and known[0] == newest:
        return known[1]
    steps = best_so_far(store, preference)
    if len(_KNOWN) >= _MAX_KNOWN:
        _KNOWN.clear()
    _KNOWN[key] = newest, steps
    return steps


def sparkline(steps: list[tuple[int, float]], asked: int) -> list[float]:
    """The best so far after equal shares of the candidates, starting with the first score: at most _POINTS numbers."""
    at = [math.ceil(asked * (i + 1) / _POINTS) for i in range(_POINTS)] if asked > _POINTS else range(1, asked + 1)
    numbers = np.array([number for number, _ in steps])
    places = [int(np.searchsorted(numbers, end)) for end in at] if steps else []
    return [steps[place - 1][1] for place in places if place > 0]


def candidate_summaries(store: Store, rows: Sequence[ListedCandidate]) -> list[CandidateSummary]:
    """Summaries of candidates, with the value of the scalarisation if there is one."""
    shown = [CandidateSummary.model_validate(row) for row in rows]
    preference = Preference.of_search(store.search())
    if not preference.scalar:
        return shown
    front = summaries.page(store, summaries.Order(), _LARGEST_FRONT, front=True)
    scale = scalarised(preference, [*front, *summaries.baselines(store)])
    return [
        summary.model_copy(update={"scalar": _scalar_of(row, preference, scale)})
        for summary, row in zip(shown, rows, strict=True)
    ]


def candidate_detail(store: Store, number: int) -> CandidateDetail:
    """Everything known about a candidate. Raises InputError if there is none with this number."""
    row, search = store.candidate(number), store.search()
    held = confirmation(store, search, store.candidates(step=0))
    entry = next((entry for entry in [*held.entries, *held.baselines] if entry.id == candidate_id(number)), None)
    return CandidateDetail(
        **dict(CandidateSummary.model_validate(row)),
        recipe_hash=row.recipe_hash,
        recipe=yaml.safe_dump(json.loads(row.recipe), sort_keys=False, default_flow_style=None, allow_unicode=True),
        mergekit=_mergekit(row.recipe, search.record.sources),
        genome=dict(parameters_of(row.genome, search.record.parameters)),
        losses=None if row.losses is None else [*row.losses],
        timings=row.timings,
        failed=row.failure,
        held_out={} if entry is None else {**entry.objectives, **entry.constraints, **entry.features},
    )


def _mergekit(recipe: str, sources: Mapping[str, str]) -> str | None:
    try:
        return dump_recipe(read_recipe(recipe, sources))
    except InputError:  # mergekit cannot express it
        return None


def _best_source(
    preference: Preference, baselines: Sequence[ListedCandidate], scalar: Scalarised | None
) -> ListedCandidate | None:
    """The source that the search's preference ranks first."""
    known = [row for row in baselines if row.objectives]
    losses = preference.losses([row.objectives for row in known])
    among = losses
    if scalar is not None and scalar.best is not None and scalar.worst is not None:
        among = np.array([scalar.best, scalar.worst])
    order = preference.order(losses, among)
    sources = [at for at, row in enumerate(known) if row.origin == "source" and not math.isnan(order[at])]
    return known[min(sources, key=lambda at: order[at])] if sources else None


def _gpu_hours(store: Store, search: SearchRow, scored: int) -> float | None:
    """GPU hours spent on candidates, estimated from the mean of the latest ones; None without a GPU."""
    gpus = search.record.cluster.gpus_per_worker
    if gpus is None and (search.record.device or "").startswith("cuda"):
        gpus = 1.0
    if not gpus:
        return None
    order = summaries.Order(descending=True)
    recent = summaries.page(store, order, _RECENT, statuses=("done", "eliminated"))
    return float(gpus) * scored * float(np.mean([row.seconds for row in recent])) / 3600 if recent else 0.0


def measure_named(search: SearchRow, name: str | None) -> Measure:
    """An objective or a constraint of a search; the first objective if no name is given.

    Raises:
        InputError: there is none with this name.
    """
    measures = search.record.measures
    for measure in measures:
        if name in (None, measure.name):
            return measure
    known = ", ".join(measure.name for measure in measures)
    raise InputError("objective", f"there is none called {name!r}", f"There are {known}.")
