"""How far the proxy can be trusted: whether the objectives, too, find better what it finds better.

Points that descents lead to are scored like any candidate, so each of them is an audit: it has a value of the proxy,
and a loss of every objective. Kendall's tau of the latest of these says whether it pays to follow on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.search.estimation.statistics import kendall_tau

MIN_POINTS = 6
"""Points before they say anything: three descents."""

MAX_POINTS = 12
"""Only the latest points count: a proxy that leads far from poor models may say nothing of good ones."""

SURE = 1.28
"""Standard deviations of tau below 0 at which the proxy surely leads away: one-sided, with 90%.

Where a path no longer improves, tau is as often below 0 as above, and what helps is a lower rate.
"""


class Agreement:
    """What is known of a proxy by the points that it led to."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, Sequence[float]]] = deque(maxlen=MAX_POINTS)

    @property
    def points(self) -> int:
        return len(self._points)

    @property
    def tau(self) -> float:
        """Kendall's tau of the proxy and a loss, the mean over objectives; NaN where either has no ranks."""
        if not self._points:
            return float("nan")
        values, losses = np.array([value for value, _ in self._points]), np.array([each for _, each in self._points])
        return float(np.mean([kendall_tau(values, column) for column in losses.T]))

    @property
    def is_low(self) -> bool:
        """Whether the objectives surely disagree with the proxy.

        Without correlation the variance of tau is 2 (2n + 5) / (9n (n - 1)) (Kendall, Biometrika 30, 1938).
        """
        n = self.points
        return n >= MIN_POINTS and self.tau < -SURE * math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))

    def take(self, value: float, losses: Sequence[float]) -> None:
        """Take a point: the proxy there, and its losses; one that failed says nothing."""
        if np.isfinite(value) and np.isfinite(losses).all():
            self._points.append((value, losses))


def along(losses: NDArray[np.float64], steps: Sequence[int]) -> list[float]:
    """The proxy on a path, after so many steps each, by the straight line through what it was before every step.

    Each step's items are others, so one value alone says little.

    Args:
        losses: float64 [steps]: before each step.
    """
    if len(losses) < 2:
        return [float(losses[0])] * len(steps)
    slope, height = np.polynomial.Polynomial.fit(np.arange(len(losses)), losses, 1).convert().coef[::-1]
    return [float(height + slope * step) for step in steps]
