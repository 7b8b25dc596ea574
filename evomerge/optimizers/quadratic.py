"""A least-squares quadratic of each objective over the unit box, and how much of the objective it explains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_SURE = 1e-9
"""If 1 - leverage is below this, a point alone determines the quadratic there, and its error is unknown."""


def terms(parameters: int) -> int:
    """How many coefficients a quadratic of this many parameters has: 21 for five."""
    return (parameters + 1) * (parameters + 2) // 2


@dataclass(frozen=True)
class Quadratic:
    """A quadratic of each objective.

    Attributes:
        coefficients: float64 [terms, objectives].
        explained: float64 [objectives], the share of each objective's variance that is predicted when each candidate
            is left out of the fit (leave-one-out R2); negative if the mean of the others would predict better.
    """

    coefficients: Vector
    explained: Vector

    @classmethod
    def fit(cls, units: Vector, losses: Vector) -> Quadratic:
        """The least-squares quadratic; if there are several, the one with the smallest coefficients.

        Args:
            units: float64 [candidates, parameters], points of the unit box.
            losses: float64 [candidates, objectives], finite.
        """
        left, sizes, right = np.linalg.svd(_design(units), full_matrices=False)
        kept = sizes > sizes.max() * max(len(units), len(sizes)) * np.finfo(np.float64).eps
        left, sizes, right = left[:, kept], sizes[kept], right[kept]
        projected = left.T @ losses
        coefficients = right.T @ (projected / sizes[:, None])
        free = 1.0 - (left**2).sum(axis=1)  # 1 - leverage of each point
        missed = (losses - left @ projected) / np.where(free > _SURE, free, math.nan)[:, None]
        mean_of_others = (losses - losses.mean(axis=0)) * len(losses) / max(len(losses) - 1, 1)
        return cls(coefficients, _explained((missed**2).sum(axis=0), (mean_of_others**2).sum(axis=0)))

    def values(self, units: Vector) -> Vector:
        """Evaluate the quadratics at points [points, parameters]: float64 [points, objectives]."""
        return np.asarray(_design(units) @ self.coefficients)


def _explained(missed: Vector, varied: Vector) -> Vector:
    """1 - missed / varied; minus infinity if unknown or if nothing varies."""
    is_known = np.isfinite(missed) & (varied > 0)
    return np.where(is_known, 1.0 - missed / np.where(is_known, varied, 1.0), -math.inf)


def _design(units: Vector) -> Vector:
    """float64 [points, terms]: 1, each parameter relative to the middle of the box, and all their pairwise products."""
    centred = units - 0.5
    first, second = np.triu_indices(units.shape[1])
    return np.column_stack([np.ones(len(units)), centred, centred[:, first] * centred[:, second]])
