"""Which of several models a search prefers: by its one objective, by its scalarisation, or by none, along a front.

One place decides what is called the best, on the search split and on the held-out split, in every command and on every
page. Several objectives without a scalarisation have no best: such a front offers the best at each objective, and the
knee, the best compromise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from evomerge.front import knee, nondominated
from evomerge.optimizers.scalarisation import Scalarisation
from evomerge.search.preparing.setup import Setup
from evomerge.store import CandidateRow, Estimate, SearchRow, Store, summaries

Losses = NDArray[np.float64]
"""Losses of models, float64 [models, objectives]; lower is better."""

BEST, KNEE = "best", "knee"

_SCALARS = {"weighted_sum": "weighted sum", "chebyshev": "chebyshev distance"}  # names of objectives have no spaces

_EQUAL = 1e-9  # scaled sums that differ by less differ only by rounding

_SCALARISATION: TypeAdapter[Scalarisation] = TypeAdapter(Scalarisation)


def best_at(objective: str) -> str:
    """The name of the best in one of several objectives, by which it can also be requested."""
    return f"best at {objective}"


@dataclass(frozen=True)
class Preference:
    """How a search chooses among models.

    Attributes:
        objectives: whether higher is better, by the objectives' names, in order.
        scalarisation: makes one number of several objectives; None if there is one objective, or for a front.
    """

    objectives: Mapping[str, bool]
    scalarisation: Scalarisation | None

    @classmethod
    def of_setup(cls, setup: Setup) -> Preference:
        """The preference of a search as its driver knows it."""
        mix = getattr(setup.optimizer, "scalarisation", None)
        return cls({objective.name: objective.maximise for objective in setup.objectives}, mix)

    @classmethod
    def of_search(cls, search: SearchRow) -> Preference:
        """The preference of a recorded search."""
        objectives = {o.name: o.maximise for o in search.record.objectives}
        return cls.of(objectives, search.record.optimizer.scalarisation)

    @classmethod
    def of(cls, objectives: Mapping[str, bool], scalarisation: Mapping[str, object] | None) -> Preference:
        """The preference with these objectives and a scalarisation as in a search file.

        Raises:
            pydantic.ValidationError: the scalarisation is not valid.
        """
        return cls(objectives, None if scalarisation is None else _SCALARISATION.validate_python(scalarisation))

    @property
    def decides(self) -> bool:
        """Whether there is a single best: not if several objectives have no scalarisation."""
        return len(self.objectives) == 1 or self.scalarisation is not None

    @property
    def roles(self) -> list[str]:
        """The roles in a choice among models: the best, or the best at each objective and the knee."""
        return [BEST] if self.decides else [*map(best_at, self.objectives), KNEE]

    @property
    def parts(self) -> list[Preference]:
        """Preferences that each have a single best: this one if it has one, otherwise one for each objective."""
        return [self] if self.decides else [Preference({name: up}, None) for name, up in self.objectives.items()]

    @property
    def scalar(self) -> str:
        """The name of the number that decides among several objectives; empty if none does."""
        return "" if self.scalarisation is None else _SCALARS[self.scalarisation.name]

    @property
    def sign(self) -> float:
        """The factor by which ``order`` is shown: -1 for a weighted sum (higher is better), and 1 for a distance."""
        return -1.0 if self.scalarisation is None or self.scalarisation.name == "weighted_sum" else 1.0

    def losses(self, models: Sequence[Mapping[str, Estimate]]) -> Losses:
        """The losses of models from their estimates by objective; NaN where there is no estimate."""
        rows = [
            [
                (-1.0 if up else 1.0) * (known[name].mean if name in known else np.nan)
                for name, up in self.objectives.items()
            ]
            for known in models
        ]
        return np.array(rows, dtype=np.float64).reshape(len(models), len(self.objectives))

    def order(self, losses: Losses, among: Losses) -> NDArray[np.float64]:
        """The number by which models are ordered: float64 [models], lower is better.

        It is the loss in the only objective, or the scalarisation. For a front it is the sum of the scaled distances to
        the best in each objective; the knee has the smallest.

        Args:
            losses: of the models to order.
            among: float64 [more models, objectives]: losses that give the range by which objectives are scaled.
        """
        finite = among[np.isfinite(among).all(axis=1)]
        if len(self.objectives) == 1 or not len(finite):
            return losses[:, 0]
        if self.scalarisation is not None:
            return self.scalarisation(losses, finite.min(axis=0), finite.max(axis=0))
        front = finite[nondominated(finite)]
        best, worst = front.min(axis=0), front.max(axis=0)
        return np.asarray(((losses - best) / np.where(worst > best, worst - best, 1.0)).sum(axis=1))

    def choose(self, losses: Losses, among: Losses | None = None) -> dict[str, int]:
        """The row of ``losses`` that has each role, the first of equals; empty if no row is finite.

        ``among`` is as for ``order``; None stands for ``losses``.
        """
        known = np.flatnonzero(np.isfinite(losses).all(axis=1))
        if not len(known):
            return {}
        rows = losses[known]
        if self.decides:
            return {BEST: int(known[self.order(rows, rows if among is None else among).argmin()])}
        by_role = {}
        for place, name in enumerate(self.objectives):
            others = rows[:, np.arange(rows.shape[1]) != place]
            # Of equals in this objective, the one that is best in the next, so that a dominated one is never chosen.
            keys = [*others.T[::-1], rows[:, place]]
            by_role[best_at(name)] = int(known[np.lexsort(keys)[0]])
        return by_role | {KNEE: int(known[self._knee(rows, rows if among is None else among)])}

    def _knee(self, rows: Losses, among: Losses) -> int:
        """The row that is the knee. If no row is better than the line through the ends of the front, for example on a
        front of two, the row is chosen that loses least relative to the range of ``among``.
        """
        row, all_ = knee(rows), among[np.isfinite(among).all(axis=1)]
        sums = self.order(rows, rows)
        best, worst = all_.min(axis=0), all_.max(axis=0)
        lost = ((rows - best) / np.where(worst > best, worst - best, 1.0)).sum(axis=1)
        equal = np.flatnonzero(nondominated(rows) & (sums <= sums[row] + _EQUAL))
        return int(equal[lost[equal].argmin()])


def ranked(store: Store, preference: Preference, k: int) -> list[CandidateRow]:
    """The k best eligible candidates on the search split, best first; of equals, those on the front come first.

    With several objectives they are ordered in memory: 10,000 candidates take about 100 ms.
    """
    (first, up), *others = preference.objectives.items()
    if not others:
        return store.best(first, maximise=up, k=k)
    own, losses, on_front, among = _eligible(store, preference)
    order = preference.order(losses, among)
    return [store.candidate(int(own[at])) for at in np.lexsort((own, ~on_front, order))[:k]]


def best_so_far(store: Store, preference: Preference) -> list[tuple[int, float]]:
    """The candidates that were the best when they were scored, with the number that orders them, higher is better.

    For a front this is how near a compromise comes to the best in all objectives, relative to the present front.
    """
    (first, up), *others = preference.objectives.items()
    if not others:
        return summaries.best_so_far(store, first, maximise=up)
    own, losses, _, among = _eligible(store, preference)
    order = preference.order(losses, among)
    least = np.minimum.accumulate(order)
    steps = np.flatnonzero(np.r_[True, least[1:] < least[:-1]]) if len(order) else np.empty(0, dtype=np.int64)
    return [(int(own[at]), -float(order[at])) for at in steps]


def _eligible(store: Store, preference: Preference) -> tuple[NDArray[np.int64], Losses, NDArray[np.bool_], Losses]:
    """The numbers of eligible candidates with scores of their own, their losses, and whether they are on the front;
    then the losses of the front and the baselines, which always give the range of objectives.
    """
    known = summaries.columns(store, ("number", "eligible", "same_as", "on_front", "step"))
    numbers = np.array(known["number"], dtype=np.int64)
    losses = np.empty((len(numbers), len(preference.objectives)))
    for place, (name, up) in enumerate(preference.objectives.items()):
        losses[:, place] = (-1.0 if up else 1.0) * summaries.measured(store, name, numbers)[0]
    own = np.array([same is None for same in known["same_as"]], dtype=np.bool_)
    eligible = own & np.array(known["eligible"], dtype=np.bool_)
    taken = eligible & np.isfinite(losses).all(axis=1)
    on_front = np.array(known["on_front"], dtype=np.bool_)
    return numbers[taken], losses[taken], on_front[taken], losses[on_front | (np.array(known["step"]) == 0)]
