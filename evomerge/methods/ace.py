"""ACE-Merging: the change closest to all task vectors on inputs whose covariances are estimated from the task vectors.

Xu et al., "ACE-Merging: Data-Free Model Merging with Adaptive Covariance Estimation" (arXiv 2603.02945), as computed by
the authors' code. For n task vectors d_i [out, in] of a layer, and d'_i, which are these minus the mean of each column:

    S_i = d'_i^T d'_i,    P = sum_i (S_i + e I),    Delta = (sum_i d'_i (S_i + e I)) (P + 1 q^T)^-1,    e = 0.01,

with q the mean of the rows of sum_i S_i, which the paper calls a collective structural prior. If norms are uneven, that
is, var(log |d_i|^2) > 0.3 (mean log |d_i|^2)^2, S_i and e are divided by tr S_i, q by the mean of |d_i|^2, and the
change is

    Delta + sigma U_k V_k^T    with U S V^T = Delta + sum_i d_i (S_i - P / n),

where k is three tenths of the number of singular values and sigma the mean of the k largest. Only lambda is searched,
so Delta is computed once. Tensors that are not matrices of a layer are averaged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Pass
from evomerge.merging.plans import added_mean, along_kept, kept_change, number
from evomerge.method import Method
from evomerge.methods.parameters import scale
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.facts import Facts

_RIDGE, _UNEVEN, _KEPT = 1e-2, 0.3, 0.3
_NONE = 1e-12


def ace(facts: Facts, blend: Blend) -> Pass:
    """b + lambda Delta; see the module docstring."""
    factor = number(blend, "lambda", 1.0)
    if not facts.site.matrices:
        return added_mean(blend, factor)
    return along_kept(facts, blend, "ace 1", ace_change, factor)


def ace_change(matrices: Sequence[Tensor]) -> Tensor:
    """Delta, float32 [out, in], for task vectors of the same shape and dtype."""
    from evomerge.merging.normal_equations import Filter, nearest, own_products, seen

    sizes = [float(matrix.double().square().sum()) for matrix in matrices]
    uneven = _uneven(sizes)
    centred = [matrix - matrix.mean(dim=0, keepdim=True) for matrix in matrices]
    products = own_products(centred)
    traces = (products["squares"] + _NONE).tolist()
    shares = [1.0 / trace if uneven else 1.0 for trace in traces]
    ridges = [_RIDGE * share for share in shares]
    by = Filter(sum(ridges))
    # sum_i d'_i e_i / sum_i e_i is the starting point of the solution, towards which that ridge pulls.
    made = nearest(centred, products, shares, [ridge / by.eps for ridge in ridges], by).double()
    width = made.shape[1]
    ones = seen(made.new_ones(width), centred, products, shares, by)
    # The Sherman-Morrison formula for 1 q^T: (P^-1 q) n is what the ridge leaves of a row of ones.
    spread = width * (statistics.fmean(sizes) + _NONE if uneven else 1.0)
    made.addr_(made.sum(dim=1), ones / (spread + ones.sum()), alpha=-1.0)
    if uneven:
        made += _refinement(made, matrices, centred, shares, by.eps)
    return made.float()


def _uneven(sizes: Sequence[float]) -> bool:
    """Whether norms differ so much that covariances are normalised by their traces."""
    logs = [math.log(size + _NONE) for size in sizes]
    return len(logs) > 1 and statistics.variance(logs) > _UNEVEN * (statistics.fmean(logs) ** 2 + _NONE)


def _refinement(
    made: Tensor, matrices: Sequence[Tensor], centred: Sequence[Tensor], shares: Sequence[float], ridge: float
) -> Tensor:
    """sigma U_k V_k^T, float64 [out, in]."""
    import torch

    count = len(matrices)
    total = sum((matrix.double() for matrix in matrices), start=torch.zeros_like(made))
    residual = made - total * (ridge / count)
    for share, matrix, own in zip(shares, matrices, centred, strict=True):
        residual += share * _through(matrix.double() - total / count, own.double())
    u, s, v = torch.linalg.svd(residual, full_matrices=False)
    kept = int(len(s) * _KEPT)
    if not kept:
        return torch.zeros_like(made)
    made = u[:, :kept] @ v[:kept]
    return made.mul_(s[:kept].mean())


def _through(rows: Tensor, own: Tensor) -> Tensor:
    """rows own^T own, computed as the cheaper of the two products."""
    return rows @ own.T @ own if len(own) < own.shape[1] else rows @ (own.T @ own)


ACE = Method(
    "ace",
    ace,
    (scale(searched=True),),
    needs_base=True,
    kept=kept_change,
    title="ACE-Merging",
    reference="arXiv 2603.02945",
)
