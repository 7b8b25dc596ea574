"""Derivatives of a loss with respect to the numbers of passes, from its derivatives with respect to merged weights.

For the result m of a pass and its numbers n, dL/dn = <dL/dm, dm/dn>. Masks count as constants, because they come from
comparisons, which have no derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evomerge.merging.arithmetic.changes import Rescale
from evomerge.merging.arithmetic.jobs import in_grain
from evomerge.merging.arithmetic.passes import Combine, Differentiable, Pass

_NEGLIGIBLE = 1e-60
_PIECE = 1 << 16
"""Elements of a piece: few enough that intermediate results of a plain definition stay in the processor's cache."""


def derivatives_of(plan: Differentiable, tensors: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """The derivative of a loss with respect to each number of a pass over a whole tensor.

    Args:
        tensors: what ``plan.inputs`` names, contiguous, of any float dtypes.
        gradient: derivative of the loss with respect to each element of the tensor, of its shape and any float dtype.

    Returns:
        float64 [numbers], on the device of ``tensors``.
    """
    shape, total, grain = gradient.shape, gradient.numel(), plan.grain
    row = shape[-1] if shape else 1
    step = {"element": _PIECE, "row": max(1, _PIECE // max(row, 1)) * row, "tensor": total}[grain] or 1
    flat, whole = [tensor.reshape(-1) for tensor in tensors], gradient.reshape(-1)
    found = torch.zeros(plan.numbers.size, dtype=torch.float64, device=whole.device)
    for begin in range(0, total, step):
        pieces = [in_grain(grain, tensor[begin : begin + step], shape) for tensor in flat]
        found += plan.derivatives(pieces, begin, in_grain(grain, whole[begin : begin + step].float(), shape))
    return found


def with_every_source(plan: Pass) -> Pass:
    """The same pass, except that a combination also reads the sources whose coefficient is zero.

    Such a coefficient becomes so small that it is zero in float32, in which the pass computes.
    """
    if isinstance(plan, Rescale):
        return replace(plan, made=with_every_source(plan.made))
    if isinstance(plan, Combine):
        return Combine({name: c or _NEGLIGIBLE for name, c in plan.coefficients.items()})
    return plan
