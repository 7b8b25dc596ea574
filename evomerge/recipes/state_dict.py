"""The recipe of a merged table of tensors without a transformers architecture, by groups of tensors."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from evomerge.recipes.base import Frozen, Recipe
from evomerge.recipes.stack import Blend

Keys = Literal["same", "union", "intersection"]
"""How to treat tensors that not all tables have: as an error, copied from the first table that has them, or omitted."""


class TensorGroup(Frozen):
    """Tensors that are made in the same way.

    Attributes:
        name: its display name.
        patterns: patterns of the names of tensors or blocks; see ``evomerge.raw.blocks.grouped``.
        blend: how they are made.
    """

    name: str
    patterns: tuple[str, ...] = Field(min_length=1)
    blend: Blend


class StateDictRecipe(Recipe):
    """A table of tensors. A tensor belongs to the first group with a matching pattern; others are copied.

    ``tokenizer`` is the source that tensors are copied from, and that provides the layout: a table reads no texts.
    ``dtype`` is the dtype in which tensors of groups are stored; copied tensors are unchanged.
    """

    kind: ClassVar[str] = "state_dict"

    groups: tuple[TensorGroup, ...] = ()
    keys: Keys = "same"

    @model_validator(mode="after")
    def _refers_to_what_exists(self) -> StateDictRecipe:
        self.refuse_unknown_sources()
        counts = Counter(group.name for group in self.groups)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"has two groups {twice[0]!r}")
        return self

    def used_sources(self) -> set[str]:
        bases = {group.blend.base for group in self.groups if group.blend.base is not None}
        return {self.tokenizer} | self.mixed_sources() | bases

    def mixed_sources(self) -> set[str]:
        mixed = {name for group in self.groups for name in group.blend.sources}
        return mixed if self.groups else {self.tokenizer}

    def lines(self) -> list[str]:
        if not self.groups:
            return [f"{self.tokenizer}, as it is"]
        return [*(_line(group) for group in self.groups), f"all other tensors of {self.tokenizer}, as they are"]


def _line(group: TensorGroup) -> str:
    """A description of a group: "IN04: linear of a 0.3, b 0.7"."""
    blend = group.blend
    base = "" if blend.base is None else f" on {blend.base}"
    said = []
    for name, value in blend.parameters.items():
        if isinstance(value, dict):
            said.append(f"{name} " + ", ".join(f"{source} {_number(one)}" for source, one in value.items()))
        else:
            said.append(f"{name} {_number(value)}")
    return f"{group.name}: {blend.method} of {', '.join(blend.sources)}{base}; {'; '.join(said)}"


def _number(value: bool | float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()
