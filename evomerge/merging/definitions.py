"""The plain definitions in torch of the passes that are compiled for the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine(tensors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """sum_k c_k x_k in float32."""
    total = coefficients[0] * tensors[0].float()
    for k, tensor in enumerate(tensors[1:], start=1):
        total = total + coefficients[k] * tensor.float()
    return total


def sparsify(
    tensors: Sequence[Tensor],
    numbers: Tensor,
    masks: Sequence[tuple[Tensor, Tensor]] | None,
    scale: Tensor,
    elect: bool,
    divide: bool,
) -> Tensor:
    """What ``Sparsify`` says, in float32.

    Args:
        tensors: the base and the sources.
        numbers: float32 [parts, 4]: weight, low, high, share.
        masks: for each part random bits and the largest that are kept; None for masks by magnitude.
    """
    base = tensors[0].float()
    total, above, below = torch.zeros_like(base), torch.zeros_like(base), torch.zeros_like(base)
    shares_above, shares_below = torch.zeros_like(base), torch.zeros_like(base)
    for k, tensor in enumerate(tensors[1:]):
        delta = tensor.float() - base
        weight, low, high, share = numbers[k]
        kept = (delta.abs() >= low) & (delta.abs() < high) if masks is None else masks[k][0] <= masks[k][1]
        part = (weight * delta).where(kept, 0.0)
        total = total + part
        above, below = above + part.clamp(min=0), below + part.clamp(max=0)
        shares_above, shares_below = shares_above + share * (part > 0), shares_below + share * (part < 0)
    if not elect:
        return base + total
    positive = above + below >= 0  # a sum of zero counts as positive
    elected, agreeing = torch.where(positive, above, below), torch.where(positive, shares_above, shares_below)
    return base + (scale * (elected / agreeing.where(agreeing != 0, 1.0)) if divide else elected)


def select(tensors: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """What ``Select`` says, in float32; ``numbers`` are the shares and then the least variance."""
    base = tensors[0].float()
    deltas = torch.stack([tensor.float() - base for tensor in tensors[1:]])
    varies = deltas.double().var(dim=0, unbiased=False).float()
    agrees = deltas.sign() == torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)
    kept = numbers[:-1].view(-1, *[1] * base.ndim) * agrees
    return base + ((deltas * kept).sum(dim=0) / kept.sum(dim=0).clamp(min=1e-6)).where(varies >= numbers[-1], 0.0)
