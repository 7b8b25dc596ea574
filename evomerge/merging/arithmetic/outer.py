"""A pass that adds a matrix of low rank to a sum of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.merging.arithmetic.passes import Compute, Grain, Kernel, Span, call

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """b + sum_k f_k d_k + L R, with other numbers for each matrix of a tensor.

    Attributes:
        base: name of b.
        sources: names of the sources, in the order of k.
        factors: f_k, float32 [matrices, sources].
        left: L, float32 [rows of all matrices, rank].
        right: R, float32 [matrices, rank, columns].
    """

    base: str
    sources: tuple[str, ...]
    factors: Tensor = field(compare=False)
    left: Tensor = field(compare=False)
    right: Tensor = field(compare=False)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.base, *self.sources)

    @property
    def grain(self) -> Grain:
        return "row"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        """``tensors`` are whole rows [rows, length] from element ``first`` of the whole."""
        import torch

        from evomerge.merging.arithmetic.definitions import outer

        (count, length), device = tensors[0].shape, tensors[0].device
        row, of_each = first // max(length, 1), len(self.left) // len(self.right)
        matrix = torch.arange(row, row + count, device=device) // of_each
        left = self.left[row : row + count].to(device)
        return compute(outer, tensors, self.factors.to(device)[matrix], left, self.right.to(device), matrix)

    def kernel(self) -> Kernel:
        from evomerge.merging.arithmetic import kernels

        factors, left, right = (tensor.numpy() for tensor in (self.factors, self.left, self.right))

        def run(arrays: tuple[Any, ...], out: Any, span: Span) -> None:
            row, first = max(span.row // 2, 1), span.first // max(span.row, 1)
            kernels.outer(
                arrays[0], arrays[1:], factors, left, right, np.uint64(first), np.uint64(row), out, span.stream
            )

        return run
