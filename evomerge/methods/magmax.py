"""MagMax: each element takes the change of the source that changed it most.

Marczak et al., "MagMax: leveraging model merging for seamless continual learning" (arXiv 2407.06322), section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Largest, Pass
from evomerge.merging.plans import base_of, number, values
from evomerge.method import Method
from evomerge.methods.parameters import one_weight, scale, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def magmax(facts: Facts, blend: Blend) -> Pass:
    """b + lambda w_p d_p where, for each element, p is the i with the largest |w_i d_i|.

    The paper has no weights, which amounts to equal ones. If opposite changes are equally large, the positive one wins.
    """
    factor = number(blend, "lambda", 1.0)
    weights = [factor * w for w in values(blend, "weight")]
    return Largest(base_of(blend), dict(zip(blend.sources, weights, strict=True)))


MAGMAX = Method(
    "magmax",
    magmax,
    # 0.5: the paper's scaling factor.
    (weight(0.5), scale()),
    needs_base=True,
    alone=one_weight({"lambda": 1.0}),
    differentiable=("weight", "lambda"),
    title="MagMax",
    reference="arXiv 2407.06322",
)
