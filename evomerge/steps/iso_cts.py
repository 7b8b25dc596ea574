"""Iso-CTS: equal singular values, with some directions from the merge and some from each single source.

Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces" (arXiv
2502.04959), section 4.2: in the change U S V^T of a matrix [out, in] of rank r the first k = c r directions are common
to the tasks. Each of n sources has (r - k) / n of its own: the first singular vectors of d_i - U_k U_k^T d_i. All are
concatenated and replaced by the nearest orthogonal matrices, as in TSV-Merge, and U V^T is the change.
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


def iso_cts(facts: Facts, blend: Blend, values: Values, made: Pass) -> Pass:
    """U V^T, rescaled to preserve the norm of the change."""
    common, name = float(values["common"]), facts.site.name

    def of_matrix(matrix: Matrix) -> Tensor:
        import torch

        from evomerge.merging.arithmetic.spectra import decomposed, nearest_orthogonal

        change, noise, n = matrix.change, matrix.noise, len(matrix.vectors)
        left, sizes, right = decomposed(change, noise, most=min(change.shape), name=name)
        rank = len(sizes)
        own = round((rank - int(common * rank)) / n)
        if not rank:
            return change
        shared = max(rank - n * own, 1)
        lefts, rights = [left[:, :shared]], [right[:, :shared]]
        for source in matrix.vectors if own else ():
            vectors = source.double()
            apart = vectors - lefts[0] @ (lefts[0].T @ vectors)
            left, _, right = decomposed(apart, noise, most=own, name=name)
            lefts.append(left)
            rights.append(right)
        sides = (nearest_orthogonal(torch.cat(side, dim=1), name=name) for side in (lefts, rights))
        u, v = (side.float() for side in sides)
        alike = u @ v.T
        before, after = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (change, alike))
        return torch.mul(alike, float(before / after))

    return matrix_by_matrix(facts, blend, "iso_cts", made, of_matrix, with_sources=True)


ISO_CTS = Step(
    "iso_cts",
    iso_cts,
    (MethodParameter("common", "blend", low=0.1, high=1.0, default=0.8, limits=FRACTION),),
    in_any_basis=True,
    title="Iso-CTS",
    reference="arXiv 2502.04959",
)
