"""The results of the shortlist and the baselines on the held-out split, and how the winner was chosen there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from evomerge.report.entries import (
    ConfirmedEntry,
    ConfirmedEstimate,
    ConfirmedScalar,
    Entry,
    Gap,
    Scalar,
    constraints_of,
    entry_of,
    is_exact,
    origin_of,
)
from evomerge.search.estimation.combined import Combined, Range, Scored
from evomerge.search.estimation.preference import BEST, KNEE, Preference, best_at
from evomerge.search.estimation.statistics import Matrix, luck_of_choice, mean_and_error, simultaneous_differences
from evomerge.store import CandidateRow, EventRow, SearchRecord, SearchRow, Store
from evomerge.store.events import Chosen, Shortlist, State, Winner
from evomerge.store.record import Measure
from evomerge.store.rows import candidate_id

CHOSEN_EVENTS = ("winner", "confirmed")
"""The events that record a choice: a winner, or the confirmation of a front without one."""

Items = dict[str, NDArray[np.float32]]  # a candidate's scores by measure, float32 [items]


class Choice(BaseModel):
    """How the winner is chosen on the held-out split.

    Attributes:
        frozen_at: when the shortlist was first recorded, in seconds since 1970.
        shortlist: the number of candidates on it.
        shortlists: the number of different shortlists so far; from the second on, held-out scores were already known.
        drawn: the number of candidates on no shortlist that are scored as well, for the plot of the winner's curse.
        comparisons: the number of differences in each objective, and in the scalarisation, that intervals are corrected
            for.
        confidence: the confidence with which all intervals hold at once.
        luck: how much better the best in the number that decides looks than it is, because it was chosen there among
            those that satisfy the constraints; 0 if nothing decides.
        feasible: whether the winner satisfies the constraints there. If not, no model does, and it misses them least.
        made: whether the choice is made; False while the shortlist is still being scored.
        too_few: objectives with a single held-out item, which says too little to choose by.
    """

    frozen_at: float
    shortlist: int
    shortlists: int
    drawn: int
    comparisons: int
    confidence: float
    luck: float
    feasible: bool = True
    made: bool = False
    too_few: list[str] = []


class Effort(BaseModel):
    """The effort of the latest confirmation: all models and those scored, items per model, and seconds spent."""

    models: int
    models_done: int
    items_each: int
    seconds: float


class Confirmed(NamedTuple):
    """The results on the held-out split: the shortlist with its differences, the baselines, and the choice.

    ``chosen`` has the id of the candidate in each role of the search's preference; empty before the choice is made.
    """

    entries: list[ConfirmedEntry]
    baselines: list[Entry]
    chosen: dict[str, str]
    choice: Choice | None

    @property
    def winner(self) -> str | None:
        """The best one, if there is one."""
        return self.chosen.get(BEST)


def confirmation(store: Store, search: SearchRow, baseline_rows: Sequence[CandidateRow]) -> Confirmed:
    """The results on the held-out split; empty before a shortlist is recorded."""
    events = store.events(kinds=("shortlist", *CHOSEN_EVENTS))
    frozen = [event for event in events if event.kind == "shortlist"]
    if not frozen:
        return Confirmed([], [], {}, None)
    objectives, seed = search.record.objectives, search.record.seed
    measures = search.record.measures
    last, confidence = frozen[-1].read(Shortlist), search.record.confirm.confidence
    marks = {row.number: scores for row in baseline_rows if (scores := held_out(store, row.number, measures))}
    ours = {number: scores for number in last.candidates if (scores := held_out(store, number, measures))}
    others = {row.label: marks[row.number] for row in baseline_rows if row.number in marks and _is_compared(row)}
    gaps = {o.name: _gaps(o, ours, others, confidence, seed) for o in objectives}
    preference = Preference.of_search(search)
    numbers = _Numbers.of(store, search, preference, {**marks, **ours})
    entries = [_entry_with_gaps(store.candidate(n), items, search.record, gaps) for n, items in ours.items()]
    baselines = [_entry(row, marks[row.number], search.record) for row in baseline_rows if row.number in marks]
    if numbers is not None:
        compared = {row.label: row.number for row in baseline_rows if row.label in others}
        with_gaps = numbers.confirmed(list(ours), compared, confidence, seed)
        entries = [e.model_copy(update={"scalar": scalar}) for e, scalar in zip(entries, with_gaps, strict=True)]
        baselines = [e.model_copy(update={"scalar": numbers.scalar(number)}) for e, number in
                     zip(baselines, marks, strict=True)]  # fmt: skip
    shown = [*baselines, *entries]
    feasible = {entry.id for entry in shown if entry.feasible}
    contenders = {n: items for n, items in {**ours, **marks}.items() if candidate_id(n) in feasible}
    # A choice from an earlier shortlist does not count while this one is not completely scored.
    made = [_chosen_event(e) for e in events if e.kind in CHOSEN_EVENTS and e.seq > frozen[-1].seq]
    too_few = [
        o.name
        for o in objectives
        if not is_exact(o, search.record) and any(entry.objectives[o.name].n == 1 for entry in shown)
    ]
    luck = 0.0
    if numbers is not None:
        luck = numbers.luck(list(contenders), seed)
    elif preference.decides and preference.scalarisation is None:
        luck = _luck(objectives, list(contenders.values()), seed)
    choice = Choice(
        frozen_at=next(event.time for event in frozen if event.read(Shortlist).candidates == last.candidates),
        shortlist=len(last.candidates),
        shortlists=len({tuple(event.read(Shortlist).candidates) for event in frozen}),
        drawn=sum(bool(held_out(store, number, measures)) for number in last.drawn),
        comparisons=len(ours) * len(others),
        confidence=confidence,
        luck=luck,
        feasible=made[-1].feasible if made else True,
        made=bool(made),
        too_few=too_few,
    )
    return Confirmed(entries, baselines, _chosen(preference, shown, search, choice) if made else {}, choice)


def _entry(row: CandidateRow, items: Items, record: SearchRecord) -> Entry:
    """A candidate on the held-out split."""
    estimates = {name: mean_and_error(values) for name, values in items.items()}
    return entry_of(row, estimates, record).model_copy(update={"origin": origin_of(row, record.sources)})


def _entry_with_gaps(
    row: CandidateRow, items: Items, record: SearchRecord, gaps: Mapping[str, Mapping[int, list[Gap]]]
) -> ConfirmedEntry:
    """A candidate on the shortlist with its differences in each objective."""
    plain = _entry(row, items, record)
    values = {
        name: ConfirmedEstimate(**dict(value), difference=gaps[name][row.number])
        for name, value in plain.objectives.items()
    }
    return ConfirmedEntry(**dict(plain) | {"objectives": values})


def _chosen_event(event: EventRow) -> Winner | Chosen:
    return event.read(Winner) if event.kind == "winner" else event.read(Chosen)


def _chosen(preference: Preference, shown: Sequence[Entry], search: SearchRow, choice: Choice) -> dict[str, str]:
    """The id of the candidate in each role, among those that satisfy the constraints, or else miss them least.

    This is computed from the scores, not read, because an older program recorded the best in the first objective.
    """
    if not shown:
        return {}
    limits = constraints_of(search.record)
    misses = np.array([sum(limits[n].violation(v.mean) for n, v in entry.constraints.items()) for entry in shown])
    kept = np.flatnonzero(misses == misses.min())
    among = preference.losses([entry.objectives for entry in shown])
    roles = preference.choose(among[kept], among)
    unknown = {best_at(name) for name in choice.too_few} | ({BEST, KNEE} if choice.too_few else set())
    return {role: shown[kept[at]].id for role, at in roles.items() if role not in unknown}


def effort(
    store: Store, search: SearchRow, baseline_rows: Sequence[CandidateRow], held: Confirmed, *, is_driven: bool
) -> Effort | None:
    """The effort of the latest confirmation with the results ``held``; None before there is one."""
    events = store.events(kinds=("state", "lease", "shortlist", "confirm", "confirm failed", *CHOSEN_EVENTS))
    frozen = [event for event in events if event.kind == "shortlist"]
    if not frozen or held.choice is None:
        return None
    last = frozen[-1].read(Shortlist)
    wanted = {row.number for row in baseline_rows if row.status in ("done", "cached")}
    wanted |= {*last.candidates, *last.drawn}
    evaluators = {measure.evaluator for measure in search.record.measures}
    return Effort(
        models=len(wanted),
        models_done=len(held.entries) + len(held.baselines) + held.choice.drawn,
        items_each=sum(search.record.evaluators[number].held_out_items for number in evaluators),
        seconds=_confirming_s(events, time.time() if is_driven else None),
    )


def _confirming_s(events: Sequence[EventRow], now: float | None) -> float:
    """Seconds that drivers spent on the confirmation; a killed driver counts until its last event."""
    spent, since, last = 0.0, None, 0.0
    for event in events:
        if event.kind in ("state", "lease") and since is not None:
            spent += (event.time if event.kind == "state" else last) - since
            since = None
        if event.kind == "state" and event.read(State).state == "confirming":
            since = event.time
        last = event.time
    if since is not None:
        spent += (last if now is None else now) - since
    return max(0.0, spent)


UNCONFIRMED = "interrupted"
"""The state of a search whose candidates are done, and whose confirmation began but did not end."""

UNCONFIRMED_WHY = "while its best were confirmed; `evomerge confirm` continues it"


def is_left_unconfirmed(store: Store) -> bool:
    """Whether a confirmation began but has not made its choice."""
    last = store.events(kinds=("shortlist", *CHOSEN_EVENTS), newest=1)
    return bool(last) and last[0].kind == "shortlist"


def _is_compared(baseline: CandidateRow) -> bool:
    """Whether candidates are compared with a baseline, because a person would use it without a search."""
    return baseline.origin in ("source", "average")


def held_out(store: Store, number: int, measures: Sequence[Measure]) -> Items:
    """A candidate's held-out scores by measure, float32 [items]; empty if it has none."""
    by_version = {scores.evaluator: scores.metrics for scores in store.scores(number, "held_out")}
    if any(m.version not in by_version for m in measures):
        return {}
    return {m.name: by_version[m.version][m.metric] for m in measures}


def better(measure: Measure, values: NDArray[np.float32]) -> Matrix:
    """Scores of a measure in float64, with signs such that higher is better."""
    return values.astype(np.float64) * measure.sign


def _gaps(
    objective: Measure, ours: Mapping[int, Items], others: Mapping[str, Items], confidence: float, seed: int
) -> dict[int, list[Gap]]:
    """The differences of each candidate from the others in an objective, corrected together."""
    pairs = [(number, label) for number in ours for label in others]
    if not pairs:
        return {number: [] for number in ours}
    name = objective.name
    differences = [better(objective, ours[n][name]) - better(objective, others[label][name]) for n, label in pairs]
    corrected_differences = simultaneous_differences(np.stack(differences, axis=1), confidence, seed)
    gaps: dict[int, list[Gap]] = {number: [] for number in ours}
    for (number, label), corrected in zip(pairs, corrected_differences, strict=True):
        gaps[number].append(Gap(to=label, **vars(corrected)))
    return gaps


def _luck(objectives: Sequence[Measure], contenders: Sequence[Items], seed: int) -> float:
    """The luck of the choice if there is one objective."""
    (objective,) = objectives
    values = [better(objective, items[objective.name]) for items in contenders]
    return luck_of_choice([np.stack(values, axis=1)], seed) if values else 0.0


class _Numbers:
    """The scalarisation of models on the held-out split."""

    def __init__(self, preference: Preference, combined: Combined, places: Mapping[int, int], items: int) -> None:
        self._preference, self._combined, self._places, self._items = preference, combined, places, items

    @classmethod
    def of(
        cls, store: Store, search: SearchRow, preference: Preference, models: Mapping[int, Items]
    ) -> _Numbers | None:
        """The scalarisation of these models; None if there is no scalarisation, or no model."""
        if preference.scalarisation is None or not models:
            return None
        objectives = search.record.objectives
        scores = [np.stack([better(o, items[o.name]) for items in models.values()], axis=1) for o in objectives]
        combined = combined_of(store, search, preference, scores, "held_out")
        return cls(preference, combined, {n: at for at, n in enumerate(models)}, sum(len(matrix) for matrix in scores))

    def scalar(self, number: int) -> Scalar:
        at = self._places[number]
        return Scalar(
            name=self._preference.scalar,
            mean=-self._preference.sign * float(self._combined.means[at]) + 0.0,  # no negative zero
            stderr=float(self._combined.errors[at]),
            n=self._items,
        )

    def confirmed(
        self, ours: Sequence[int], others: Mapping[str, int], confidence: float, seed: int
    ) -> list[ConfirmedScalar]:
        """Candidates with their differences from others by label, corrected together."""
        pairs = [(number, label) for number in ours for label in others]
        places = [(self._places[number], self._places[others[label]]) for number, label in pairs]
        corrected_differences = self._combined.differences(places, confidence, seed) if pairs else []
        gaps: dict[int, list[Gap]] = {number: [] for number in ours}
        for (number, label), corrected in zip(pairs, corrected_differences, strict=True):
            gaps[number].append(Gap(to=label, **vars(corrected)))
        return [ConfirmedScalar(**dict(self.scalar(number)), difference=gaps[number]) for number in ours]

    def luck(self, contenders: Sequence[int], seed: int) -> float:
        return self._combined.luck([self._places[number] for number in contenders], seed)


def combined_of(
    store: Store,
    search: SearchRow,
    preference: Preference,
    scores: Sequence[Matrix],
    split: str,
    scale: Range | None = None,
) -> Combined:
    """The number that decides between models, by a preference with one objective or a scalarisation.

    Args:
        scores: by objective of the preference, float64 [items, models], higher is better.
        scale: the ranges of objectives; by default those of these models.
    """
    objectives = [o for o in search.record.objectives if o.name in preference.objectives]
    sets = _sets_of_items(store, [o.version for o in objectives], split)
    parts = [
        Scored(values, sets[o.version], is_exact(o, search.record))
        for o, values in zip(objectives, scores, strict=True)
    ]
    return Combined(preference.scalarisation, parts, scale)


def _sets_of_items(store: Store, versions: Sequence[str], split: str) -> dict[str, int]:
    """Equal numbers for evaluator versions with the same items of a split."""
    if len(versions) == 1:
        return {versions[0]: 0}
    sets: dict[str, int] = {}
    asked: dict[tuple[str, ...], int] = {}
    for version in dict.fromkeys(versions):
        questions = tuple(question for question, _ in store.item_texts(version, split))
        sets[version] = asked.setdefault(questions, len(sets)) if questions else len(sets)
    return sets
