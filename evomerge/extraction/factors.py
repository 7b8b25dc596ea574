"""A change to a matrix as the product of two thin ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import InputError
from evomerge.merging.arithmetic.spectra import decomposed

_FEW = 6
"""Of a matrix's short side, the part from which on a Krylov space is not faster than all singular values."""

_BLOCKS = 4
"""Of directions, each of as many as are kept: a fifth is a quarter more work."""

_AT_ONCE = 1 << 16
"""Numbers that are widened to float64 together."""


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

    A rank that is small beside the matrix is found in a block Krylov space of a random start (Musco and Musco 2015,
    arXiv:1504.05477, algorithm 2), the same in every run; all others by every singular value. Where there are fewer
    singular values above rounding than are wanted, r is their number.

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
        left, sizes, right = _projected(change, most, name)
    else:
        left, sizes, right = decomposed(change, most=short if most is None else most, name=name)
    kept = rule.count(sizes, total)
    roots = sizes[:kept].sqrt()
    return Factors((left[:, :kept] * roots).float(), (right[:, :kept] * roots).float().T.contiguous())


def _projected(change: Tensor, most: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k] and V [in, k] in float64, of about the ``most`` largest singular values that there are.

    A block of vectors of the short side, each block what the change and its transpose make of the one before it; all
    blocks together, not the last alone, are the directions that are looked at.
    """
    wide = change if change.shape[0] <= change.shape[1] else change.T
    start = torch.randn(wide.shape[1], most, generator=torch.Generator().manual_seed(0))
    basis, seen, block = wide.new_empty(wide.shape[0], 0), wide.new_empty(0, wide.shape[1]), start
    for _ in range(_BLOCKS):
        block = wide @ block
        for _ in range(2):  # twice is enough for what float32 can tell apart
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
        met = block.T @ wide
        basis, seen = torch.cat([basis, block], dim=1), torch.cat([seen, met])
        block = torch.linalg.qr(met.T)[0]
    left, sizes, right = decomposed(seen, most=most, name=name)
    left = basis.double() @ left
    return (left, sizes, right) if wide is change else (right, sizes, left)


def lost_energy(change: Tensor, factors: Factors) -> float:
    """||D - B A||^2, where D is a change [out, in]."""
    parts = zip(_pieces(change), _pieces(factors.up, like=change), strict=True)
    return math.fsum(
        float(torch.addmm(part, up, factors.down, alpha=-1.0).double().square().sum()) for part, up in parts
    )


def energy_of(change: Tensor) -> float:
    """The sum of the squares of a change, in float64."""
    return math.fsum(float(part.double().square().sum()) for part in _pieces(change))


def _pieces(rows: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Some rows at a time, in the number in which those of ``like`` fit into the caches: fresh memory takes longer."""
    whole = rows if like is None else like
    return torch.split(rows, max(1, _AT_ONCE * len(whole) // max(1, whole.numel())))
