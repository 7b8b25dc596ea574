"""Linear: the weighted mean of sources.

Wortsman et al., "Model soups" (arXiv 2203.05482), the uniform soup of section 2, here with weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import WEIGHT, Grammar, Setting
from evomerge.merging.arithmetic.passes import Combine, Pass
from evomerge.merging.plans import cancel, switch, weights
from evomerge.method import Method
from evomerge.methods.parameters import equal_weights, one_weight, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def linear(facts: Facts, blend: Blend) -> Pass:
    """sum_i w_i x_i / sum_i w_i. If the weights sum to zero, all sources count equally."""
    shares = weights(blend, normalize=True)
    if switch(blend, "normalize", True) and cancel(shares):
        shares = [1 / len(shares)] * len(shares)
    return Combine(dict(zip(blend.sources, shares, strict=True)))


LINEAR = Method(
    "linear",
    linear,
    # Only the ratios of the weights matter, so there is nothing to gain above 1.
    (weight(1.0, high=1.0),),
    switches={"normalize": True},
    alone=one_weight(),
    uniform=equal_weights(),
    differentiable=("weight",),
    mergekit=Grammar("source", (WEIGHT, Setting("normalize", "normalize", True, absent=True))),
    title="weighted mean",
    reference="arXiv 2203.05482",
)
