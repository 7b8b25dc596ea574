"""Vectors as sums of few others: orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993)."""

from __future__ import annotations

import torch
from torch import Tensor

_BASIS_BYTES = 64_000_000
"""Of the directions that are found for the targets of one batch."""

_FOUND = 1e-6
"""Of a target's length: what is left below it is rounding."""


def pursue(targets: Tensor, atoms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each target the atoms whose sum is near to it, and how much of each.

    One after the other that atom is taken whose direction what is left of the target has most of, and the target is
    projected anew on all that were taken. A target that is a sum of fewer atoms has zeros for the rest.

    Args:
        targets: float32 [n, width].
        atoms: float32 [m, width], none of them zero.
        count: how many atoms are taken, at most m and width.

    Returns:
        Numbers of atoms, int64 [n, count], and coefficients, float32 [n, count].
    """
    count = min(count, *atoms.shape)
    directions = atoms / atoms.norm(dim=1, keepdim=True)
    size = max(1, _BASIS_BYTES // (4 * count * atoms.shape[1]))
    parts = [_of_batch(batch, atoms, directions, count) for batch in torch.split(targets, size)]
    if not parts:
        return torch.empty(0, count, dtype=torch.int64), torch.empty(0, count)
    return torch.cat([chosen for chosen, _ in parts]), torch.cat([shares for _, shares in parts])


def _of_batch(targets: Tensor, atoms: Tensor, directions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    number, width = targets.shape
    every = torch.arange(number)
    chosen = torch.zeros(number, count, dtype=torch.int64)
    basis = torch.zeros(number, count, width)  # orthonormal, of the atoms that were taken
    upper = torch.eye(count).repeat(number, 1, 1)  # of their decomposition: atoms^T = basis^T upper
    left, least = targets.clone(), _FOUND * targets.norm(dim=1)
    used = torch.zeros(number, len(atoms), dtype=torch.bool)
    open_ = torch.ones(number, dtype=torch.bool)
    for step in range(count):
        fit = (left @ directions.T).abs().masked_fill_(used, -1.0)
        best = fit.argmax(dim=1)
        chosen[:, step] = best
        used[every, best] = True
        atom = atoms[best]
        inside = torch.bmm(basis[:, :step], atom[:, :, None])[:, :, 0]
        rest = atom - torch.bmm(inside[:, None], basis[:, :step])[:, 0]
        again = torch.bmm(basis[:, :step], rest[:, :, None])[:, :, 0]  # once more, for what rounding left
        rest = rest - torch.bmm(again[:, None], basis[:, :step])[:, 0]
        length = rest.norm(dim=1)
        open_ &= (left.norm(dim=1) > least) & (length > _FOUND * atom.norm(dim=1))
        upper[:, :step, step] = inside + again
        upper[:, step, step] = torch.where(open_, length, 1.0)
        basis[:, step] = torch.where(open_[:, None], rest / length.clamp_min(1e-30)[:, None], 0.0)
        left = left - (left * basis[:, step]).sum(dim=1, keepdim=True) * basis[:, step]
    seen = torch.bmm(basis, targets[:, :, None])
    shares = torch.linalg.solve_triangular(upper, seen, upper=True)[:, :, 0]
    return chosen, shares
