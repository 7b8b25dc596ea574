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

_ROUNDING = 1e-9


def greedy_team(scores: Matrix, count: int) -> list[int]:
    """Candidates, one after the other whoever adds most to what is covered; of equal ones the first. Then members are
    exchanged for as long as that covers more: the first choice, the best alone, is often a compromise.

    Args:
        scores: float64 [candidates, items], more is better.
        count: how many at most; fewer where nobody adds anything.
    """
    team: list[int] = []
    while (larger := _exchanged(scores, _grown(scores, team, count))) != team:
        team = larger
    return team


def _grown(scores: Matrix, team: Sequence[int], count: int) -> list[int]:
    """A team and whoever adds most to it, until nobody does."""
    grown = list(team)
    covered = scores[grown].max(axis=0) if grown else np.full(scores.shape[1], -np.inf)
    while len(grown) < count:
        gains = np.maximum(scores, covered).mean(axis=1)
        best = int(np.argmax(gains))
        if grown and gains[best] <= covered.mean() + _ROUNDING:
            break
        grown.append(best)
        covered = np.maximum(covered, scores[best])
    return grown


def _exchanged(scores: Matrix, team: Sequence[int]) -> list[int]:
    """A team whose members are each, beside the others, whoever covers most."""
    members, place, kept = list(team), 0, 0
    covered = float(scores[members].max(axis=0).mean())
    while kept < len(members):  # places in turn, until none was exchanged in a whole turn
        others = [*members[:place], *members[place + 1 :]]
        gains = (np.maximum(scores, scores[others].max(axis=0)) if others else scores).mean(axis=1)
        best = int(np.argmax(gains))
        if gains[best] > covered + _ROUNDING:
            members[place], covered, kept = best, float(gains[best]), 0
        else:
            kept += 1
        place = (place + 1) % len(members)
    return members


def coverage(scores: Sequence[NDArray[np.float64]]) -> Matrix:
    """How far a team solves each item: float64 [items]."""
    return np.asarray(np.max(np.stack(list(scores)), axis=0))


def agreement(scores: Sequence[NDArray[np.float64]]) -> Matrix:
    """Whether more than half of a team solves each item, by at least half each: float64 [items].

    What a majority of equal answers would give at least: wrong answers may be at odds with each other.
    """
    return np.asarray((np.stack(list(scores)) >= 0.5).mean(axis=0) > 0.5, dtype=np.float64)
