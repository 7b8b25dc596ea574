"""Teams: candidates that together solve more items than any of them does.

An item is covered as far as the best of a team solves it. The greedy choice covers at least 1 - 1/e of what the best
team of that size does (Nemhauser, Wolsey & Fisher, "An analysis of approximations for maximizing submodular set
functions", Mathematical Programming 14, 1978).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def greedy_team(scores: Matrix, count: int) -> list[int]:
    """Candidates, one after the other whoever adds most to what is covered; of equal ones the first.

    Args:
        scores: float64 [candidates, items], more is better.
        count: how many at most; fewer where nobody adds anything.
    """
    team: list[int] = []
    covered = np.full(scores.shape[1], -np.inf)
    while len(team) < count:
        gains = np.maximum(scores, covered).mean(axis=1)
        best = int(np.argmax(gains))
        if team and gains[best] <= covered.mean():
            break
        team.append(best)
        covered = np.maximum(covered, scores[best])
    return team


def coverage(scores: Sequence[NDArray[np.float64]]) -> Matrix:
    """How far a team solves each item: float64 [items]."""
    return np.asarray(np.max(np.stack(list(scores)), axis=0))


def agreement(scores: Sequence[NDArray[np.float64]]) -> Matrix:
    """Whether more than half of a team solves each item, by at least half each: float64 [items].

    What a majority of equal answers would give at least: wrong answers may be at odds with each other.
    """
    return np.asarray((np.stack(list(scores)) >= 0.5).mean(axis=0) > 0.5, dtype=np.float64)
