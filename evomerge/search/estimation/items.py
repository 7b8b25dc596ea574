"""The order in which items are scored: a stratified sample that favours the items on which models differ.

An item that every baseline solves, or none, says little about a merge. So items are divided into strata by how much the
baselines' scores differ, and every stratum gets its share of each rung by Neyman allocation, n_h ~ N_h S_h (Cochran,
Sampling Techniques, 3rd ed. 1977, eq. 5.26). No stratum is left out, and estimates remain unbiased because each is
weighted by its size (``racing.py``); two merges may differ even on an item on which all baselines agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers.base import random_state
from evomerge.search.estimation.racing import Sample

STRATA = 3
"""One for items on which the baselines agree, and two for the others, divided at the median of their variance."""

PRIOR_MODELS = 1.0
"""How many models the average variance counts as in an item's variance: a few baselines that agree prove little."""


@dataclass(frozen=True)
class ItemOrder:
    """The order in which one evaluator's items are scored, the same for all candidates of a search.

    Attributes:
        positions: int32 [n], positions in the search split, in the order in which they are scored.
        strata: int64 [n], the stratum of the item at each position of the split.
    """

    positions: NDArray[np.int32]
    strata: NDArray[np.int64]

    def sample(self, items: NDArray[np.int32], most: int) -> Sample:
        """Scored items as a stratified sample of the first ``most`` items of the split.

        Args:
            items: int32 [k], positions of the scored items.
        """
        population = np.bincount(self.strata[:most], minlength=STRATA)
        return Sample(self.strata[items], population)


def plain_order(count: int) -> ItemOrder:
    """The order of the split itself, in one stratum: for evaluators that always score every item."""
    return ItemOrder(np.arange(count, dtype=np.int32), np.zeros(count, dtype=np.int64))


def item_order(scores: NDArray[np.float64], seed: int) -> ItemOrder:
    """Order items by what the baselines' scores say of them.

    Args:
        scores: float64 [models, n], each baseline's score of every item.
        seed: decides which items of a stratum come first.
    """
    models, count = scores.shape
    variances = scores.var(axis=0)
    variances = (models * variances + PRIOR_MODELS * variances.mean()) / (models + PRIOR_MODELS)
    strata = _strata(scores.var(axis=0))
    deviation = np.array([_mean(np.sqrt(variances[strata == h])) for h in range(STRATA)])
    sizes = np.bincount(strata, minlength=STRATA)
    wanted = sizes * deviation if deviation.any() else sizes.astype(np.float64)
    random = random_state(seed, count)
    queues = [random.permutation(np.flatnonzero(strata == h)).tolist() for h in range(STRATA)]
    taken = np.zeros(STRATA)
    order = []
    for _ in range(count):
        left = np.array([bool(queue) for queue in queues])
        # The stratum that is furthest behind its share; but first two items of each, for a variance.
        behind = np.where(taken < 2, np.inf, wanted / np.maximum(taken, 1))
        h = int(np.argmax(np.where(left, behind, -1.0)))
        order.append(queues[h].pop())
        taken[h] += 1
    return ItemOrder(np.array(order, dtype=np.int32), strata)


def _strata(variances: NDArray[np.float64]) -> NDArray[np.int64]:
    """int64 [n]: 0 where the baselines agree, otherwise 1 up to the median variance and 2 above it."""
    strata = np.zeros(len(variances), dtype=np.int64)
    differ = variances > 0
    if differ.any():
        strata[differ] = np.where(variances[differ] > np.median(variances[differ]), 2, 1)
    return strata


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0
