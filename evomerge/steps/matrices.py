"""Steps on the weights of linear layers as matrices: what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from evomerge.merging.changes import Change
from evomerge.merging.passes import Pass
from evomerge.merging.plans import base_of
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.facts import Facts

OfMatrix: TypeAlias = "Callable[[Tensor, Sequence[Tensor], float], Tensor]"
"""(change [out, in] of one layer, the sources' task vectors of that shape, the largest singular value that rounding may
have) -> another change; all float32."""


def matrix_by_matrix(facts: Facts, blend: Blend, made: Pass, function: OfMatrix, *, with_sources: bool = False) -> Pass:
    """What a method made, with the change of each matrix of a layer replaced; of all other tensors as it is.

    Args:
        function: gives the other change.
        with_sources: it looks at the task vectors of the blend's sources too.
    """
    if not facts.site.matrices:
        return made
    from evomerge.merging.spectra import rounding

    base = base_of(blend)
    noise = rounding(facts.site.shape, facts.size_of(base))

    def of_tensor(change: Tensor, *vectors: Tensor) -> Tensor:
        own, *others = (_matrices(tensor, facts.site.input_axis) for tensor in (change, *vectors))
        for number, matrix in enumerate(own):
            matrix.copy_(function(matrix, [of_source[number] for of_source in others], noise))
        return change

    return Change(base, made, of_tensor, blend.sources if with_sources else ())


def _matrices(tensor: Tensor, input_axis: int) -> Tensor:
    """A tensor of a layer as [matrices, out, in], of the same memory."""
    stacked = tensor.view(-1, *tensor.shape[-2:])
    return stacked if input_axis == 1 else stacked.transpose(1, 2)
