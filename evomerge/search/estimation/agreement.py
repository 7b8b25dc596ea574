"""How far the proxy can be trusted: whether what it finds better is also better in the objectives.

The points that descents reach are scored like any candidate, so each has both a value of the proxy and a loss in every
objective. Kendall's tau over the latest of these points says whether following the proxy is worthwhile.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.search.estimation.statistics import kendall_tau

MIN_POINTS = 6
"""Points that are needed for a conclusion: those of three descents."""

MAX_POINTS = 12
"""Only the latest points count: a proxy that improves poor models may say nothing about good ones."""

SURE_DEVIATIONS = 2.33
"""How many standard deviations below 0 tau must be to prove disagreement: one-sided, with 99% confidence.

A lower limit than 0 is needed because on a path that no longer improves, tau is as often below 0 as above, and what
helps there is a lower rate. With 90%, one search in eight over the zoo dropped by chance a proxy that would have gained
0.07.
"""


class Agreement:
    """How well a proxy agrees with the objectives at the points that its descents reached."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, Sequence[float]]] = deque(maxlen=MAX_POINTS)

    @property
    def points(self) -> int:
        return len(self._points)

    @property
    def tau(self) -> float:
        """Kendall's tau between the proxy and the loss, averaged over objectives; NaN if one of them is constant."""
        if not self._points:
            return float("nan")
        values, losses = np.array([value for value, _ in self._points]), np.array([each for _, each in self._points])
        return float(np.mean([kendall_tau(values, column) for column in losses.T]))

    @property
    def is_low(self) -> bool:
        """Whether the objectives disagree with the proxy, with the confidence of ``SURE_DEVIATIONS``.

        Without correlation the variance of tau is 2 (2n + 5) / (9n (n - 1)) (Kendall, Biometrika 30, 1938).
        """
        n = self.points
        return n >= MIN_POINTS and self.tau < -SURE_DEVIATIONS * math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))

    def add(self, value: float, losses: Sequence[float]) -> None:
        """Add a point with its value of the proxy and its losses in all objectives; ignored if one is not finite."""
        if np.isfinite(value) and np.isfinite(losses).all():
            self._points.append((value, losses))


def fitted_values(losses: NDArray[np.float64], steps: Sequence[int]) -> list[float]:
    """The proxy at points of a path, read off a straight line fitted to its values before every step.

    Every step uses other items, so a single value is noisy.

    Args:
        losses: float64 [steps], the proxy's loss before each step.
        steps: for each point, the number of steps before it.

    Returns:
        The fitted loss at each point.
    """
    if len(losses) < 2:
        return [float(losses[0])] * len(steps)
    slope, height = np.polynomial.Polynomial.fit(np.arange(len(losses)), losses, 1).convert().coef[::-1]
    return [float(height + slope * step) for step in steps]
