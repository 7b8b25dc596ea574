"""A table of how far candidates solve items, and its two halves: one to judge quality by, the other difference.

A candidate that was lucky on some items looks better on them, and different on the same items. If one half of the items
measures quality and the other half difference, luck on an item can help with only one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers.base import Observation

Table = NDArray[np.float64]


def losses_of(observation: Observation) -> NDArray[np.float32]:
    """The losses of all items of all objectives, one objective after the other: float32 [items]."""
    return np.concatenate([np.asarray(items, np.float32) for items in observation.items])


def solved(losses: Sequence[NDArray[np.float32]]) -> Table:
    """How far each candidate solves each item, from 1 for the best to 0 for the worst: float64 [candidates, items].

    An item with equal losses does not distinguish candidates, and counts as solved by none. Items that were not scored
    for all candidates, as in a race, count as solved by none as well; otherwise candidates scored on more items would
    seem to solve more. If no item was scored for all candidates, missing scores count as not solved.
    """
    table = np.stack(losses).astype(np.float64)
    missing = np.isnan(table)
    if not missing.any(axis=0).all():
        table[:, missing.any(axis=0)] = 0.0
    known = np.where(np.isnan(table), -np.inf, table)
    worst = known.max(axis=0, initial=-np.inf)
    best = np.where(np.isnan(table), np.inf, table).min(axis=0, initial=np.inf)
    width = np.where(worst > best, worst - best, np.inf)
    return np.asarray(np.nan_to_num((worst - table) / width))  # NaN if not scored


def halves(items: int, *, cross_fit: bool) -> tuple[slice, slice]:
    """The items that judge candidates and those that describe them: alternating items if the two are to be disjoint,
    otherwise all items for both.
    """
    return (slice(0, None, 2), slice(1, None, 2)) if cross_fit and items > 1 else (slice(None), slice(None))
