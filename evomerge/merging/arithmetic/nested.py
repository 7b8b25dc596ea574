"""Running a pass whose result is the input of another pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.merging.arithmetic.device import compute_on
from evomerge.merging.arithmetic.jobs import TensorJob
from evomerge.merging.arithmetic.passes import Pass


def made_whole(plan: Pass, tensors: Sequence[Tensor]) -> Tensor:
    """The result of a pass for a whole tensor, computed on the device of ``tensors`` as fast as a model's own tensors.

    Args:
        tensors: what ``plan.inputs`` names, contiguous and in the shape of the tensor, of any float dtypes.

    Returns:
        float32, of that shape.
    """
    out = torch.empty(tensors[0].shape, dtype=torch.float32, device=tensors[0].device)
    if out.device.type != "cpu":
        compute_on(out.device, plan, tensors, out)
        return out
    job = TensorJob(plan, tensors, out)
    for piece in job.pieces:  # all in this thread, because other threads compute other tensors
        job.run(piece)
    return out
