"""Singular value calibration: undoes the over-accumulation of several sources in one direction of the output.

"When shared knowledge hurts: spectral over-accumulation in model merging" (arXiv 2602.05536), algorithm 1: of the
change D = U S V^T of a matrix [out, in] and the task vectors d_i of n sources, along each u_r of U

    a = u_r^T D,  a_i = u_r^T d_i (4),   s_i = a . a_i / |a_i|^2 (8),   S_r becomes n / sum_i max(alpha, s_i) S_r.

s_i above one means that the merge goes further along source i's own direction than the source itself does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Pass
from evomerge.method import MethodParameter
from evomerge.recipes.stack import Blend
from evomerge.step import Step, Values
from evomerge.steps.matrices import Matrix, matrix_by_matrix

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.facts import Facts


def svc(facts: Facts, blend: Blend, values: Values, made: Pass) -> Pass:
    """The equation, rescaled to preserve the norm of the change."""
    alpha = float(values["alpha"])

    def of_matrix(matrix: Matrix) -> Tensor:
        import torch

        found = matrix.decompose()
        left = found.left(matrix.change).float()
        along, total = (left.T @ matrix.change).double(), torch.zeros_like(found.sizes)
        for source in matrix.vectors:
            own = (left.T @ source).double()  # squares of float32 may overflow
            # If a source has no change along a direction, the quotient is zero, so that alpha applies.
            energy = own.square().sum(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
            total += ((along * own).sum(dim=1) / energy).clamp(min=alpha)
        return found.resized(matrix.change, found.sizes * len(matrix.vectors) / total)

    return matrix_by_matrix(facts, blend, "svc", made, of_matrix, with_sources=True)


SVC = Step(
    "svc",
    svc,
    # 0.1 is the paper's value. At the largest of all s_i or above, nothing is changed.
    (MethodParameter("alpha", "blend", low=0.05, high=2.0, default=0.1, limits=(1e-6, 1e6)),),
    in_any_basis=True,
    title="singular value calibration",
    reference="arXiv 2602.05536",
)
