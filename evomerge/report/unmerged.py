"""Whether a recipe merges anything."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.method import is_copy
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import StackRecipe


def unmerged_source(recipe: Recipe, depths: Mapping[str, int]) -> str:
    """The source that a recipe copies, with all layers in order and unscaled; empty if it is a merge."""
    used = recipe.used_sources()
    if not isinstance(recipe, StackRecipe) or len(used) != 1 or recipe.is_scaled:
        return ""
    (name,) = used
    in_order = [hop.layer for hop in recipe.hops] == list(range(depths[name]))
    return name if in_order and all(map(is_copy, recipe.blends)) else ""
