"""A change to a matrix as the product of two thin ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import InputError
from evomerge.merging.arithmetic.spectra import decomposed

_FEW = 6
"""Of a matrix's short side, the part from which on a random projection is not faster than all singular values."""

_MORE = 1.5
"""How many directions are looked for, in those that are kept; and ``_LEAST_MORE`` beside."""

_LEAST_MORE = 8
_AT_ONCE = 1 << 16
"""Numbers that are widened to float64 together."""

_ROUNDS = 2  # of multiplying with the change and its transpose, after which small singular values hardly disturb


@dataclass(frozen=True)
class RankRule:
    """How many singular values of a change are kept.

    Attributes:
        most: no more than this; None for as many as there are.
        energy: as few as hold this share of the sum of their squares; None for ``most``.
    """

    most: int | None = None
    energy: float | None = None

    def count(self, sizes: Tensor, total: float) -> int:
        """Of singular values, the largest first, how many are kept.

        Args:
            total: the sum of the squares of all there are.
        """
        kept = len(sizes)
        if self.energy is not None:
            held = sizes.square().cumsum(0)
            kept = min(kept, int((held < self.energy * total).sum()) + 1)
        return kept if self.most is None else min(kept, self.most)


@dataclass(frozen=True)
class Factors:
    """A change [out, in] as ``up`` @ ``down``, float32 [out, r] and [r, in], which share its singular values."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)


def factorised(change: Tensor, rule: RankRule, *, name: str) -> Factors:
    """The product of rank r that is nearest to a change, from its largest singular values.

    A rank that is small beside the matrix is found by a random projection with power iterations (Halko, Martinsson and
    Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1), the same in every run; all others by every singular value.

    Args:
        change: float32 [out, in].
        name: of the tensor, for errors.

    Raises:
        InputError: it has NaN or infinities.
    """
    total = energy_of(change)
    if not math.isfinite(total):
        raise InputError(name, "its change has NaN or infinities", "A model is broken; `evomerge inspect` names it.")
    short, most = min(change.shape), rule.most
    if total == 0.0:
        return Factors(change.new_zeros(change.shape[0], 0), change.new_zeros(0, change.shape[1]))
    if rule.energy is None and most is not None and most * _FEW <= short:
        left, sizes, right = _projected(change, most)
    else:
        left, sizes, right = decomposed(change, most=short if most is None else most, name=name)
    kept = rule.count(sizes, total)
    roots = sizes[:kept].sqrt()
    return Factors((left[:, :kept] * roots).float(), (right[:, :kept] * roots).float().T.contiguous())


def _projected(change: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, most], S [most] and V [in, most], float32, of about the largest singular values."""
    width = min(int(_MORE * most) + _LEAST_MORE, min(change.shape))
    start = torch.randn(change.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(change @ start)[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(change @ torch.linalg.qr(change.T @ basis)[0])[0]
    left, sizes, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
    return basis @ left[:, :most], sizes[:most], right[:most].T


def lost_energy(change: Tensor, factors: Factors) -> float:
    """||D - B A||^2, where D is a change [out, in]."""
    return energy_of(torch.addmm(change, factors.up, factors.down, alpha=-1.0))


def energy_of(change: Tensor) -> float:
    """The sum of the squares of a change, in float64; some rows at a time: fresh memory takes longer than the sum."""
    rows = max(1, _AT_ONCE * len(change) // max(1, change.numel()))
    return math.fsum(float(part.double().square().sum()) for part in torch.split(change, rows))
