"""WUDI and SWUDI: the change that disturbs each task vector least on the inputs that the task vector itself implies.

Cheng et al., "Whoever Started the Interference Should End It" (arXiv 2503.08099): for task vectors d_i [out, in] of a
layer,

    minimise over Delta:  sum_i |(Delta - d_i) d_i^T|^2 / |d_i|^2.

Wei et al., "Closed-Form Spectral Regularization for Multi-Task Model Merging" (arXiv 2606.07289): the exact minimum is
worse than a few hundred steps of gradient descent towards it, which have the closed form of a filter on the eigenvalues
of C. Neither has weights, so the expensive part is computed once; ``gram`` contains both, with weights, as points of
its parameter space. Tensors that are not matrices of a layer are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Pass
from evomerge.merging.plans import added_mean, along_kept, base_of, kept_change, number
from evomerge.method import FRACTION, Method, MethodParameter
from evomerge.methods.gram import Solver, changed_by_matrix
from evomerge.methods.parameters import scale
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.evidence import Tensors
    from evomerge.merging.measured.facts import Facts
    from evomerge.merging.normal_equations import Filter


def wudi(facts: Facts, blend: Blend) -> Pass:
    """b + lambda D (C + eps I)^-1 with c_i = 1 / |d_i|^2: the minimum; eps is 1e-8, as in the paper's closed form."""
    factor = number(blend, "lambda", 1.0)
    return along_kept(facts, blend, "wudi 1", wudi_change, factor) if facts.site.matrices else added_mean(blend, factor)


def wudi_change(matrices: Sequence[Tensor]) -> Tensor:
    """D (C + eps I)^-1, float32 [out, in], for task vectors of the same shape and dtype."""
    from evomerge.merging.normal_equations import Filter, nearest, own_products

    products = own_products(matrices)
    return nearest(matrices, products, _shares(products["squares"]), [0.0] * len(matrices), Filter(_JITTER))


def swudi(facts: Facts, blend: Blend) -> Pass:
    """b + lambda (s - s V f V^T + D V (f / l) V^T) with C = V l V^T, s = sum_i d_i and f = 1 - exp(-l t).

    ``log_t`` is the decimal logarithm of t, and ``rank`` the share of the eigenvalues for which f is not zero.
    """
    from evomerge.merging.normal_equations import Filter, kept_of

    factor, names, site = number(blend, "lambda", 1.0), (base_of(blend), *blend.sources), facts.site
    if not site.matrices:
        return added_mean(blend, factor)
    width = site.shape[-2:][site.input_axis]
    count = kept_of(number(blend, "rank", 0.85), width) or width
    by = Filter(10.0 ** -number(blend, "log_t", _PAPERS_TIME), flow=True)
    bases = [_eigenbasis(facts, names, matrix) for matrix in range(site.matrices)]
    return changed_by_matrix(site, names, [_solver(kept, count, by) for kept in bases], factor)


def _eigenbasis(facts: Facts, names: tuple[str, ...], matrix: int) -> Tensors:
    """The eigenbasis for one of a tensor's matrices; with it, each lambda, t and rank costs one matrix product."""
    from evomerge.merging.normal_equations import changes, eigenbasis, own_products

    def compute() -> Tensors:
        matrices = changes(facts, names, matrix)
        products = own_products(matrices)
        return eigenbasis(matrices, products, _shares(products["squares"]), [1.0] * len(matrices))

    return facts.once("swudi eigenbasis 1", names, compute, matrix=float(matrix))


def _kept(rows: int, columns: int, count: int) -> int:
    """The bytes of an eigenbasis."""
    values = min(columns, count * rows)
    return values * (8 + 4 * (rows + columns))


def _solver(kept: Tensors, count: int, by: Filter) -> Solver:
    response = by.response(kept["values"][:count]).float()

    def solve(changes: list[Tensor]) -> Tensor:
        total = changes[0].clone()
        for change in changes[1:]:
            total += change
        parts = (response, kept["change"][:, :count], kept["vectors"][:, :count])
        passed, change, vectors = (part.to(total.device) for part in parts)
        return total.addmm_(change * passed, vectors.T)

    return solve


def _shares(squares: Tensor) -> list[float]:
    """1 / |d|^2, and 0 for a task vector that is zero."""
    return [1.0 / square if square else 0.0 for square in squares.tolist()]


_JITTER = 1e-8
_PAPERS_TIME = math.log10(300.0)
"""The paper's value for full fine-tunes of a Llama, with a rank of 0.85."""

WUDI = Method(
    "wudi",
    wudi,
    (scale(searched=True),),
    needs_base=True,
    kept=kept_change,
    title="WUDI-Merging",
    reference="arXiv 2503.08099",
)
SWUDI = Method(
    "swudi",
    swudi,
    (
        scale(searched=True),
        MethodParameter("log_t", "blend", 0.0, 3.5, _PAPERS_TIME, limits=(-12.0, 12.0)),
        MethodParameter("rank", "blend", 0.3, 1.0, 0.85, limits=FRACTION),
    ),
    needs_base=True,
    kept=_kept,
    title="SWUDI",
    reference="arXiv 2606.07289",
)
