"""The screen: a cheap metric that decides which candidates are worth generating answers for, while it can be trusted.

Trust is measured. Every candidate that is also scored on the objective gives a pair of scores, and the screen decides
only while Kendall's tau of these pairs is high. Of the candidates that it would leave out, one in each generation is
scored all the same, chosen at random. Without these audits, tau would be known only for candidates that the screen
prefers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.optimizers.base import random_state
from evomerge.search.estimation.statistics import kendall_tau
from evomerge.search.preparing.setup import ScreenInfo

MIN_PAIRS = 25
"""Pairs that are needed before the screen may decide. For 25 uncorrelated ones, tau's standard deviation is 0.14."""

MAX_PAIRS = 60
"""Only the latest pairs count: a screen that separates bad merges from good ones may not distinguish good ones."""


@dataclass(frozen=True)
class ScoredPair:
    """A candidate's means in both metrics, higher is better; it represents ``weight`` candidates of its generation."""

    screen: float
    objective: float
    weight: float


class Screener:
    """A screen: how well it agrees with the objective, and which candidates it leaves out."""

    def __init__(self, info: ScreenInfo, seed: int) -> None:
        self.info = info
        self._seed = seed
        self._pairs: deque[ScoredPair] = deque(maxlen=MAX_PAIRS)

    @property
    def pairs(self) -> int:
        return len(self._pairs)

    @property
    def tau(self) -> float:
        """Kendall's tau of the latest pairs, positive if both metrics prefer the same candidates; NaN if undefined."""
        return weighted_tau(list(self._pairs))

    @property
    def is_on(self) -> bool:
        return self.pairs >= MIN_PAIRS and self.tau >= self.info.least_tau

    def poorest(self, means: Mapping[int, float]) -> set[int]:
        """Which candidates of a generation to leave out: the poorest by the screen, except for one chosen at random.

        Args:
            means: each candidate's mean of the screen's metric, by its number.

        Returns:
            Their numbers; empty while the screen may not decide.
        """
        count = math.floor(self.info.drop * len(means))
        if count < 2 or not self.is_on:
            return set()
        poorest = self._poorest_first(means)[:count]
        audited = poorest[random_state(self._seed, min(means)).randint(count)]
        return set(poorest) - {audited}

    def remember(self, screened: Mapping[int, float], scored: Mapping[int, float]) -> None:
        """Add the pairs of a generation.

        Args:
            screened: each candidate's mean of the screen's metric, by its number.
            scored: the mean of the objective (higher is better) of those that were scored on it.
        """
        left_out = len(screened.keys() - scored.keys())
        zone = set(self._poorest_first(screened)[: left_out + 1]) if left_out else set()
        audited = [number for number in zone if number in scored]
        for number in sorted(screened.keys() & scored.keys()):
            weight = len(zone) / len(audited) if number in zone else 1.0
            self._pairs.append(ScoredPair(self._better(screened[number]), scored[number], weight))

    def _poorest_first(self, means: Mapping[int, float]) -> list[int]:
        return sorted(means, key=lambda number: (self._better(means[number]), number))

    def _better(self, mean: float) -> float:
        """The screen's mean, with the sign that makes higher better."""
        return mean if self.info.maximise else -mean

    def predict(self, mean: float) -> float:
        """A candidate's objective (higher is better), predicted from its screen by weighted least squares."""
        x, y, weights = (np.array(column) for column in zip(*_columns(self._pairs), strict=True))
        centre, height = np.average(x, weights=weights), np.average(y, weights=weights)
        spread = np.average((x - centre) ** 2, weights=weights)
        slope = np.average((x - centre) * (y - height), weights=weights) / spread if spread else 0.0
        return float(height + slope * (self._better(mean) - centre))


def _columns(pairs: Sequence[ScoredPair] | deque[ScoredPair]) -> list[tuple[float, float, float]]:
    return [(pair.screen, pair.objective, pair.weight) for pair in pairs]


def weighted_tau(pairs: Sequence[ScoredPair]) -> float:
    """Kendall's tau-b, where two candidates count with the product of their weights; NaN if either metric is constant.

    Kendall, "The treatment of ties in ranking problems", Biometrika 33, 1945. With equal weights it is the usual tau-b.
    """
    if len(pairs) < 2:
        return math.nan
    x, y, weights = (np.array(column) for column in zip(*_columns(pairs), strict=True))
    return kendall_tau(x, y, weights)
