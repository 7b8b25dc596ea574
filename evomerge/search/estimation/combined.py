"""The number that decides between models, with its standard error and its differences, computed from scores of items.

It is the only objective, or the scalarisation of several. Objectives that are scored on the same items are correlated,
so their contributions are added item by item; those on different items are independent. A scalarisation that is not
linear, such as Chebyshev's, is replaced by its tangent at the means (the delta method). The range by which objectives
are scaled counts as a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evomerge.optimizers.scalarisation import Scalarisation
from evomerge.search.estimation.statistics import (
    Corrected,
    Difference,
    Matrix,
    bound_of,
    luck_of_choice,
    simultaneous_sums,
    sum_interval,
    typical_squares,
)

Pairs = Sequence[tuple[int, int]]
"""Pairs of models to compare, by their indices."""


@dataclass(frozen=True)
class Range:
    """The range by which losses are scaled, float64 [objectives]: the smallest and the largest in each objective."""

    best: Matrix
    worst: Matrix

    @classmethod
    def of(cls, losses: Matrix) -> Range | None:
        """The range of ``losses``, float64 [models, objectives], over the finite rows; None if there are none."""
        finite = losses[np.isfinite(losses).all(axis=1)]
        return cls(finite.min(axis=0), finite.max(axis=0)) if len(finite) else None


@dataclass(frozen=True)
class Scored:
    """The scores of some models in one objective.

    Attributes:
        scores: float64 [items, models], higher is better.
        items: identifies the set of items; objectives with the same number are scored on the same items. One may have
            fewer than another: the first ones.
        is_exact: whether the objective is counted, not sampled, so that its mean has no error.
    """

    scores: Matrix
    items: int
    is_exact: bool


class Combined:
    """The number by which some models are ordered: the negative loss in the only objective, or in the scalarisation.

    Args:
        mix: the scalarisation; None if there is one objective.
        objectives: the scores of the models in each objective.
        scale: the range by which losses are scaled; None for that of these models.

    Attributes:
        means: float64 [models], higher is better.
    """

    def __init__(self, mix: Scalarisation | None, objectives: Sequence[Scored], scale: Range | None = None) -> None:
        losses = np.stack([-objective.scores.mean(axis=0) for objective in objectives], axis=1)
        span = scale or Range.of(losses) or Range(np.zeros(losses.shape[1]), np.ones(losses.shape[1]))
        self._objectives = objectives
        self.means: Matrix = -(losses[:, 0] if mix is None else mix(losses, span.best, span.worst))
        self._slopes: Matrix = np.ones_like(losses) if mix is None else mix.slopes(losses, span.best, span.worst)

    @cached_property
    def _deviations(self) -> dict[int, Matrix]:
        """For each set of items, float64 [items, models]: each item's contribution to the number, minus their mean."""
        deviations: dict[int, Matrix] = {}
        for place, objective in enumerate(self._objectives):
            if objective.is_exact:
                continue
            size = max(len(other.scores) for other in self._objectives if other.items == objective.items)
            own = np.zeros((size, len(self.means)))
            # If this objective has fewer items than others, each weighs more, and the missing ones contribute nothing.
            own[: len(objective.scores)] = (objective.scores - objective.scores.mean(axis=0)) * (
                size / len(objective.scores)
            )
            deviations[objective.items] = deviations.get(objective.items, 0.0) + self._slopes[:, place] * own
        return deviations

    @property
    def errors(self) -> Matrix:
        """The standard errors, float64 [models]; NaN if an objective has only one item."""
        variance = np.zeros(len(self.means))
        for matrix in self._deviations.values():
            n = len(matrix)
            variance += (matrix**2).sum(axis=0) / (n * (n - 1)) if n > 1 else math.nan
        return np.sqrt(variance)

    def differences(self, pairs: Pairs, confidence: float, seed: int) -> list[Corrected]:
        """By how much the first model of each pair is better than the second, with simultaneous intervals.

        Args:
            pairs: at least one.
            confidence: that all intervals hold at once; see ``simultaneous_sums``.
            seed: of its draws.
        """
        ours, theirs = (np.array(side, dtype=np.int64) for side in zip(*pairs, strict=True))
        deviations = {key: matrix[:, ours] - matrix[:, theirs] for key, matrix in self._deviations.items()}
        means = self.means[ours] - self.means[theirs]
        if not deviations:
            return [Corrected(mean, mean, mean, 1.0) for mean in means.tolist()]
        typical = {key: np.zeros(len(pairs)) for key in deviations}
        bound = 0.0
        for place, objective in enumerate(self._objectives):
            largest = np.maximum(self._slopes[ours, place], self._slopes[theirs, place])
            between = objective.scores[:, ours] - objective.scores[:, theirs]
            if objective.is_exact:
                bound = math.inf
                continue
            typical[objective.items] += largest**2 * typical_squares(between)
            bound += float(largest.max()) * bound_of(between)
        if np.ptp(self._slopes, axis=0).any():
            bound = math.inf  # the number is not linear in the scores
        return simultaneous_sums(
            means, list(deviations.values()), [typical[key] for key in deviations], confidence, seed, bound=bound
        )

    def difference(self, one: int, other: int, confidence: float) -> Difference:
        """By how much one model is better than another, with an interval for this comparison alone."""
        mean = float(self.means[one] - self.means[other])
        deviations = [matrix[:, one] - matrix[:, other] for matrix in self._deviations.values()]
        return sum_interval(mean, deviations, confidence) if deviations else Difference(mean, mean, mean)

    def deviations_of(self, weights: Matrix) -> list[Matrix]:
        """For each set of items, float64 [items]: each item's contribution to a weighted sum of these models' numbers,
        minus the mean one. ``weights`` is float64 [models].
        """
        return [matrix @ weights for matrix in self._deviations.values()]

    def luck(self, models: Sequence[int], seed: int) -> float:
        """By how much the best of these models is overestimated because it was chosen by this number.

        See ``luck_of_choice``; ``seed`` is that of its draws.
        """
        chosen = list(models)
        values = [matrix[:, chosen] for matrix in self._deviations.values() if len(matrix) > 1]
        return luck_of_choice([values[0] + self.means[chosen], *values[1:]], seed) if values else 0.0
