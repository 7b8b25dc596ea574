"""Represents vectors as sums of few others: orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993)."""

from __future__ import annotations

import torch
from torch import Tensor

_BATCH_BYTES = 64_000_000
"""The maximum bytes of the orthonormal bases for the targets of one batch, and of their products with all atoms."""

_NEAR = 8
"""How many of the best directions by bfloat16 are compared in float32; the rounding of bfloat16 is 0.4%."""

_FOUND = 1e-6
"""Relative to a target's length: a smaller residual is rounding."""


def pursue(targets: Tensor, atoms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each target, the atoms whose weighted sum approximates it, and their coefficients.

    Atoms are chosen one at a time: the one whose direction has the largest inner product with the residual is added,
    and the target is projected again on all chosen atoms. A target that needs fewer atoms has zeros for the rest.

    Args:
        targets: float32 [n, width].
        atoms: float32 [m, width], none of them zero.
        count: how many atoms to choose, at most m and width.

    Returns:
        Indices of atoms, int64 [n, count], and coefficients, float32 [n, count].
    """
    count = min(count, *atoms.shape)
    directions = atoms / atoms.norm(dim=1, keepdim=True)
    rough = directions.bfloat16() if _multiplies_bfloat16() else None
    size = max(1, _BATCH_BYTES // (4 * max(count * atoms.shape[1], len(atoms))))
    parts = [_of_batch(batch, atoms, directions, rough, count) for batch in torch.split(targets, size)]
    if not parts:
        return torch.empty(0, count, dtype=torch.int64), torch.empty(0, count)
    return torch.cat([chosen for chosen, _ in parts]), torch.cat([shares for _, shares in parts])


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has native bfloat16 matrix multiplication, which takes a quarter of the time of float32."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _nearest(left: Tensor, directions: Tensor, rough: Tensor | None) -> Tensor:
    """The index of the direction with the largest inner product with each vector, int64 [n].

    Args:
        left: float32 [n, width].
        directions: float32 [m, width].
        rough: the same in bfloat16, to rule out all but a few; None to skip that step.
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
    basis = torch.zeros(number, count, width)  # orthonormal basis of the chosen atoms
    upper = torch.eye(count).repeat(number, 1, 1)  # their decomposition: atoms^T = basis^T upper
    left, least = targets.clone(), _FOUND * targets.norm(dim=1)
    open_ = torch.ones(number, dtype=torch.bool)
    for step in range(count):
        # The residual is orthogonal to all chosen atoms: one is chosen again only if no other has any component of it.
        best = _nearest(left, directions, rough)
        chosen[:, step] = best
        atom = atoms[best]
        inside = torch.bmm(basis[:, :step], atom[:, :, None])[:, :, 0]
        rest = atom - torch.bmm(inside[:, None], basis[:, :step])[:, 0]
        again = torch.bmm(basis[:, :step], rest[:, :, None])[:, :, 0]  # repeated to correct for rounding
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
