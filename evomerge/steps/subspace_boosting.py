"""Subspace boosting: raises the small singular values of the merged change.

Skorobogat et al., "Subspace-boosted model merging" (arXiv 2506.16506), section 4: in the change U S V^T of each matrix,
with S in descending order, j is the first with S_1 + ... + S_j at least a share beta of the total, and smaller values
are raised to S_j.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Pass
from evomerge.method import FRACTION, MethodParameter
from evomerge.recipes.stack import Blend
from evomerge.step import Step, Values
from evomerge.steps.matrices import Matrix, matrix_by_matrix

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.facts import Facts


def subspace_boosting(facts: Facts, blend: Blend, values: Values, made: Pass) -> Pass:
    """S_i becomes max(S_i, S_j), rescaled to preserve the norm of the change."""
    beta = float(values["beta"])
    if beta == 1:
        return made

    def of_matrix(matrix: Matrix) -> Tensor:
        found = matrix.decompose()
        sums = found.sizes.cumsum(0)
        before = int((sums < beta * sums[-1:]).sum())
        return found.resized(matrix.change, found.sizes.clamp(min=found.sizes[before : before + 1].sum()))

    return matrix_by_matrix(facts, blend, "subspace_boosting", made, of_matrix)


SUBSPACE_BOOSTING = Step(
    "subspace_boosting",
    subspace_boosting,
    # The paper's values: 0.2 for language models; 0.01 for vision, which makes all but the very largest equal.
    (MethodParameter("beta", "blend", low=0.0, high=0.5, default=0.2, limits=FRACTION),),
    neutral={"beta": 1.0},
    in_any_basis=True,
    title="subspace boosting",
    reference="arXiv 2506.16506",
)
