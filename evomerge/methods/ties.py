"""TIES: task vectors trimmed to their largest elements, of which those that agree in sign are added.

Yadav et al., "TIES-Merging" (arXiv 2306.01708), algorithm 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import DENSITY, task_vectors
from evomerge.merging.arithmetic.passes import Pass, SparsePart
from evomerge.merging.plans import base_of
from evomerge.method import Method
from evomerge.methods.masked import ALL_KEPT, masked_sum, switches, windowed
from evomerge.methods.parameters import density, one_weight, scale, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def ties(facts: Facts, blend: Blend) -> Pass:
    """b + the weighted disjoint merge of the trimmed task vectors.

    Trim to the k = floor(p n) largest magnitudes (and all equal to the k-th), elect the sign of the weighted sum, keep
    the elements that agree with it. The paper averages over the agreeing sources, which is ``normalize: true``; by
    default their weighted sum is taken.
    """
    return masked_sum(facts, blend, _trimmed, elect=True)


def _trimmed(facts: Facts, blend: Blend, source: str) -> SparsePart | None:
    kept = blend.value("density", source)
    if kept <= 0:
        return None
    count = min(facts.size, max(1, int(kept * facts.size)))
    low = facts.threshold(base_of(blend), source, count) if count < facts.size else 0.0
    return windowed(facts, blend, source, low, math.inf)


TIES = Method(
    "ties",
    ties,
    # The paper's k = 20% and lambda = 1.
    (weight(1.0), density(0.2), scale()),
    needs_base=True,
    switches=switches(rescale=False),
    alone=one_weight(ALL_KEPT),
    differentiable=("weight", "lambda"),
    mergekit=task_vectors("elected", DENSITY, normalize=True, rescale=False),
    title="TIES-Merging",
    reference="arXiv 2306.01708",
)
