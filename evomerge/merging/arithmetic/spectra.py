"""Singular values and vectors of changes to a matrix, and bases made orthogonal.

Everything goes through the Gram matrix of the short side, in float64: its eigenvectors are the singular vectors of that
side, the roots of its eigenvalues the singular values. One product and one symmetric eigenproblem take a tenth or less
of what a singular value decomposition takes. The price is that values below 1e-7 of the largest cannot be told
from none, which is where float32 has its own end: a decomposition in float32 knows no more.
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

_SAME = 1e-12
"""Of the largest eigenvalue of a Gram matrix of directions: below it two of them are one but for rounding."""


@dataclass(frozen=True)
class Spectrum:
    """A change D = U S V^T of rank r, by the vectors of its short side.

    Attributes:
        vectors: float64 [short, r]: U where a matrix is no taller than wide, or V.
        sizes: float64 [r], the singular values, the largest first, none of them zero.
    """

    vectors: Tensor
    sizes: Tensor

    def left(self, change: Tensor) -> Tensor:
        """U, float64 [rows, r], of the change [rows, columns] of which this is the spectrum."""
        if change.shape[0] <= change.shape[1]:
            return self.vectors
        return torch.mm(change.double(), self.vectors) / self.sizes

    def resized(self, change: Tensor, sizes: Tensor) -> Tensor:
        """The change with other singular values, of the same norm; as it is where it has no singular values.

        Args:
            change: [rows, columns], of which this is the spectrum.
            sizes: float64 [r].

        Returns:
            float32 [rows, columns].
        """
        if not len(self.sizes):
            return change
        factors = sizes * (self.sizes.norm() / sizes.norm()) / self.sizes
        turned = (self.vectors * factors).float() @ self.vectors.T.float()
        return torch.mm(turned, change) if change.shape[0] <= change.shape[1] else torch.mm(change, turned)


def spectrum(change: Tensor, noise: float = 0.0, *, name: str) -> Spectrum:
    """The singular values of a change to a matrix, and the vectors of its short side.

    What rounding made is left out: it has no direction, and whoever makes singular values larger would make it large.

    Args:
        change: [rows, columns].
        noise: singular values up to this one are rounding; see ``rounding``.
        name: of the tensor, for errors.

    Raises:
        InputError: it has NaN or infinities, or no decomposition is found.
    """
    side = _wide(change.double())
    values, vectors = _eigen(_gram(side), name)
    sizes = values.clamp(min=0).sqrt()
    # What float64 loses in a Gram matrix, and float32 in the change itself.
    lost = max(math.sqrt(len(sizes) * _EPS64), 4 * _EPS32)
    least = max(noise, lost * float(sizes[0])) if len(sizes) else 0.0
    rank = int((sizes > least).sum())
    return Spectrum(vectors[:, :rank], sizes[:rank])


def decomposed(change: Tensor, noise: float = 0.0, *, most: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U [rows, k], S [k] and V [columns, k] in float64, of the k largest singular values: ``most``, or all there are.

    Args, Raises: as ``spectrum``.
    """
    found = spectrum(change, noise, name=name)
    short, sizes = found.vectors[:, :most], found.sizes[:most]
    long = _wide(change.double()).T @ short / sizes
    return (short, sizes, long) if change.shape[0] <= change.shape[1] else (long, sizes, short)


def rounding(shape: Sequence[int], size: float) -> float:
    """The largest singular value that float32 may leave where changes are added to a matrix and taken from it again.

    A matrix of independent errors of size e has one of e (sqrt(rows) + sqrt(columns)). What is rounded once has an e of
    a third of an eps of its weights; sums of several sources, with weights beyond one, have a few times as much.

    Args:
        shape: rows and columns, last.
        size: of the matrix's weights, the root of their mean square.
    """
    rows, columns = shape[-2:]
    return 4 * _EPS32 * size * (math.sqrt(rows) + math.sqrt(columns))


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, with its short side first."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def nearest_orthogonal(vectors: Tensor, *, name: str) -> Tensor:
    """P Q^T of X = P D Q^T, the orthonormal vectors that lie nearest to some vectors (the Procrustes problem).

    It is X (X^T X)^(-1/2). Directions that X has not are none of the result: where two vectors are the same, both
    become their shared direction over sqrt(2).

    Args:
        vectors: float64 [length, count].
        name: of the tensor, for errors.

    Returns:
        float64 [length, count].
    """
    values, turn = _eigen(_gram(vectors.T), name)
    there = values > _SAME * values[:1]
    turn = turn[:, there]
    return vectors @ ((turn / values[there].sqrt()) @ turn.T)


_FEW = 256  # rows, of which a product takes little


def _gram(rows: Tensor) -> Tensor:
    """The inner products of rows [n, length] with each other, each computed once: [n, n]."""
    count = len(rows)
    if count <= _FEW:
        return rows @ rows.T
    upper, lower = rows[: count // 2], rows[count // 2 :]
    gram = rows.new_empty(count, count)
    gram[: count // 2, : count // 2], gram[count // 2 :, count // 2 :] = _gram(upper), _gram(lower)
    torch.mm(upper, lower.T, out=gram[: count // 2, count // 2 :])
    gram[count // 2 :, : count // 2] = gram[: count // 2, count // 2 :].T
    return gram


def _eigen(gram: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and eigenvectors of a symmetric matrix."""
    if not torch.isfinite(gram).all():
        problem = "its changes have NaN or infinities, or are too large to be squared"
        raise InputError(name, problem, "A source is broken; `evomerge inspect` names it.")
    try:
        values, vectors = torch.linalg.eigh(gram)
    except LinAlgError as error:
        raise InputError(name, f"cannot be decomposed: {error}") from error
    return values.flip(0), vectors.flip(1)
