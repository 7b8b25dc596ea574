"""Derivatives of a loss by the numbers of passes, from its derivatives by the weights that they make.

For the result m of a pass and its numbers n, dL/dn = <dL/dm, dm/dn>. Masks are constants: they follow from comparisons,
which have no derivative, so what is differentiated is the pass with the masks that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evomerge.merging.arithmetic.changes import Rescale
from evomerge.merging.arithmetic.jobs import in_grain
from evomerge.merging.arithmetic.passes import Combine, Differentiable, Pass

_NEXT_TO_NOTHING = 1e-60
_PIECE = 1 << 16
"""Elements of a piece: what a plain definition makes on its way stays in the processor's cache."""


def derivatives_of(plan: Differentiable, tensors: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """The derivative by each number of a pass over a whole tensor: float64 [numbers], where ``tensors`` are.

    Args:
        tensors: what ``plan.inputs`` names, contiguous.
        gradient: of the loss by the elements of the tensor, of its shape and any float dtype.
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
    """The same pass, but for a combination that leaves out sources whose coefficient is zero: it reads these, too.

    Their coefficients are next to nothing, and zero in float32, in which it computes.
    """
    if isinstance(plan, Rescale):
        return replace(plan, made=with_every_source(plan.made))
    if isinstance(plan, Combine):
        return Combine({name: c or _NEXT_TO_NOTHING for name, c in plan.coefficients.items()})
    return plan
