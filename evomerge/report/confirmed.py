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
    entry_of,
    measures_of,
)
from evomerge.search.statistics import Matrix, luck_of_choice, mean_and_error, simultaneous_differences
from evomerge.store import CandidateRow, SearchRow, Store

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
        luck: by how much the best in the first objective looks better than it is, because it was chosen there, among
            those that keep the constraints.
        feasible: whether the winner keeps the constraints there. If not, no model does, and it misses them least.
    """

    frozen_at: float
    shortlist: int
    shortlists: int
    drawn: int
    comparisons: int
    confidence: float
    luck: float
    feasible: bool = True


class Confirmed(NamedTuple):
    """What is known from the held-out split: the shortlist with its differences, landmarks, the winner, its choice."""

    entries: list[ConfirmedEntry]
    baselines: list[Entry]
    winner: str | None
    choice: Choice | None


def confirmation(store: Store, search: SearchRow, landmarks: Sequence[CandidateRow]) -> Confirmed:
    """What is known from the held-out split; nothing before a shortlist is frozen."""
    events = store.events(kinds=("shortlist", "winner"))
    frozen = [event for event in events if event.kind == "shortlist"]
    if not frozen:
        return Confirmed([], [], None, None)
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
    feasible = {shown.id for shown in [*entries, *baselines] if shown.feasible}
    contenders = [items for number, items in {**ours, **marks}.items() if candidate_id(number) in feasible]
    # A winner of an earlier shortlist is none: the one that counts has not been scored to its end.
    winners = [e.payload for e in events if e.kind == "winner" and e.seq > frozen[-1].seq]
    choice = Choice(
        frozen_at=next(event.time for event in frozen if event.payload["candidates"] == last["candidates"]),
        shortlist=len(last["candidates"]),
        shortlists=len({tuple(event.payload["candidates"]) for event in frozen}),
        drawn=sum(bool(held_out(store, number, measures)) for number in last.get("drawn", [])),
        comparisons=len(ours) * len(others),
        confidence=confidence,
        luck=_luck(objectives[0], contenders, seed),
        feasible=winners[-1].get("feasible", True) if winners else True,
    )
    return Confirmed(entries, baselines, candidate_id(winners[-1]["candidate"]) if winners else None, choice)


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


def _luck(first: Measure, contenders: Sequence[Items], seed: int) -> float:
    if not contenders:
        return 0.0
    return luck_of_choice(np.stack([better(first, found[first["name"]]) for found in contenders], axis=1), seed)
