"""The winner's curse of a search: how far the best search scores drop on items that the search never saw.

A candidate that is chosen for a high score was also lucky, and luck does not repeat. So the best are shown with both
scores, next to the baselines, which were not chosen: their drop shows how much harder the held-out items are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from evomerge.report.confirmed import Items, better, combined_of, held_out
from evomerge.report.entries import interval_text
from evomerge.report.search_status import SearchStatus, scale_of
from evomerge.report.status import status_of
from evomerge.search.estimation.combined import Combined
from evomerge.search.estimation.preference import Preference, ranked
from evomerge.search.estimation.statistics import Matrix, kendall_tau, sum_interval
from evomerge.store import CandidateRow, SearchRow, Store
from evomerge.store.events import Shortlist
from evomerge.store.record import Measure
from evomerge.store.rows import Estimate, NullableFloat

_MIN_POINTS = 3  # with fewer points, a regression line and a rank correlation mean nothing


class SplitScores(BaseModel):
    """A candidate scored on both splits; ``confirmed`` if it could win, ``best`` if it is among the best found."""

    model_config = ConfigDict(serialize_by_alias=True)

    id: str
    label: str
    baseline: bool = Field(serialization_alias="landmark")
    confirmed: bool
    best: bool
    winner: bool
    search: Estimate
    held_out: Estimate


class Fall(BaseModel):
    """How much better a mean is on search items than on held-out ones, with its interval (None for a single item)."""

    mean: float
    low: NullableFloat
    high: NullableFloat


class Curse(BaseModel):
    """The winner's curse in the only objective, in a scalarisation, or in an objective of a front.

    Attributes:
        objective: the name of the objective or the scalarisation.
        points: candidates with both scores, best by search score first; then baselines.
        best: how many of them are among the best by this objective that were selected for scoring on both splits.
        fall: the average drop of the best; None if there are none.
        fall_of_baselines: the average drop of the baselines.
        excess: how much more the best drop than the baselines; the interval is narrow, because the items are the same.
        tau: Kendall's rank correlation of both scores over all candidates that the search found.
        slope: the least-squares slope of held-out over search score among them: what remains of a difference.
        others: for a front, the same in its other objectives.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    search: str
    objective: str
    maximise: bool
    confidence: float
    points: list[SplitScores]
    best: int
    fall: Fall | None
    fall_of_baselines: Fall | None = Field(serialization_alias="fall_of_landmarks")
    excess: Fall | None
    tau: float | None
    slope: float | None
    others: list[Curse] = []

    @property
    def all(self) -> list[Curse]:
        """This one and the others."""
        return [self, *self.others]

    @property
    def candidates(self) -> list[SplitScores]:
        """The candidates that the search found."""
        return [point for point in self.points if not point.baseline]

    @property
    def baselines(self) -> list[SplitScores]:
        """The baselines."""
        return [point for point in self.points if point.baseline]


@dataclass(frozen=True)
class _Measured:
    """Candidates with both scores.

    Attributes:
        rows: the candidates, [models].
        splits: the number that decides, higher is better, for these models on the search and on the held-out split.
        sign: the sign of displayed values: 1 if higher is better.
        items: the number of items behind the numbers, by split.
    """

    rows: list[CandidateRow]
    splits: tuple[Combined, Combined]
    sign: float
    items: tuple[int, int]

    def values(self, at: int) -> tuple[Estimate, Estimate]:
        """The values of a model on both splits."""
        before, after = (
            Estimate(mean=self.sign * float(split.means[at]) + 0.0, stderr=float(split.errors[at]), n=n)
            for split, n in zip(self.splits, self.items, strict=True)
        )
        return before, after

    def fall(self, group: Sequence[int], others: Sequence[int], confidence: float) -> Fall | None:
        """How far the mean of a group of models drops, compared with that of the others; the splits are independent."""
        if not group:
            return None
        weights = np.zeros(len(self.rows))
        weights[list(group)] = 1 / len(group)
        if others:
            weights[list(others)] -= 1 / len(others)
        before, after = self.splits
        mean = float((before.means - after.means) @ weights)
        deviations = [*before.deviations_of(weights), *after.deviations_of(weights)]
        return Fall(**vars(sum_interval(mean, deviations, confidence)))


def curse_of(store: Store) -> Curse:
    """The winner's curse of a search; it has no points before confirmation."""
    search, status = store.search(), status_of(store)
    preference = Preference.of_search(search)
    first, *others = (_curse(store, search, status, part) for part in preference.parts)
    return first.model_copy(update={"others": others})


def _curse(store: Store, search: SearchRow, status: SearchStatus, preference: Preference) -> Curse:
    """The curse in the number that a preference uses."""
    settings = search.record.confirm
    baselines = store.candidates(step=0)
    most = max(settings.top, settings.drawn)
    best = [row for row in ranked(store, preference, most + len(baselines)) if row.step > 0][:most]
    frozen = store.events(kinds=("shortlist",), newest=1)
    shortlist = [store.candidate(number) for event in frozen for number in event.read(Shortlist).candidates]
    by_number = {row.number: row for row in [*best, *shortlist]}
    known = _measured(store, search, status, preference, [*by_number.values(), *baselines])
    leading = {row.number for row in best}
    could_win = {row.number for row in [*shortlist, *baselines]}
    top = [at for at, row in enumerate(known.rows) if row.number in leading]
    marks = [at for at, row in enumerate(known.rows) if row.step == 0]

    def point(at: int) -> SplitScores:
        row = known.rows[at]
        on_search, there = known.values(at)
        return SplitScores(
            id=row.id,
            label=row.label,
            baseline=row.step == 0,
            confirmed=row.number in could_win,
            best=row.number in leading,
            winner=row.id == status.winner,
            search=on_search,
            held_out=there,
        )

    finds = [at for at, row in enumerate(known.rows) if row.step > 0]
    finds.sort(key=lambda at: (-known.splits[0].means[at], known.rows[at].number))
    tau, slope = _association(*(split.means[finds] for split in known.splits))
    name = preference.scalar or next(iter(preference.objectives))
    confidence = settings.confidence
    return Curse(
        search=search.name,
        objective=name,
        maximise=status.numbers[name] == "maximize",
        confidence=confidence,
        points=[point(at) for at in [*finds, *marks]],
        best=len(top),
        fall=known.fall(top, [], confidence),
        fall_of_baselines=known.fall(marks, [], confidence),
        excess=known.fall(top, marks, confidence) if marks else None,
        tau=tau,
        slope=slope,
    )


def _measured(
    store: Store, search: SearchRow, status: SearchStatus, preference: Preference, rows: Sequence[CandidateRow]
) -> _Measured:
    """Those of some candidates that were completely scored on both splits."""
    all_objectives: Sequence[Measure] = search.record.objectives
    objectives = [o for o in all_objectives if o.name in preference.objectives]
    whole: list[CandidateRow] = []
    scores: dict[Literal["search", "held_out"], list[Items]] = {"search": [], "held_out": []}
    for row in {row.number: row for row in rows}.values():
        searched, confirmed = _searched(store, row, objectives), held_out(store, row.number, all_objectives)
        if searched and confirmed:
            whole.append(row)
            scores["search"].append(searched)
            scores["held_out"].append(confirmed)
    scale = scale_of(status, "search")  # used for both splits, so that they can be compared

    def number(split: Literal["search", "held_out"]) -> tuple[Combined, int]:
        values = [
            np.stack([better(o, items[o.name]) for items in scores[split]], axis=1) if whole else np.empty((1, 0))
            for o in objectives
        ]
        return combined_of(store, search, preference, values, split, scale), sum(len(matrix) for matrix in values)

    (before, n_before), (after, n_after) = number("search"), number("held_out")
    way = status.numbers[preference.scalar or objectives[0].name]
    sign = 1.0 if way == "maximize" else -1.0
    return _Measured(whole, (before, after), sign, (n_before, n_after))


def _searched(store: Store, row: CandidateRow, objectives: Sequence[Measure]) -> Items:
    """A candidate's search scores in each objective; empty if it was not scored on all items of every objective."""
    known = {scores.evaluator: scores for scores in store.scores(row.number, "search")}
    by_objective: Items = {}
    for objective in objectives:
        scores = known.get(objective.version)
        if scores is None:
            return {}
        by_objective[objective.name] = scores.metrics[objective.metric][scores.items < objective.items]
    is_whole = all(len(by_objective[objective.name]) == objective.items for objective in objectives)
    return by_objective if is_whole else {}


def _association(x: Matrix, y: Matrix) -> tuple[float | None, float | None]:
    """Kendall's tau and the slope of two numbers [n]; None if there are too few points."""
    if len(x) < _MIN_POINTS:
        return None, None
    tau = kendall_tau(x, y)
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else None
    return None if math.isnan(tau) else tau, slope


def curse_text(curse: Curse) -> list[str]:
    """The content of the plot in sentences."""
    if curse.fall is None:
        return ["No candidate of the best in search has both scores yet."]
    who = f"the {curse.best} best by {curse.objective}" if curse.best > 1 else f"the best by {curse.objective}"
    word, sure = "worse" if curse.fall.mean >= 0 else "better", f"{curse.confidence:.0%}"
    lines = [
        f"On held-out items {who} {'are' if curse.best > 1 else 'is'} {_size(curse.fall)} {word} ({sure} interval)."
    ]
    if curse.excess is not None and curse.fall_of_baselines is not None:
        other = curse.fall_of_baselines
        marks = f"{abs(other.mean):.3f} {'worse' if other.mean >= 0 else 'better'}"
        left = f"what is left, {_signed(curse.excess)}, is the winner's curse"
        if curse.excess.mean <= 0:
            left = (
                f"the best lost no more than these ({_signed(curse.excess)}), so there is no sign of a winner's curse"
            )
        lines.append(f"The baselines, which nobody chose, are {marks} there: {left}.")
    if curse.tau is not None and curse.slope is not None:
        lines.append(
            f"Among the {len(curse.candidates)} found, a difference in search score is {curse.slope:.2f} times as "
            f"large on held-out items (slope), and the ranks agree with Kendall's tau {curse.tau:+.2f}."
        )
    return lines


def _size(fall: Fall) -> str:
    """The magnitude of a drop or rise, with its interval."""
    if fall.low is None or fall.high is None:
        return f"{abs(fall.mean):.3f}"
    if fall.mean >= 0:
        return f"{fall.mean:.3f} [{fall.low:.3f}, {fall.high:.3f}]"
    return f"{-fall.mean:.3f} [{-fall.high:.3f}, {-fall.low:.3f}]"


def _signed(fall: Fall) -> str:
    return f"{fall.mean:+.3f} {interval_text(fall.low, fall.high)}"
