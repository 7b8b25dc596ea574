"""Vectors as sums of few others: orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993)."""

from __future__ import annotations

import torch
from torch import Tensor

_BASIS_BYTES = 64_000_000
"""Of the directions that are found for the targets of one batch."""

_NEAR = 8
"""Directions that are compared in float32, of those that bfloat16 finds best: its rounding is 0.4%."""

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
    rough = directions.bfloat16() if _multiplies_bfloat16() else None
    size = max(1, _BASIS_BYTES // (4 * count * atoms.shape[1]))
    parts = [_of_batch(batch, atoms, directions, rough, count) for batch in torch.split(targets, size)]
    if not parts:
        return torch.empty(0, count, dtype=torch.int64), torch.empty(0, count)
    return torch.cat([chosen for chosen, _ in parts]), torch.cat([shares for _, shares in parts])


def _multiplies_bfloat16() -> bool:
    """Whether the processor multiplies matrices of bfloat16 as such, in a quarter of the time of float32."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _nearest(left: Tensor, directions: Tensor, rough: Tensor | None) -> Tensor:
    """The number of the direction that each of some vectors has most of, int64 [n].

    Args:
        left: float32 [n, width].
        directions: float32 [m, width].
        rough: the same in bfloat16, by which all but a few are ruled out; None for not at all.
    """
    if rough is None:
        return torch.mm(left, directions.T).abs_().argmax(dim=1)
    near = torch.mm(left.bfloat16(), rough.T).abs_().topk(min(_NEAR, len(rough)), sorted=False).indices
    fits = torch.bmm(directions[near], left[:, :, None])[:, :, 0].abs_()
    return near.gather(1, fits.argmax(dim=1, keepdim=True))[:, 0]


def _of_batch(
    targets: Tensor, atoms: Tensor, directions: Tensor, rough: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    number, width = targets.shape
    chosen = torch.zeros(number, count, dtype=torch.int64)
    basis = torch.zeros(number, count, width)  # orthonormal, of the atoms that were taken
    upper = torch.eye(count).repeat(number, 1, 1)  # of their decomposition: atoms^T = basis^T upper
    left, least = targets.clone(), _FOUND * targets.norm(dim=1)
    open_ = torch.ones(number, dtype=torch.bool)
    for step in range(count):
        # What is left is orthogonal to all that were taken: one is taken again only where no other has any of it.
        best = _nearest(left, directions, rough)
        chosen[:, step] = best
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
