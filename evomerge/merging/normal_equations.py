"""The matrix that is nearest to several, each seen through inputs of its own: what Gram methods and RegMean solve.

For matrices x_i [m, n], Gram matrices G_i [n, n] of their inputs and coefficients c_i >= 0, what is nearest to all,

    minimise over y:  sum_i c_i tr((y - x_i) G_i (y - x_i)^T),

satisfies y C = D with C = sum_i c_i G_i and D = sum_i c_i x_i G_i. C may be singular and is never well-conditioned,
so a function h of its eigenvalues stands for its inverse, and where that is small y stays at a start s, which is the
sum of a_i x_i:

    y = s + (D - s C) h(C).

All that is [n, n] is float64, for C is the square of what the matrices are: in float32 its small half would be noise,
which h makes large. What is [m, n] is float32, as in any merge. Where m is small beside n, everything is done in a
basis of all rows of all matrices, which are no more than k m.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import InputError
from evomerge.merging.measured.facts import Facts

log = logging.getLogger(__name__)

Products = Mapping[str, Tensor]
"""What a solution for k matrices x_i [m, n] with G_i = x_i^T x_i follows from, beside the matrices: see
``own_products``."""


@dataclass(frozen=True)
class Filter:
    """The h of the equations: what stands for one over an eigenvalue l.

    Attributes:
        eps: 1 / (l + eps), a ridge; in units of C.
        flow: (1 - exp(-l / eps)) / l instead, where gradient descent from the start is after a time of 1 / eps.
        kept: h is zero for all but so many of the largest eigenvalues.
    """

    eps: float
    flow: bool = False
    kept: int | None = None

    def response(self, values: Tensor) -> Tensor:
        """l h(l), from 0 to 1, for eigenvalues l >= 0 of which none is left out."""
        response: Tensor = -torch.expm1(-values / self.eps) if self.flow else values / (values + self.eps)
        return response

    def of(self, values: Tensor) -> Tensor:
        """h(l) for all eigenvalues, in rising order; none for those that are zero but for rounding."""
        values = values.clamp_min(0.0)
        none = values <= _least(values)
        made = self.response(values) / values.masked_fill(none, 1.0)
        if self.kept is not None:
            none[: max(len(values) - self.kept, 0)] = True
        return made.masked_fill(none, 0.0)

    def apply(self, rows: Tensor, start: Tensor, matrix: Tensor) -> Tensor:
        """start + (rows - start matrix) h(matrix), float64 [k, n], for a positive semi-definite matrix [n, n].

        Of a ridge that is (rows + eps start) (matrix + eps I)^-1.
        """
        if not self.flow and self.kept is None:
            shifted = matrix.clone()
            shifted.diagonal().add_(self.eps)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if not failed:
                return torch.cholesky_solve(torch.add(rows, start, alpha=self.eps).T, factor).T
            log.debug("a ridge of %.3g is lost in the rounding of its matrix: decomposed instead", self.eps)
        values, vectors = torch.linalg.eigh(matrix)
        seen = torch.mm(torch.addmm(rows, start, matrix, alpha=-1.0), vectors) * self.of(values)
        return torch.addmm(start, seen, vectors.T)


def _least(values: Tensor) -> Tensor:
    """Of eigenvalues in rising order, what is zero but for rounding."""
    return values[-1:] * len(values) * torch.finfo(values.dtype).eps


def kept_of(share: float, width: int) -> int | None:
    """How many of the eigenvalues of a matrix [width, width] are a share of them; None for all."""
    return None if share >= 1.0 else max(1, math.ceil(share * width))


def input_side(matrix: Tensor, axis: int) -> Tensor:
    """The weight of a layer as [out, in], or such a one as it is stored: the one turn is the other's way back."""
    return matrix if axis == 1 else matrix.T


def matrix_of(tensor: Tensor, number: int, axis: int) -> Tensor:
    """One of the matrices that a tensor holds (see ``Site.matrices``), as [out, in]; a view."""
    return input_side(tensor.view(-1, *tensor.shape[-2:])[number], axis)


def changes(facts: Facts, names: Sequence[str], number: int) -> list[Tensor]:
    """The task vectors of one of a tensor's matrices, float32 [out, in]: of all in ``names`` but the base, the first.

    Raises:
        InputError: one has NaN or Inf.
    """
    origin, *matrices = (matrix_of(x, number, facts.site.input_axis).float() for x in facts.tensors(names))
    made = []
    for name, matrix in zip(names[1:], matrices, strict=True):
        change = matrix - origin
        if not torch.isfinite(change).all():
            problem = f"{facts.site.name} has NaN or Inf in its difference to {names[0]}"
            raise InputError(f"sources.{name}", problem, "See which of the two is broken with `evomerge inspect`.")
        made.append(change)
    return made


# ---- any inputs ------------------------------------------------------------------------------------------------------


def nearest_by_grams(
    matrices: Sequence[Tensor], grams: Sequence[Tensor], shares: Sequence[float], start: Sequence[float], by: Filter
) -> Tensor:
    """The solution y, float32 [m, n], for Gram matrices of any inputs (float64 [n, n]).

    With M_i = a_i I + (c_i G_i - a_i C) h(C), y is sum_i x_i M_i. These add up to A I + (1 - A) C h(C) with the sum A
    of all a_i, so that one of the matrices is only added where A is 1, and small differences of large ones keep their
    digits.
    """
    first, width = matrices[0], matrices[0].shape[1]
    total = grams[0] * shares[0]
    for share, gram in zip(shares[1:], grams[1:], strict=True):
        total = total.add(gram, alpha=share)
    missing = 1.0 - math.fsum(start)
    rows = [share * gram for share, gram in zip(shares[1:], grams[1:], strict=True)]
    unit = torch.eye(width, dtype=total.dtype, device=total.device)
    starts = [a * unit for a in start[1:]]
    if abs(missing) > _NONE:
        rows.append(missing * total)
        starts.append(0.0 * unit)
    made = first * (1.0 - missing)
    if not rows:
        return made
    factors = by.apply(torch.cat(rows), torch.cat(starts), total).float().reshape(len(rows), width, width)
    for factor, matrix in zip(factors, matrices[1:], strict=False):
        made.addmm_(matrix - first, factor)
    if abs(missing) > _NONE:
        made.addmm_(first, factors[-1])
    return made


_NONE = 1e-12
"""What a sum of numbers that are to be one may be off by."""


# ---- matrices that are their own inputs ------------------------------------------------------------------------------


def own_products(matrices: Sequence[Tensor]) -> dict[str, Tensor]:
    """What does not change with c_i, a_i and h, of k matrices [m, n] (float32) with G_i = x_i^T x_i.

    Returns:
        squares: float64 [k], squared norms.
        grams: float64 [k, n (n + 1) / 2], the lower triangles of G_i.
        Of wide matrices (m < n), whose solution has fewer numbers than the factors that would make it of them:
        moments: float64 [k, m, n], x_i G_i.
        And if k m < n, all this in an orthonormal basis of all rows, with q = k m in place of n:
        basis: float32 [n, q].
        sides: float32 [k, m, q], x_i.
    """
    rows, width = matrices[0].shape
    made = {"squares": torch.stack([matrix.double().square().sum() for matrix in matrices])}
    sides = [matrix.double() for matrix in matrices]
    if len(matrices) * rows < width:
        norms = made["squares"].sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        stacked = torch.cat([side / norm for side, norm in zip(sides, norms, strict=True)])
        basis, turned = torch.linalg.qr(stacked.T)
        sides = [part.T * norm for part, norm in zip(turned.split(rows, dim=1), norms, strict=True)]
        made |= {"basis": basis.float().contiguous(), "sides": torch.stack(sides).float()}
    width = sides[0].shape[1]
    lower = _lower(width, sides[0].device)
    grams = [side.T @ side for side in sides]
    made["grams"] = torch.stack([gram[lower] for gram in grams])
    if rows < width or "basis" in made:
        made["moments"] = torch.stack([side @ gram for side, gram in zip(sides, grams, strict=True)])
    return made


def nearest(
    matrices: Sequence[Tensor], products: Products, shares: Sequence[float], start: Sequence[float], by: Filter
) -> Tensor:
    """The solution y, float32 [m, n].

    Args:
        matrices: x_i, float32 [m, n].
        products: of these.
        shares: c_i.
        start: a_i.
    """
    device = matrices[0].device
    kept = products["grams"].to(device)
    if "moments" not in products:
        grams = [_whole(gram, matrices[0].shape[1]) for gram in kept]
        return nearest_by_grams(matrices, grams, shares, start, by)
    made = by.apply(*_wide(matrices, products, shares, start, device)).float()
    return made @ products["basis"].to(device).T if "basis" in products else made


def seen(row: Tensor, matrices: Sequence[Tensor], products: Products, shares: Sequence[float], by: Filter) -> Tensor:
    """C h(C) row, float64 [n]: what the solution takes of a direction of inputs."""
    basis = products["basis"].double() if "basis" in products else None
    inside = row if basis is None else row @ basis
    total = _whole(_sum(shares, products["grams"]), len(inside))
    made = by.apply((inside @ total)[None], torch.zeros_like(inside)[None], total)[0]
    return made if basis is None else basis @ made


def eigenbasis(
    matrices: Sequence[Tensor], products: Products, shares: Sequence[float], start: Sequence[float]
) -> dict[str, Tensor]:
    """All that the solution follows from for any filter: y = s + (change l h(l)) vectors^T.

    Returns:
        values: float64 [q], the eigenvalues l of C that are not zero but for rounding, the largest first.
        vectors: float32 [n, q].
        change: float32 [m, q], (D - s C) vectors / l.
    """
    if "moments" in products:
        moments, begin, total = _wide(matrices, products, shares, start, matrices[0].device)
        values, vectors = _decomposed(total)
        change = moments @ vectors / values - begin @ vectors
        if "basis" in products:
            vectors = products["basis"].double() @ vectors
    else:
        width = matrices[0].shape[1]
        values, vectors = _decomposed(_whole(_sum(shares, products["grams"]), width))
        change = vectors.new_zeros((len(matrices[0]), len(values)))
        for share, a, gram, matrix in zip(shares, start, products["grams"], matrices, strict=True):
            change += matrix.double() @ (share * _whole(gram, width) @ vectors / values - a * vectors)
    return {"values": values, "vectors": vectors.float().contiguous(), "change": change.float().contiguous()}


def _wide(
    matrices: Sequence[Tensor],
    products: Products,
    shares: Sequence[float],
    start: Sequence[float],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """D, s and C of wide matrices, float64, in their basis if there is one."""
    sides = products["sides"].to(device) if "sides" in products else torch.stack(list(matrices))
    moments, grams = products["moments"].to(device), products["grams"].to(device)
    total = _whole(_sum(shares, grams), sides.shape[2])
    return _sum(shares, moments), _sum(start, sides).double(), total


def _sum(numbers: Sequence[float], tensors: Tensor) -> Tensor:
    """The sum of some tensors [k, ...] times a number each."""
    made: Tensor = torch.tensordot(torch.tensor(numbers, dtype=tensors.dtype, device=tensors.device), tensors, 1)
    return made


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues that are not zero but for rounding, the largest first, and their vectors as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    count = int((values > _least(values)).sum())
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


def _lower(width: int, device: torch.device) -> Tensor:
    """Which elements of a matrix are in its lower triangle, of which a symmetric one is kept."""
    return torch.ones((width, width), dtype=torch.bool, device=device).tril_()


def _whole(kept: Tensor, width: int) -> Tensor:
    """The symmetric matrix [n, n] of a lower triangle."""
    half = kept.new_zeros((width, width)).masked_scatter_(_lower(width, kept.device), kept)
    return half + half.tril(-1).T
