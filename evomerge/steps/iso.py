"""Iso: makes all singular values of the merged change equal, or more equal.

Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces" (arXiv
2502.04959), section 4.1, Iso-C: in the change U S V^T of each matrix, S is replaced by its mean. Sums of task vectors
have a few large singular values, for what the tasks share; everything specific to one task is small in comparison.
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


def iso(facts: Facts, blend: Blend, values: Values, made: Pass) -> Pass:
    """S becomes (1 - s) S + s mean(S), rescaled to preserve the norm of the change."""
    strength = float(values["strength"])
    if strength == 0:
        return made

    def of_matrix(matrix: Matrix) -> Tensor:
        found = matrix.decompose()
        return found.resized(matrix.change, found.sizes.lerp(found.sizes.mean(), strength))

    return matrix_by_matrix(facts, blend, "iso", made, of_matrix)


ISO = Step(
    "iso",
    iso,
    (MethodParameter("strength", "blend", low=0.0, high=1.0, default=1.0, limits=FRACTION),),
    neutral={"strength": 0.0},
    in_any_basis=True,
    title="Iso-C",
    reference="arXiv 2502.04959",
)
