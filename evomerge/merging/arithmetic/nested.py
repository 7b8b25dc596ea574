"""What one pass makes, for another pass that goes on with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.merging.arithmetic.device import compute_on
from evomerge.merging.arithmetic.jobs import TensorJob
from evomerge.merging.arithmetic.passes import Pass


def made_whole(plan: Pass, tensors: Sequence[Tensor]) -> Tensor:
    """A whole tensor, float32 in its shape, made where ``tensors`` are as quickly as a model's own are.

    Args:
        tensors: what ``plan.inputs`` names, contiguous and in the shape of the tensor.
    """
    out = torch.empty(tensors[0].shape, dtype=torch.float32, device=tensors[0].device)
    if out.device.type != "cpu":
        compute_on(out.device, plan, tensors, out)
        return out
    job = TensorJob(plan, tensors, out)
    for piece in job.pieces:  # in this thread: others make other tensors
        job.run(piece)
    return out
