"""Whether a smooth loss of the merged model has a gradient in a search space."""

from __future__ import annotations

from evomerge.blends import derivative_problem
from evomerge.genome import SearchSpace
from evomerge.recipes.stack import StackRecipe


def gradient_problem(space: SearchSpace) -> str | None:
    """Why a loss has no gradient in a search space; None where it has one, by some of the parameters at least.

    It needs no model: what counts are the methods and the steps, which the space's own defaults name.
    """
    for baseline in space.baselines():
        if baseline.kind != "default" or baseline.genome is None:
            continue
        if not isinstance(baseline.recipe, StackRecipe):
            return f"recipes of the kind {baseline.recipe.kind} have none"
        for blend in baseline.recipe.blends:
            if (problem := derivative_problem(blend)) is not None:
                return problem
    if not any(parameter.differentiable for parameter in space.parameters):
        return "weights follow none of its parameters without jumps"
    return None
