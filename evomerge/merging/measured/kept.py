"""How much evidence a search will keep, from the shapes of tensors alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from evomerge.blends import observed
from evomerge.checkpoints.source import Source
from evomerge.merging.site import Site
from evomerge.method import find_method
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import StackRecipe


def evidence_bytes(recipes: Sequence[Recipe], sources: Mapping[str, Source]) -> int:
    """About the bytes of what methods follow from, kept once for all candidates; next to nothing else is left out.

    That is what a method keeps of whole matrices, as if no two changes had directions in common, and the Gram matrices
    of layers' inputs on calibration texts, as if no two layers had the same input.

    Args:
        recipes: models of the search, which between them have all of its methods.
        sources: by the names that recipes use; all have matrices of the same shapes.
    """
    blends = {
        (blend.method, blend.sources)
        for recipe in recipes
        if isinstance(recipe, StackRecipe)
        for blend in recipe.blends
        if blend.basis is None  # what is kept of cores is as small as these
    }
    keeping = [(kept, len(mixed)) for method, mixed in blends if (kept := find_method(method, "blend").kept)]
    calibrated = sum("calibration" in needs for needs in observed(recipes, sources).values())
    total = 0
    for rows, columns, is_linear in _matrices(next(iter(sources.values()))):
        total += sum(kept(rows, columns, count) for kept, count in keeping)
        total += calibrated * 4 * columns * (columns + 1) * is_linear
    return total


def _matrices(model: Source) -> Iterable[tuple[int, int, bool]]:
    """The shape of each matrix of a layer as [out, in], and whether it is a linear layer of its own."""
    for stored, role in model.roles.items():
        site = Site(stored, role, model.tensors[stored].shape, {}, input_axis=0 if stored in model.transposed else 1)
        if site.matrices:
            stands = site.shape[-2:]
            rows, columns = stands if site.input_axis == 1 else reversed(stands)
            yield from [(rows, columns, site.is_matrix)] * site.matrices
