"""Whether a smooth loss of the merged model has a gradient in a search space."""

from __future__ import annotations

from evomerge.blends import derivative_problem
from evomerge.genome import SearchSpace
from evomerge.recipes.stack import StackRecipe


def gradient_problem(space: SearchSpace) -> str | None:
    """Why a loss has no gradient in a search space; None if it has one for at least some of the parameters.

    No model is needed: it depends on methods and steps, which are known from the space's default baselines.
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
        return "weights are not a differentiable function of any of its parameters"
    return None
