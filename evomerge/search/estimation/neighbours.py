"""Estimates that also use a candidate's neighbours: a Gaussian process over the scores of all candidates.

The best of many estimates is mostly lucky, and one that was lucky on all items keeps others from being scored further:
in simulated searches a race stopped there, without recognising better candidates that it had found. Neighbours have
independent luck. So candidates are compared by the mean of a Gaussian process (Rasmussen & Williams, Gaussian Processes
for Machine Learning, 2006, eq. 2.23) of the unit box, which knows how many items each estimate is of. Its length,
height and roughness are those of a small grid that make the estimates likeliest (eq. 2.30).

What is estimated is the mean over the search's items. That these are themselves a sample is an error that all
candidates share, and no part of the noise here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import one_thread
from evomerge.optimizers.cma_es import Box
from evomerge.search.preparing.setup import ObjectiveInfo
from evomerge.store import Estimate

MIN_POINTS = 20
"""The smallest number of candidates for a model."""

MAX_POINTS = 200
"""Only the latest candidates are used: the search is near them, and a model of more takes seconds."""

LENGTHS = (0.05, 0.1, 0.18, 0.3, 0.45, 0.7)
"""Lengths over which scores change, in parts of the diagonal of the unit box."""

HEIGHTS = (0.2, 1.0, 4.0)
"""Variances of the function, in parts of that of the estimates."""

ROUGHNESS = (0.15, 0.3, 1.0, 3.0)
"""Variances of what is a candidate's own and no neighbour's, in parts of the variance of a mean of all items."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Neighbour:
    """A candidate as a point of the Gaussian process.

    Attributes:
        unit: float64 [parameters], its point of the unit box.
        loss: less is better.
        variance: of the loss as that of all such items.
        is_rival: whether it was scored on every item and may be the best.
    """

    unit: Vector
    loss: float
    variance: float
    is_rival: bool


class Neighbours:
    """The latest candidates of a search with one objective."""

    def __init__(self, parameters: Sequence[Parameter], objective: ObjectiveInfo) -> None:
        self._box, self._objective = Box(parameters), objective
        self._told: deque[Neighbour] = deque(maxlen=MAX_POINTS)

    def take(self, genome: Genome, estimate: Estimate, *, is_rival: bool) -> None:
        """Add a told candidate."""
        self._told.append(self._neighbour(genome, estimate, is_rival))

    def are_enough(self, others: int) -> bool:
        """Whether there is a model with so many others, and a rival to be better than."""
        return len(self._told) + others >= MIN_POINTS and any(point.is_rival for point in self._told)

    def leader(self, others: Sequence[tuple[Genome, Estimate]], among: Sequence[int]) -> int | None:
        """The leader among candidates that were not told yet, if it is better than every rival; otherwise None.

        Args:
            among: who of the others may lead, by position.
        """
        points = [*self._told, *(self._neighbour(genome, estimate, is_rival=False) for genome, estimate in others)]
        rivals = [number for number, point in enumerate(points) if point.is_rival]
        if not among:
            return None
        losses, variances = (np.array([getattr(p, name) for p in points]) for name in ("loss", "variance"))
        of_all = float(variances[rivals].mean())  # the error in which all candidates share
        noise = np.maximum(variances - of_all, 0.0)
        noise[rivals] = 0.0
        pooled = posterior(np.array([point.unit for point in points]), losses, noise, of_all)
        ours = pooled[len(self._told) :]
        best = min(among, key=lambda number: float(ours[number]))
        return best if ours[best] < pooled[rivals].min() else None

    def _neighbour(self, genome: Genome, estimate: Estimate, is_rival: bool) -> Neighbour:
        loss = self._objective.loss(estimate.mean)
        return Neighbour(self._box.unit(genome), loss, (estimate.stderr or 0.0) ** 2, is_rival)


def posterior(units: Vector, means: Vector, noise: Vector, of_all: float) -> Vector:
    """The mean of the likeliest Gaussian process at the points that it is of: float64 [points].

    Args:
        units: float64 [points, parameters], in the unit box.
        means: float64 [points], what was seen there.
        noise: float64 [points], its variance.
        of_all: the variance of a mean of all items.
    """
    spread, least = float(means.var()), 1e-9 + 1e-6 * of_all
    if spread <= least:
        return means
    squares, best, likeliest = (units**2).sum(axis=1), means, -np.inf
    with one_thread():
        distances = np.maximum(squares[:, None] + squares[None, :] - 2 * units @ units.T, 0.0) / units.shape[1]
        for length in LENGTHS:
            shape = np.exp(-distances / (2 * length**2))
            for height, rough in product(HEIGHTS, ROUGHNESS):
                found = _fitted(height * spread * shape, means, noise + rough * of_all + least)
                if found is not None and found[1] > likeliest:
                    best, likeliest = found
    return best


def _fitted(covariance: Vector, means: Vector, noise: Vector) -> tuple[Vector, float] | None:
    """The posterior at the points, around a mean by generalised least squares, and the logarithm of the likelihood."""
    try:
        factor = cho_factor(covariance + np.diag(noise), lower=True, check_finite=False)
    except LinAlgError:
        return None
    ones = cho_solve(factor, np.ones_like(means), check_finite=False)
    centre = float(ones @ means / ones.sum())
    weights = cho_solve(factor, means - centre, check_finite=False)
    likelihood = -0.5 * float((means - centre) @ weights) - float(np.log(np.diag(factor[0])).sum())
    return centre + covariance @ weights, likelihood
