"""What a merge method plans for, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.recipes.stack import Role

Ref = tuple[str, str]
"""A source and the name that the tensor has in its files."""


@dataclass(frozen=True, slots=True)
class Site:
    """One tensor that is to be made, and the tensors of the sources that stand in its place.

    Attributes:
        name: as a source that has it names it. Equal for each place in a path where the same layer stands.
        role: what it is in the merged model.
        shape: of it, and of each tensor that it is made from.
        refs: by source, the base among them where there is one: where each has it.
        input_axis: of a matrix of a layer, the dimension along which it meets the layer's input: 1 of [out, in], 0 of
            [in, out], as GPT-2 stores it. Of experts that are kept in one tensor, that of each.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    refs: Mapping[str, Ref]
    input_axis: int = 1

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of a layer, as opposed to a vector, an embedding or a head."""
        stacked = self.name.endswith("bias")  # those of experts that are kept in one tensor
        in_layer = self.role.layer is not None or self.role.kind == "matrix"
        return len(self.shape) == 2 and in_layer and not stacked

    @property
    def matrices(self) -> int:
        """How many matrices of a layer it holds: one, as many as experts that are kept in one tensor, or none."""
        if self.role.layer is not None and len(self.shape) == 3 and min(self.shape[1:]) > 1:  # no kernel of channels
            return self.shape[0]
        return int(self.is_matrix)
