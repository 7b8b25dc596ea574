"""Searches for NaN and infinity in weights at memory speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.compiling import compiler

# A float is NaN or infinite if all bits of its exponent are set; then adding the lowest of them carries into the sign
# bit. A 32-bit word holds one float32 or two 16-bit floats: the masks are the exponent bits, and the lowest of each.
_EXPONENTS = {
    torch.float32: (0x7F800000, 0x00800000),
    torch.bfloat16: (0x7F807F80, 0x00800080),
    torch.float16: (0x7C007C00, 0x04000400),
}
_SIGNS = np.uint32(0x80008000)  # bit 15 of a float32 is never reached: its mask is zero there


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a float dtype, on any device, contains neither NaN nor infinity."""
    scanned = tensor.dtype in _EXPONENTS and tensor.device.type == "cpu" and tensor.is_contiguous()
    if not scanned or tensor.nbytes % 4 or tensor.data_ptr() % 4:
        return bool(torch.isfinite(tensor).all())
    bits, lowest = _EXPONENTS[tensor.dtype]
    words = tensor.detach().reshape(-1).view(torch.int32).numpy().view(np.uint32)
    return not _any_carries(words, np.uint32(bits), np.uint32(lowest))


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with NaN or infinity; either all tensors are in host memory, or none."""
    suspects = list(tensors)
    if tensors and next(iter(tensors.values())).device.type != "cpu":
        suspects = _suspects(tensors)
    return next((name for name in suspects if not all_finite(tensors[name])), None)


def _suspects(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors with a non-finite sum, which finite weights may also have; synchronises each device once."""
    sums: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        sums.setdefault(tensor.device, {})[name] = tensor.sum().float()
    flags = [torch.isfinite(torch.stack(list(own.values()))) for own in sums.values()]  # all queued first
    broken: set[str] = set()
    for own, finite in zip(sums.values(), flags, strict=True):
        broken |= {name for name, is_finite in zip(own, finite.tolist(), strict=True) if not is_finite}
    return [name for name in tensors if name in broken]


@compiler([Path(__file__)])
def _any_carries(words: NDArray[np.uint32], bits: np.uint32, lowest: np.uint32) -> bool:
    """Whether the exponent of any element is all ones; uint32 [n]."""
    step = 1 << 14  # checked without a branch, so that the loop vectorises
    for begin in range(0, len(words), step):
        sums = np.uint32(0)
        chunk = words[begin : begin + step]
        for number in range(len(chunk)):  # numba uses 64 bits unless converted after each step
            sums = np.uint32(sums | np.uint32(np.uint32(chunk[number] & bits) + lowest))
        if sums & _SIGNS:
            return True
    return False
