"""The winner's curse of a search: how far the best search scores fall on items that the search never saw.

Whoever is chosen for a high score was also lucky, and luck does not come twice. So the best are shown with both scores,
beside the landmarks, which nobody chose: what these fall by is how much harder the held-out items are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from evomerge.report.confirmed import better, held_out
from evomerge.report.entries import Known, Measure, Value, candidate_id, interval_text
from evomerge.report.status import status_of
from evomerge.search.estimation.statistics import Matrix, kendall_tau, mean_and_error, shift
from evomerge.store import CandidateRow, Store

_LEAST_POINTS = 3  # of fewer no line and no rank correlation says anything


class Point(BaseModel):
    """A candidate scored on both splits; ``confirmed`` when it could win, ``best`` when it is one of the best found."""

    id: str
    label: str
    landmark: bool
    confirmed: bool
    best: bool
    winner: bool
    search: Value
    held_out: Value


class Fall(BaseModel):
    """By how much a mean is better on search items than on held-out ones, with its interval, None of one item."""

    mean: float
    low: Known
    high: Known


class Curse(BaseModel):
    """The winner's curse in the first objective.

    Attributes:
        points: candidates with both scores, the best by search score first; then landmarks.
        best: how many of them are among the best by this objective that were to be scored on both splits.
        fall: of these on average; None without any.
        fall_of_landmarks: the same of the landmarks.
        excess: by how much more the best fall than the landmarks do; the interval is narrow, for items are the same.
        tau: Kendall's rank correlation of both scores over all candidates that the search found.
        slope: of held-out over search score among them, by least squares: what remains of a difference.
    """

    search: str
    objective: str
    maximise: bool
    confidence: float
    points: list[Point]
    best: int
    fall: Fall | None
    fall_of_landmarks: Fall | None
    excess: Fall | None
    tau: float | None
    slope: float | None

    @property
    def found(self) -> list[Point]:
        """The candidates that the search found."""
        return [point for point in self.points if not point.landmark]

    @property
    def landmarks(self) -> list[Point]:
        """Those that it began with."""
        return [point for point in self.points if point.landmark]


class _Both:
    """A candidate's scores of one objective on both splits, float64 [items] each, so that more is better."""

    def __init__(self, store: Store, row: CandidateRow, objectives: Sequence[Measure]) -> None:
        first = objectives[0]
        self.row = row
        searched = np.empty(0, np.float32)
        for scores in store.scores(row.number, "search"):
            if scores.evaluator == first["version"]:
                searched = scores.metrics[first["metric"]][scores.items < first["items"]]
        confirmed = held_out(store, row.number, objectives).get(first["name"], np.empty(0, np.float32))
        self.is_whole = len(searched) == first["items"] and len(confirmed) > 0
        self.search, self.held_out = better(first, searched), better(first, confirmed)
        self.values = [Value(**mean_and_error(values)) for values in (searched, confirmed)] if self.is_whole else []


def curse_of(store: Store) -> Curse:
    """What is known of the winner's curse; it has no points before a search is confirmed."""
    search, status = store.search(), status_of(store)
    objectives, settings = search.fingerprints["objectives"], search.settings["confirm"]
    first = objectives[0]
    landmarks = store.candidates(step=0)
    most = max(settings["top"], settings["drawn"])
    ranked = store.best(first["name"], maximise=first["maximise"], k=most + len(landmarks))
    best = [row for row in ranked if row.step > 0][:most]
    frozen = store.events(kinds=("shortlist",), newest=1)
    shortlist = [store.candidate(number) for event in frozen for number in event.payload["candidates"]]
    rows = {row.number: row for row in [*best, *shortlist]}
    found = [both for row in rows.values() if (both := _Both(store, row, objectives)).is_whole]
    found.sort(key=lambda both: (-both.search.mean(), both.row.number))
    marks = [both for row in landmarks if (both := _Both(store, row, objectives)).is_whole]
    top = [both for both in found if both.row.number in {row.number for row in best}]
    confirmed = {row.number for row in [*shortlist, *landmarks]}

    def point(both: _Both) -> Point:
        number = both.row.number
        return Point(
            id=candidate_id(number),
            label=both.row.label,
            landmark=both.row.step == 0,
            confirmed=number in confirmed,
            best=both in top,
            winner=candidate_id(number) == status.winner,
            search=both.values[0],
            held_out=both.values[1],
        )

    tau, slope = _association(found)
    return Curse(
        search=search.name,
        objective=first["name"],
        maximise=first["maximise"],
        confidence=settings["confidence"],
        points=[point(both) for both in [*found, *marks]],
        best=len(top),
        fall=_fall(top, [], settings["confidence"]),
        fall_of_landmarks=_fall(marks, [], settings["confidence"]),
        excess=_fall(top, marks, settings["confidence"]) if marks else None,
        tau=tau,
        slope=slope,
    )


def _fall(group: Sequence[_Both], others: Sequence[_Both], confidence: float) -> Fall | None:
    """By how much the group's mean falls, beyond that of the others; items are independent of each other."""
    if not group:
        return None

    def mean(split: str) -> Matrix:
        ours, theirs = (np.array([getattr(both, split) for both in each]) for each in (group, others))
        return np.asarray(ours.mean(axis=0) - (theirs.mean(axis=0) if others else 0.0))

    return Fall(**vars(shift(mean("search"), mean("held_out"), confidence)))


def _association(found: Sequence[_Both]) -> tuple[float | None, float | None]:
    """Kendall's tau and the slope; None where there is too little to tell."""
    if len(found) < _LEAST_POINTS:
        return None, None
    x, y = (np.array([getattr(both, split).mean() for both in found]) for split in ("search", "held_out"))
    tau = kendall_tau(x, y)
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else None
    return None if math.isnan(tau) else tau, slope


def curse_text(curse: Curse) -> list[str]:
    """What the picture shows, in sentences."""
    if curse.fall is None:
        return ["No candidate has both scores yet."]
    who = f"the {curse.best} best by {curse.objective}" if curse.best > 1 else f"the best by {curse.objective}"
    word, sure = "worse" if curse.fall.mean >= 0 else "better", f"{curse.confidence:.0%}"
    lines = [
        f"On held-out items {who} {'are' if curse.best > 1 else 'is'} {_size(curse.fall)} {word} ({sure} interval)."
    ]
    if curse.excess is not None and curse.fall_of_landmarks is not None:
        other = curse.fall_of_landmarks
        lines.append(
            f"The landmarks, which nobody chose, are {abs(other.mean):.3f} {'worse' if other.mean >= 0 else 'better'} "
            f"there: what is left, {_signed(curse.excess)}, is the winner's curse."
        )
    if curse.tau is not None and curse.slope is not None:
        lines.append(
            f"Among the {len(curse.found)} found, of a difference in search score {curse.slope:.2f} remains (slope), "
            f"and ranks agree with Kendall's tau {curse.tau:+.2f}."
        )
    return lines


def _size(fall: Fall) -> str:
    """A fall or rise by its size, its interval turned with it."""
    if fall.low is None or fall.high is None:
        return f"{abs(fall.mean):.3f}"
    if fall.mean >= 0:
        return f"{fall.mean:.3f} [{fall.low:.3f}, {fall.high:.3f}]"
    return f"{-fall.mean:.3f} [{-fall.high:.3f}, {-fall.low:.3f}]"


def _signed(fall: Fall) -> str:
    return f"{fall.mean:+.3f} {interval_text(fall.low, fall.high)}"
