"""Consensus merging: a sum of task vectors, restricted to elements that matter to enough sources.

Wang et al., "Localizing task information for improved model merging and compression" (arXiv 2405.07813), sections 3
and 4: TALL masks and Consensus Task Arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Agreed, Pass
from evomerge.merging.plans import base_of, number, values
from evomerge.method import Method, MethodParameter
from evomerge.methods.parameters import equal_weights, one_weight, scale, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def consensus(facts: Facts, blend: Blend) -> Pass:
    """b + lambda c sum_i v_i with v_i = w_i d_i, and a mask c that is 1 where at least ``votes`` of the masks m_i are.

    m_i = 1 where |v_i| > r_i |sum_j v_j - v_i|: the change of source i outweighs that of all others. Two votes remove
    selfish elements, which matter to only one source, and catastrophic ones, which matter to none. One vote and r_i = 0
    is task arithmetic. Multiplying all weights by one factor does not change the masks.
    """
    weights = dict(zip(blend.sources, values(blend, "weight"), strict=True))
    ratios = dict(zip(blend.sources, values(blend, "ratio"), strict=True))
    votes = int(number(blend, "votes", 2))
    return Agreed(base_of(blend), weights, ratios, votes, number(blend, "lambda", 1.0))


CONSENSUS = Method(
    "consensus",
    consensus,
    (
        weight(0.4),
        # The paper chooses each from 0.2 to 0.6; 0 makes task arithmetic a point of the space.
        MethodParameter("ratio", "source", low=0.0, high=0.6, default=0.4, limits=(0.0, 100.0)),
        # With more votes than sources, the result is the base.
        MethodParameter("votes", "blend", low=1, high=2, default=2, kind="int", limits=(0, 1000)),
        scale(),
    ),
    needs_base=True,
    min_sources=2,
    alone=one_weight({"votes": 1.0, "lambda": 1.0}),
    uniform=equal_weights({"ratio": 0.0, "votes": 1.0, "lambda": 1.0}),
    differentiable=("lambda",),  # each mask depends on all weights
    title="Consensus task arithmetic",
    reference="arXiv 2405.07813",
)
