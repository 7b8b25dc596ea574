"""The plain model beside whose modules experts are gated."""

from __future__ import annotations

from evomerge.recipes.routed import RoutedRecipe
from evomerge.recipes.stack import Blend, StackRecipe


def base_alone(recipe: RoutedRecipe, layers: int) -> StackRecipe:
    """The base of a recipe, unchanged."""
    return trunk_of(recipe.model_copy(update={"rest": None}), layers)


def trunk_of(recipe: RoutedRecipe, layers: int) -> StackRecipe:
    """The base, except for blocks that are not routed, which are made by ``rest``.

    Args:
        layers: the number of layers of the base.
    """
    base = Blend.copy_of(recipe.base)
    rest = recipe.rest or base
    attention = rest if recipe.where == "mlp" else base
    mlp = rest if recipe.where == "attention" else base
    return StackRecipe.compose(
        sources=recipe.sources,
        tokenizer=recipe.tokenizer,
        embedding=base,
        hops=((layer, attention, mlp, base) for layer in range(layers)),
        norm=base,
        head=base,
        seed=recipe.seed,
        dtype=recipe.dtype,
    )
