"""Singular values and vectors of changes to a matrix, and orthonormal bases.

Everything is computed from the Gram matrix of the short side, in float64: its eigenvectors are the singular vectors of
that side, and the square roots of its eigenvalues are the singular values. One product and one symmetric eigenproblem
take at most a tenth of the time of a singular value decomposition. The price is that singular values below 1e-7 of the
largest cannot be distinguished from zero; in float32, a decomposition cannot do so either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from evomerge.errors import InputError

_EPS64, _EPS32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps

_SAME_DIRECTION = 1e-12
"""Eigenvalues of a Gram matrix below this fraction of the largest are rounding: two directions are the same."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a change D = U S V^T of rank r, and the singular vectors of its short side.

    Attributes:
        vectors: float64 [short side, r]: U if the matrix has no more rows than columns, otherwise V.
        sizes: float64 [r], the singular values, the largest first, all positive.
    """

    vectors: Tensor
    sizes: Tensor

    def left(self, change: Tensor) -> Tensor:
        """U, float64 [rows, r]. ``change`` [rows, columns] is the matrix of which this is the spectrum."""
        if change.shape[0] <= change.shape[1]:
            return self.vectors
        return torch.mm(change.double(), self.vectors) / self.sizes

    def resized(self, change: Tensor, sizes: Tensor) -> Tensor:
        """The change with other singular values, scaled to the same norm; unchanged if it has none.

        Args:
            change: float32 [rows, columns], the matrix of which this is the spectrum.
            sizes: float64 [r], the new singular values up to a common factor.

        Returns:
            float32 [rows, columns].
        """
        if not len(self.sizes):
            return change
        factors = sizes * (self.sizes.norm() / sizes.norm()) / self.sizes
        turned = (self.vectors * factors).float() @ self.vectors.T.float()
        return torch.mm(turned, change) if change.shape[0] <= change.shape[1] else torch.mm(change, turned)


def spectrum(change: Tensor, noise: float = 0.0, *, name: str) -> Spectrum:
    """The singular values of a change to a matrix, and the singular vectors of its short side.

    Singular values that are only rounding errors are left out: their directions mean nothing, and steps that raise
    small singular values would amplify them.

    Args:
        change: [rows, columns], any float dtype.
        noise: singular values up to this one are rounding errors; see ``rounding``.
        name: of the tensor, for errors.

    Raises:
        InputError: the change has NaN or infinities, or torch finds no decomposition.
    """
    side = _wide(change.double())
    values, vectors = _eigen(_gram(side), name)
    sizes = values.clamp(min=0).sqrt()
    # The relative rounding errors of a Gram matrix in float64, and of the change itself in float32.
    lost = max(math.sqrt(len(sizes) * _EPS64), 4 * _EPS32)
    least = max(noise, lost * float(sizes[0])) if len(sizes) else 0.0
    rank = int((sizes > least).sum())
    return Spectrum(vectors[:, :rank], sizes[:rank])


def decomposed(change: Tensor, noise: float = 0.0, *, most: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values and their vectors: U [rows, k], S [k] and V [columns, k], float64.

    Args:
        change, noise, name: as for ``spectrum``.
        most: the largest k; it is smaller if ``spectrum`` has fewer singular values.

    Raises:
        InputError: as for ``spectrum``.
    """
    found = spectrum(change, noise, name=name)
    short, sizes = found.vectors[:, :most], found.sizes[:most]
    long = _wide(change.double()).T @ short / sizes
    return (short, sizes, long) if change.shape[0] <= change.shape[1] else (long, sizes, short)


def rounding(shape: Sequence[int], size: float) -> float:
    """An upper bound for the singular values of the rounding errors of a change computed in float32.

    The largest singular value of a matrix of independent errors of standard deviation e is about e (sqrt(rows) +
    sqrt(columns)). Rounding once gives an e of about a third of the float32 epsilon times ``size``; sums of several
    sources, with weights above one, give a few times as much. The bound takes four epsilons.

    Args:
        shape: of the tensor; its last two dimensions are rows and columns.
        size: root mean square of the matrix's weights.
    """
    rows, columns = shape[-2:]
    return 4 * _EPS32 * size * (math.sqrt(rows) + math.sqrt(columns))


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose if that has fewer rows."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def nearest_orthogonal(vectors: Tensor, *, name: str) -> Tensor:
    """The orthonormal vectors nearest to given ones (the orthogonal Procrustes problem).

    For the singular value decomposition X = P D Q^T, the result is P Q^T = X (X^T X)^(-1/2). Its columns span the same
    space as X: if two vectors are equal, both become their direction divided by sqrt(2).

    Args:
        vectors: X, float64 [length, count].
        name: of the tensor, for errors.

    Returns:
        float64 [length, count].

    Raises:
        InputError: the vectors have NaN or infinities, or torch finds no decomposition.
    """
    values, turn = _eigen(_gram(vectors.T), name)
    there = values > _SAME_DIRECTION * values[:1]
    turn = turn[:, there]
    return vectors @ ((turn / values[there].sqrt()) @ turn.T)


_FEW_ROWS = 256  # rows: below this, computing inner products twice costs little


def _gram(rows: Tensor) -> Tensor:
    """The inner products of rows [n, length] with each other, each computed once: [n, n]."""
    count = len(rows)
    if count <= _FEW_ROWS:
        return rows @ rows.T
    upper, lower = rows[: count // 2], rows[count // 2 :]
    gram = rows.new_empty(count, count)
    gram[: count // 2, : count // 2], gram[count // 2 :, count // 2 :] = _gram(upper), _gram(lower)
    torch.mm(upper, lower.T, out=gram[: count // 2, count // 2 :])
    gram[count // 2 :, : count // 2] = gram[: count // 2, count // 2 :].T
    return gram


def _eigen(gram: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n], the largest first, and eigenvectors [n, n] of a symmetric matrix."""
    if not torch.isfinite(gram).all():
        problem = "its changes have NaN or infinities, or are too large to be squared"
        raise InputError(name, problem, "A source is broken; `evomerge inspect` names it.")
    try:
        values, vectors = torch.linalg.eigh(gram)
    except LinAlgError as error:
        raise InputError(name, f"cannot be decomposed: {error}") from error
    return values.flip(0), vectors.flip(1)
