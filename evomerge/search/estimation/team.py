"""Teams: a few candidates that together solve more items than any of them alone.

The coverage of an item is the best score of any member. A greedy choice reaches at least 1 - 1/e of the coverage of the
best team of the same size (Nemhauser, Wolsey & Fisher, "An analysis of approximations for maximizing submodular set
functions", Mathematical Programming 14, 1978).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

_ROUNDING = 1e-9


def greedy_team(scores: Matrix, count: int) -> list[int]:
    """Choose a team: each time the candidate that adds most coverage, the first of equals. Then members are exchanged
    while that raises the coverage, because the first choice, the best candidate alone, is often a compromise.

    Args:
        scores: float64 [candidates, items], higher is better.
        count: how many members at most; fewer if no candidate adds anything.

    Returns:
        Indices of candidates.
    """
    team: list[int] = []
    while (larger := _exchanged(scores, _grown(scores, team, count))) != team:
        team = larger
    return team


def _grown(scores: Matrix, team: Sequence[int], count: int) -> list[int]:
    """A team, extended by the candidates that add most, up to ``count`` members or until none adds anything."""
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
    """A team in which no exchange of a single member raises the coverage any more."""
    members, place, kept = list(team), 0, 0
    covered = float(scores[members].max(axis=0).mean())
    while kept < len(members):  # members in turn, until a whole turn exchanged none
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
    """The coverage of each item by a team, float64 [items]; ``scores`` has float64 [items] for each member."""
    return np.asarray(np.max(np.stack(list(scores)), axis=0))


def majority(scores: Sequence[NDArray[np.float64]]) -> Matrix:
    """Whether more than half of a team scores at least 0.5 on each item: float64 [items], 0 or 1.

    A vote among the members' answers would solve at least these items, and more if their wrong answers differ.

    Args:
        scores: float64 [items] for each member.
    """
    return np.asarray((np.stack(list(scores)) >= 0.5).mean(axis=0) > 0.5, dtype=np.float64)
