"""Over how many directions changes to matrices spread, and how far two changes share them.

The effective rank of singular values s is exp(H), H the entropy of p = s^2 / sum s^2 (Roy & Vetterli 2007; of squares,
as in arXiv 2602.09413): r for r equal values, and little more than 1 for a large one and many small. For several
matrices it is that of all their singular values, as for one matrix with these as its blocks, so sums suffice.

The overlap of two changes is the cosine of their Gram matrices on the short side, T T^T less the mean of its diagonal:
1 if both have the same squares in the same directions, 0 if directions are independent, whether or not the changes
themselves have the same sign there. Singular values are exact, from the eigenvalues of Gram matrices in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""B [rows, rank] and A [rank, columns] of a low-rank change B A."""


@dataclass(frozen=True)
class Directions:
    """Sums over matrices, for n changes to each.

    Attributes:
        squares: float64 [n], of singular values: sum s^2.
        logarithms: float64 [n], sum s^2 log s^2.
        shared: float64 [n, n], inner products of Gram matrices without the mean of their diagonals.
    """

    squares: NDArray[np.float64]
    logarithms: NDArray[np.float64]
    shared: NDArray[np.float64]

    @classmethod
    def none(cls, count: int) -> Directions:
        """The sums over no matrix."""
        return cls(np.zeros(count), np.zeros(count), np.zeros((count, count)))

    def __add__(self, other: Directions) -> Directions:
        return Directions(self.squares + other.squares, self.logarithms + other.logarithms, self.shared + other.shared)

    def rank(self, k: int) -> float | None:
        """The effective rank of change k; None if it is zero."""
        if not self.squares[k] > 0:
            return None
        return math.exp(math.log(self.squares[k]) - self.logarithms[k] / self.squares[k])

    def overlap(self, k: int, m: int) -> float | None:
        """How far changes k and m share directions; None if one is zero, or has no dominant directions."""
        lengths = math.sqrt(self.shared[k, k] * self.shared[m, m])
        return float(np.clip(self.shared[k, m] / lengths, -1, 1)) if lengths else None


def of_matrices(changes: Sequence[Tensor | Factors]) -> Directions:
    """The directions of n changes to one tensor.

    Args:
        changes: each [rows, columns], or [..., rows, columns] for several matrices, or factors of a low-rank one.
    """
    total = Directions.none(len(changes))
    wide = [change if isinstance(change, tuple) else change.reshape(-1, *change.shape[-2:]) for change in changes]
    if any(isinstance(change, tuple) for change in wide):
        return _of_one([change if isinstance(change, tuple) else change[0] for change in wide])
    for matrices in zip(*wide, strict=True):
        total += _of_one(matrices)
    return total


def _of_one(changes: Sequence[Tensor | Factors]) -> Directions:
    found = [_gram_and_values(change) for change in changes]
    shared = np.zeros((len(found), len(found)))
    centred = [gram - gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype) for gram, _ in found]
    for k, ours in enumerate(centred):
        for m, theirs in enumerate(centred[: k + 1]):
            shared[k, m] = shared[m, k] = float((ours * theirs).sum())
    values = [value.clamp(min=0) for _, value in found]
    squares = np.array([float(value.sum()) for value in values])
    return Directions(squares, np.array([float(torch.xlogy(value, value).sum()) for value in values]), shared)


def _gram_and_values(change: Tensor | Factors) -> tuple[Tensor, Tensor]:
    """T T^T of the short side, and its nonzero eigenvalues s^2."""
    if isinstance(change, tuple):
        up, down = (factor.double() for factor in change)
        if len(up) > down.shape[1]:
            up, down = down.T, up.T
        middle = down @ down.T
        # s^2 are the eigenvalues of (B^T B)(A A^T), those of the symmetric L^T (B^T B) L with A A^T = L L^T.
        values, turn = torch.linalg.eigh(middle)
        root = turn * values.clamp(min=0).sqrt()
        return up @ middle @ up.T, torch.linalg.eigvalsh(root.T @ (up.T @ up) @ root)
    side = (change if change.shape[0] <= change.shape[1] else change.T).double()
    gram = side @ side.T
    return gram, torch.linalg.eigvalsh(gram)


def work(shape: Sequence[int]) -> float:
    """The approximate operations for the directions of a change to a tensor of this shape, without factors."""
    short, long = sorted(shape[-2:])
    return math.prod(shape[:-2]) * (2.0 * short**2 * long + 8.0 * short**3)
