"""Task arithmetic: the base plus a weighted sum of task vectors.

Ilharco et al., "Editing models with task arithmetic" (arXiv 2212.04089), section 2: learning via addition, with a
weight for each task vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import task_vectors
from evomerge.merging.arithmetic.passes import Pass
from evomerge.merging.plans import added, base_of, number, weights
from evomerge.method import Method
from evomerge.methods.parameters import equal_weights, one_weight, same_weights, scale, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def task_arithmetic(facts: Facts, blend: Blend) -> Pass:
    """b + lambda sum_i w_i d_i. With ``normalize`` the sum is divided by sum_i w_i."""
    factor = number(blend, "lambda", 1.0)
    return added(base_of(blend), blend.sources, [factor * w for w in weights(blend, normalize=False)])


TASK_ARITHMETIC = Method(
    "task_arithmetic",
    task_arithmetic,
    # 0.4: the scaling used when there is no validation set (see arXiv 2306.01708, experiments).
    (weight(0.4), scale()),
    needs_base=True,
    switches={"normalize": False},
    alone=one_weight({"lambda": 1.0}),
    uniform=equal_weights({"lambda": 1.0}),
    arithmetic=same_weights({"lambda": 1.0}),
    differentiable=("weight", "lambda"),
    mergekit=task_vectors("plain"),
    title="task arithmetic",
    reference="arXiv 2212.04089",
)
