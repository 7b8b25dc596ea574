"""Singular values and vectors of changes to a matrix, and bases made orthogonal.

Everything goes through the Gram matrix of the short side, in float64: its eigenvectors are the singular vectors of that
side, the roots of its eigenvalues the singular values. One product and one symmetric eigenproblem take a tenth or less
of what a singular value decomposition takes. The price is that values below 1e-7 of the largest cannot be told
from none, which is where float32 has its own end: a decomposition in float32 knows no more.
"""

from __future__ import annotations

import math
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
    """A change D = U S V^T of rank r, by what is needed of it: the other side's vectors are D^T U / S (or D V / S).

    Attributes:
        vectors: float64 [short, r], singular vectors of the short side: U where a matrix is no taller than wide, or V.
        sizes: float64 [r], singular values, the largest first, none of them zero.
    """

    vectors: Tensor
    sizes: Tensor


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
    side = as_wide(change).double()
    values, vectors = _eigen(side @ side.T, name)
    sizes = values.clamp(min=0).sqrt()
    least = max(noise, float(sizes[0]) * math.sqrt(len(sizes) * _EPS64)) if len(sizes) else 0.0
    rank = int((sizes > least).sum())
    return Spectrum(vectors[:, :rank], sizes[:rank])


def rounding(base: Tensor) -> float:
    """The largest singular value, about, of what float32 rounds away where changes are added to a base and taken again.

    A matrix of independent errors of size e has one of e (sqrt(rows) + sqrt(columns)); e is up to half an eps of the
    weights here, and a few times less on average.
    """
    rows, columns = base.shape
    size = float(base.double().square().mean().sqrt()) if base.numel() else 0.0
    return _EPS32 * size * (math.sqrt(rows) + math.sqrt(columns))


def as_wide(matrix: Tensor) -> Tensor:
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
    values, turn = _eigen(vectors.T @ vectors, name)
    there = values > _SAME * values[:1]
    turn = turn[:, there]
    return vectors @ ((turn / values[there].sqrt()) @ turn.T)


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
