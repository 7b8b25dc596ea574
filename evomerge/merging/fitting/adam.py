"""Adam, on the numbers of a genome."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.genome import Genome, Parameter

Vector = NDArray[np.float64]

_DECAYS = 0.9, 0.999
"""The decay rates of the averages of gradients and of their squares; Adam's usual values."""


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) in the unit box.

    Args:
        parameters: their ranges define the box.
        rate: the learning rate, alpha.
    """

    def __init__(self, parameters: Sequence[Parameter], rate: float) -> None:
        self._low = np.array([p.low for p in parameters])
        self._high = np.array([p.high for p in parameters])
        self._rate = rate
        self._steps = 0
        self._mean = self._square = np.zeros(len(parameters))

    def step(self, genome: Genome, gradient: Vector, share: float = 1.0) -> Genome:
        """The next point, with this share of the rate; components with a NaN gradient do not change at all."""
        span = self._high - self._low
        scaled = np.nan_to_num(gradient) * span
        self._steps += 1
        first, second = _DECAYS
        self._mean = first * self._mean + (1 - first) * scaled
        self._square = second * self._square + (1 - second) * scaled**2
        mean, square = self._mean / (1 - first**self._steps), self._square / (1 - second**self._steps)
        moved = genome - self._rate * share * span * mean / (np.sqrt(square) + 1e-8)
        return np.where(np.isnan(gradient), genome, np.clip(moved, self._low, self._high))
