"""The number that decides, from scores of items: its error, and its differences. It is the one objective, or what a
scalarisation makes of several.

Objectives that are scored on the same items vary together, so that their parts are added item by item; those on other
items are independent. A number that is no sum, such as Chebyshev's, is taken as the line that touches it at the means
(the delta method), and the range that objectives are scaled by as given.
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
"""Models to compare, by their places."""


@dataclass(frozen=True)
class Range:
    """The losses that objectives are scaled by, float64 [objectives]: the least and the largest that were seen."""

    best: Matrix
    worst: Matrix

    @classmethod
    def of(cls, losses: Matrix) -> Range | None:
        """That of models by their ``losses`` [models, objectives]; None where no row of them is finite."""
        finite = losses[np.isfinite(losses).all(axis=1)]
        return cls(finite.min(axis=0), finite.max(axis=0)) if len(finite) else None


@dataclass(frozen=True)
class Scored:
    """Some models in one objective.

    Attributes:
        scores: float64 [items, models], more is better.
        items: objectives with an equal number are scored on the same items, of which one may have fewer: the first.
        is_exact: whether it is counted and not sampled, so that its mean has no error.
    """

    scores: Matrix
    items: int
    is_exact: bool


class Combined:
    """The number by which some models are ordered, more is better: the negative of their loss in the one objective, or
    of the scalarisation of their losses.

    Attributes:
        means: float64 [models].
    """

    def __init__(self, mix: Scalarisation | None, objectives: Sequence[Scored], scale: Range | None = None) -> None:
        """``scale`` is the range of these models unless it is given."""
        losses = np.stack([-objective.scores.mean(axis=0) for objective in objectives], axis=1)
        span = scale or Range.of(losses) or Range(np.zeros(losses.shape[1]), np.ones(losses.shape[1]))
        self._objectives = objectives
        self.means: Matrix = -(losses[:, 0] if mix is None else mix(losses, span.best, span.worst))
        self._slopes: Matrix = np.ones_like(losses) if mix is None else mix.slopes(losses, span.best, span.worst)

    @cached_property
    def _deviations(self) -> dict[int, Matrix]:
        """By set of items float64 [items, models]: by how much an item's part in the number is above that of all."""
        deviations: dict[int, Matrix] = {}
        for place, objective in enumerate(self._objectives):
            if objective.is_exact:
                continue
            size = max(len(other.scores) for other in self._objectives if other.items == objective.items)
            own = np.zeros((size, len(self.means)))
            # Fewer items weigh more each, and the others say nothing.
            own[: len(objective.scores)] = (objective.scores - objective.scores.mean(axis=0)) * (
                size / len(objective.scores)
            )
            deviations[objective.items] = deviations.get(objective.items, 0.0) + self._slopes[:, place] * own
        return deviations

    @property
    def errors(self) -> Matrix:
        """The standard errors, float64 [models]; NaN where an objective has one item."""
        variance = np.zeros(len(self.means))
        for matrix in self._deviations.values():
            n = len(matrix)
            variance += (matrix**2).sum(axis=0) / (n * (n - 1)) if n > 1 else math.nan
        return np.sqrt(variance)

    def differences(self, pairs: Pairs, confidence: float, seed: int) -> list[Corrected]:
        """By how much the first of each pair is better than the other, with intervals that hold all at once."""
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
            bound = math.inf  # no sum
        return simultaneous_sums(
            means, list(deviations.values()), [typical[key] for key in deviations], confidence, seed, bound=bound
        )

    def difference(self, one: int, other: int, confidence: float) -> Difference:
        """By how much one is better than another, with an interval of its own."""
        mean = float(self.means[one] - self.means[other])
        deviations = [matrix[:, one] - matrix[:, other] for matrix in self._deviations.values()]
        return sum_interval(mean, deviations, confidence) if deviations else Difference(mean, mean, mean)

    def deviations_of(self, weights: Matrix) -> list[Matrix]:
        """By set of items float64 [items]: by how much an item's part in a weighted sum of these models is above that
        of all; ``weights`` is [models].
        """
        return [matrix @ weights for matrix in self._deviations.values()]

    def luck(self, models: Sequence[int], seed: int) -> float:
        """How much better than it is the best of these models looks because it was chosen by this number."""
        chosen = list(models)
        values = [matrix[:, chosen] for matrix in self._deviations.values() if len(matrix) > 1]
        return luck_of_choice([values[0] + self.means[chosen], *values[1:]], seed) if values else 0.0
