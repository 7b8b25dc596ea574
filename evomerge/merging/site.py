"""What a merge method plans for, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.recipes.stack import Role

Ref = tuple[str, str]
"""A source and the name of the tensor in its files."""


@dataclass(frozen=True, slots=True)
class Site:
    """One tensor to make, and the corresponding tensors of the sources.

    Attributes:
        name: its name in a source that has it; equal for every place in a path that has the same layer.
        role: its role in the merged model.
        shape: of it, and of each tensor that it is made from.
        refs: by source, including the base if there is one: where each has it.
        input_axis: for a matrix of a layer, the dimension of the layer's input: 1 for [out, in], 0 for [in, out], as in
            GPT-2. For experts stored in one tensor, that of each expert.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    refs: Mapping[str, Ref]
    input_axis: int = 1

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of a layer, as opposed to a vector, an embedding or a head."""
        stacked = self.name.endswith("bias")  # biases of experts that are stored in one tensor
        in_layer = self.role.layer is not None or self.role.kind == "matrix"
        return len(self.shape) == 2 and in_layer and not stacked

    @property
    def matrices(self) -> int:
        """How many matrices of a layer it holds: one, the number of experts stored in one tensor, or none."""
        if self.role.layer is not None and len(self.shape) == 3 and min(self.shape[1:]) > 1:  # not a convolution kernel
            return self.shape[0]
        return int(self.is_matrix)
