"""Whether a search over mixtures has what its models need: memory, and texts for each slot."""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.genome import SearchSpace
from evomerge.mixture.layout import has_bias, needed_bytes
from evomerge.recipes.mixture import MixtureRecipe
from evomerge.search.settings.search_file import SearchFile


def mixture_bytes(space: SearchSpace, sources: Mapping[str, Source]) -> int:
    """The bytes of the largest mixture's weights, in its sources' dtypes; 0 if the space has no mixtures."""
    recipes = (mark.recipe for mark in space.baselines())
    return max(
        (
            needed_bytes(
                sources[recipe.tokenizer],
                len(recipe.slots),
                shared=recipe.shared is not None or has_bias(recipe),  # it has one of that width, even if all zeros
                untied=has_bias(recipe),
            )
            for recipe in recipes
            if isinstance(recipe, MixtureRecipe)
        ),
        default=0,
    )


def check_mixtures(file: SearchFile, space: SearchSpace, sources: Mapping[str, Source]) -> None:
    """Refuse mixtures that this machine would have to hold and cannot, and prototypes without texts of their own.

    Raises:
        InputError: naming the key of the search file.
    """
    needed, room = mixture_bytes(space, sources), psutil.virtual_memory().total
    if file.cluster.address is None and needed > room:
        problem = f"make models of {needed / 1e9:,.1f} GB, and this machine has {room / 1e9:,.1f} GB of memory"
        raise InputError("space.slots", problem, "Name fewer slots, or search where there is more memory.")
    recipes = [mark.recipe for mark in space.baselines() if isinstance(mark.recipe, MixtureRecipe)]
    own = {} if file.calibration is None else file.calibration.sources
    for recipe in recipes:
        missing = [slot for slot in recipe.slots if slot not in own]
        if recipe.router.kind == "prototypes" and missing:
            problem = f"has no texts of {missing[0]}'s own, of which its prototype is made"
            raise InputError("calibration.sources", problem, "Give each slot a file of its own.")
