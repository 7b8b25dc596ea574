"""What the held-out split says of the shortlist and the landmarks, and how the winner was chosen there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from evomerge.report.entries import (
    ConfirmedEntry,
    ConfirmedValue,
    Entry,
    Gap,
    Measure,
    candidate_id,
    constraints_of,
    entry_of,
    is_exact,
    measures_of,
)
from evomerge.search.estimation.preference import BEST, KNEE, Preference, best_at
from evomerge.search.estimation.statistics import Matrix, luck_of_choice, mean_and_error, simultaneous_differences
from evomerge.store import CandidateRow, SearchRow, Store

CHOSEN_EVENTS = ("winner", "confirmed")
"""What is recorded when a choice is made: a winner, or that a front without one is confirmed."""

Items = dict[str, NDArray[np.float32]]  # for each measure a candidate's scores, float32 [items]


class Choice(BaseModel):
    """How the winner is chosen on the held-out split.

    Attributes:
        frozen_at: when the shortlist was first written down, in seconds since 1970.
        shortlist: how many candidates are on it.
        shortlists: how many different ones there were so far; from the second on, held-out scores were known already.
        drawn: how many that are on none are scored as well, for the picture of the winner's curse.
        comparisons: how many differences of each objective the intervals are corrected for.
        confidence: with which all of them hold at once.
        luck: by how much the best in what decides, the objective or a weighted sum, looks better than it is, because it
            was chosen there, among those that keep the constraints; 0 where nothing of the kind decides.
        feasible: whether the winner keeps the constraints there. If not, no model does, and it misses them least.
        made: whether the choice is made; not while what was written down is still being scored.
        too_few: objectives whose one held-out item says nothing of how good a model is, so that none is chosen by them.
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


class Confirmed(NamedTuple):
    """What is known from the held-out split: the shortlist with its differences, landmarks, and how a choice is made.

    ``chosen`` has the candidate in each role of the search's preference, by id; none before the choice is made.
    """

    entries: list[ConfirmedEntry]
    baselines: list[Entry]
    chosen: dict[str, str]
    choice: Choice | None

    @property
    def winner(self) -> str | None:
        """The one that is best, where there is one."""
        return self.chosen.get(BEST)


def confirmation(store: Store, search: SearchRow, landmarks: Sequence[CandidateRow]) -> Confirmed:
    """What is known from the held-out split; nothing before a shortlist is frozen."""
    events = store.events(kinds=("shortlist", *CHOSEN_EVENTS))
    frozen = [event for event in events if event.kind == "shortlist"]
    if not frozen:
        return Confirmed([], [], {}, None)
    objectives, seed = search.fingerprints["objectives"], search.settings["seed"]
    measures = measures_of(search.fingerprints)
    last, confidence = frozen[-1].payload, search.settings["confirm"]["confidence"]
    marks = {row.number: found for row in landmarks if (found := held_out(store, row.number, measures))}
    ours = {number: found for number in last["candidates"] if (found := held_out(store, number, measures))}
    others = {row.label: marks[row.number] for row in landmarks if row.number in marks and _is_compared(row)}
    gaps = {o["name"]: _gaps(o, ours, others, confidence, seed) for o in objectives}

    def told(row: CandidateRow, items: Items) -> Entry:
        return entry_of(row, {name: mean_and_error(values) for name, values in items.items()}, search.fingerprints)

    entries = []
    for number, items in ours.items():
        plain = told(store.candidate(number), items)
        values = {
            name: ConfirmedValue(**dict(value), difference=gaps[name][number])
            for name, value in plain.objectives.items()
        }
        entries.append(ConfirmedEntry(**dict(plain) | {"objectives": values}))
    baselines = [told(row, marks[row.number]) for row in landmarks if row.number in marks]
    shown = [*baselines, *entries]
    feasible = {each.id for each in shown if each.feasible}
    contenders = [items for number, items in {**ours, **marks}.items() if candidate_id(number) in feasible]
    # What an earlier shortlist chose does not count: this one has not been scored to its end.
    made = [e.payload for e in events if e.kind in CHOSEN_EVENTS and e.seq > frozen[-1].seq]
    preference = Preference.of_search(search)
    too_few = [
        o["name"]
        for o in objectives
        if not is_exact(o, search.fingerprints) and any(each.objectives[o["name"]].n == 1 for each in shown)
    ]
    choice = Choice(
        frozen_at=next(event.time for event in frozen if event.payload["candidates"] == last["candidates"]),
        shortlist=len(last["candidates"]),
        shortlists=len({tuple(event.payload["candidates"]) for event in frozen}),
        drawn=sum(bool(held_out(store, number, measures)) for number in last.get("drawn", [])),
        comparisons=len(ours) * len(others),
        confidence=confidence,
        luck=_luck(preference, objectives, contenders, seed),
        feasible=made[-1].get("feasible", True) if made else True,
        made=bool(made),
        too_few=too_few,
    )
    return Confirmed(entries, baselines, _chosen(preference, shown, search, choice) if made else {}, choice)


def _chosen(preference: Preference, shown: Sequence[Entry], search: SearchRow, choice: Choice) -> dict[str, str]:
    """The candidate in each role, by id, among those that keep the constraints or else miss them least.

    Chosen anew from the scores, not read: an older program recorded the best in the first objective.
    """
    if not shown:
        return {}
    limits = constraints_of(search.fingerprints)
    misses = np.array([sum(limits[n].violation(v.mean) for n, v in each.constraints.items()) for each in shown])
    kept = np.flatnonzero(misses == misses.min())
    among = preference.losses([{n: v.mean for n, v in each.objectives.items()} for each in shown])
    roles = preference.choose(among[kept], among)
    unknown = {best_at(name) for name in choice.too_few} | ({BEST, KNEE} if choice.too_few else set())
    return {role: shown[kept[at]].id for role, at in roles.items() if role not in unknown}


UNCONFIRMED = "interrupted"
"""The state of a search whose candidates are done and whose confirmation began and did not end."""

UNCONFIRMED_WHY = "while its best were confirmed; `evomerge confirm` goes on with it"


def is_left_unconfirmed(store: Store) -> bool:
    """Whether a confirmation began and has not made its choice."""
    last = store.events(kinds=("shortlist", *CHOSEN_EVENTS), newest=1)
    return bool(last) and last[0].kind == "shortlist"


def _is_compared(landmark: CandidateRow) -> bool:
    """Whether candidates are compared to a landmark: what a person would use without any search."""
    return landmark.origin in ("source", "average")


def held_out(store: Store, number: int, measures: Sequence[Measure]) -> Items:
    """A candidate's held-out scores, float32 [items], for each measure; empty while it has none."""
    found = {scores.evaluator: scores.metrics for scores in store.scores(number, "held_out")}
    if any(m["version"] not in found for m in measures):
        return {}
    return {m["name"]: found[m["version"]][m["metric"]] for m in measures}


def better(measure: Measure, values: NDArray[np.float32]) -> Matrix:
    """Scores of a measure in float64, so that more is better."""
    return values.astype(np.float64) * (1.0 if measure["maximise"] else -1.0)


def _gaps(
    objective: Measure, ours: Mapping[int, Items], others: Mapping[str, Items], confidence: float, seed: int
) -> dict[int, list[Gap]]:
    """For each candidate its differences to the others in an objective, corrected together."""
    pairs = [(number, label) for number in ours for label in others]
    if not pairs:
        return {number: [] for number in ours}
    name = objective["name"]
    differences = [better(objective, ours[n][name]) - better(objective, others[label][name]) for n, label in pairs]
    found = simultaneous_differences(np.stack(differences, axis=1), confidence, seed)
    gaps: dict[int, list[Gap]] = {number: [] for number in ours}
    for (number, label), corrected in zip(pairs, found, strict=True):
        gaps[number].append(Gap(to=label, **vars(corrected)))
    return gaps


def _luck(preference: Preference, objectives: Sequence[Measure], contenders: Sequence[Items], seed: int) -> float:
    """The luck of the choice where one number decides that is a mean of items or a sum of such."""
    mix = preference.scalarisation
    if not contenders or not preference.decides or (mix is not None and mix.name != "weighted_sum"):
        return 0.0
    weights = (1.0,) if mix is None else mix.weights
    parts = [
        weight * np.stack([better(objective, found[objective["name"]]) for found in contenders], axis=1)
        for objective, weight in zip(objectives, weights, strict=True)
        if min(len(found[objective["name"]]) for found in contenders) > 1  # of one item no luck is known
    ]
    return luck_of_choice(parts, seed) if parts else 0.0
