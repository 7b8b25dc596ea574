"""Which items candidates solve, as a table of shares, and its two halves: one says who is better, one who is different.

A candidate that was lucky on some items looks better by them, and looks different by the same items. Judged by one half
of the items and described by the other, it is lucky in one thing at most.
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
    """How far each candidate solves each item: 1 as the best of them does, 0 as the worst: float64 [candidates, items].

    An item in which all are alike tells nobody apart, and is solved by none. Nor is one that some were not scored on,
    as in a race: who was scored on more would else look as if it solved more. Where no item is known of all, what was
    not scored counts as not solved.
    """
    table = np.stack(losses).astype(np.float64)
    missing = np.isnan(table)
    if not missing.any(axis=0).all():
        table[:, missing.any(axis=0)] = 0.0
    known = np.where(np.isnan(table), -np.inf, table)
    worst = known.max(axis=0, initial=-np.inf)
    best = np.where(np.isnan(table), np.inf, table).min(axis=0, initial=np.inf)
    width = np.where(worst > best, worst - best, np.inf)
    return np.asarray(np.nan_to_num((worst - table) / width))  # NaN where it was not scored


def halves(items: int, *, cross_fit: bool) -> tuple[slice, slice]:
    """The items by which candidates are judged, and those by which they are described: every second one each where they
    are to be apart, else all.
    """
    return (slice(0, None, 2), slice(1, None, 2)) if cross_fit and items > 1 else (slice(None), slice(None))
