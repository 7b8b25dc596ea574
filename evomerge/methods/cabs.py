"""CABS: each source keeps its largest changes in every block of elements, and no two sources keep the same element.

Yang et al., "CABS: conflict-aware and balanced sparsification for enhancing model merging" (arXiv 2503.01874), section
4: sources are pruned one after another, each only where none before it kept anything (conflict-aware), to n out of
every m neighbours (balanced).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import RANK_BLOCK, Combine, Disjoint, Pass
from evomerge.merging.plans import base_of, number
from evomerge.method import FRACTION, Method, MethodParameter
from evomerge.methods.masked import ALL_KEPT
from evomerge.methods.parameters import density, one_weight, scale, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def cabs(facts: Facts, blend: Blend) -> Pass:
    """b + lambda sum_i w_i m_i d_i with disjoint n : m masks; m is 256, as in the paper for language models.

    n = 256 ``density``, rounded. Sources choose in the order of ``priority``, the highest first, and in their own order
    if priorities are equal, so searching over priorities searches over orders. If densities sum to more than 1, the
    last sources get what is left, whereas masks in the reference code overlap. A source with weight 0 takes nothing.
    """
    factor, counted = number(blend, "lambda", 1.0), {}
    for source in blend.sources:
        share, kept = blend.value("weight", source), blend.value("density", source)
        if share and kept > 0:
            counted[source] = factor * share, max(1, round(kept * RANK_BLOCK))
    order = sorted(counted, key=lambda source: -blend.value("priority", source))
    if not order:
        return Combine({base_of(blend): 1.0})
    weights = {source: counted[source][0] for source in order}
    return Disjoint(base_of(blend), weights, {source: counted[source][1] for source in order})


CABS = Method(
    "cabs",
    cabs,
    (
        weight(1.0),
        density(0.25),  # 64 of 256
        MethodParameter("priority", "source", low=0.0, high=1.0, default=0.5, limits=FRACTION),
        scale(),
    ),
    needs_base=True,
    alone=one_weight(ALL_KEPT),
    differentiable=("weight", "lambda"),
    title="CABS",
    reference="arXiv 2503.01874",
)
