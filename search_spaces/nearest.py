"""The point of a space closest to a recipe, which is how a genome of one space is carried over to another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.genome import Parameter
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import Blend, Role, StackRecipe, roles

SCALE = "scale"
"""The step that multiplies a change by its only number, ``factor``; profiles are written as this step."""


class Profile(Protocol):
    """A profile over depth: the factor of each layer is a linear function of its numbers, plus a constant."""

    @property
    def parameters(self) -> Sequence[Parameter]: ...

    def factor(self, numbers: Sequence[float], layer: int | None) -> float: ...


def blends_of(recipe: Recipe, layers: int) -> dict[Role, Blend] | None:
    """The blend of each role of a merge of weights only; None if the recipe is anything else, or of another depth."""
    if not isinstance(recipe, StackRecipe) or recipe.is_scaled or recipe.tensors:
        return None
    if [hop.layer for hop in recipe.hops] != list(range(layers)):
        return None
    return {role: recipe.blend_for(role) for role in roles(layers)}


def without_scale(blend: Blend) -> tuple[Blend, float]:
    """A blend without its final scaling, and the factor of that scaling."""
    if not blend.steps or blend.steps[-1].name != SCALE:
        return blend, 1.0
    factor = blend.steps[-1].parameters.get("factor", 1.0)
    assert isinstance(factor, float)
    return blend.model_copy(update={"steps": blend.steps[:-1]}), factor


def common_numbers(rows: Sequence[Sequence[float]], parameters: Sequence[Parameter]) -> list[float]:
    """One number per parameter from several rows: the mean, rounded for an int, and the most frequent for a choice.

    If all rows agree, the result is equal to them bit for bit.
    """
    numbers = []
    for column, parameter in zip(zip(*rows, strict=True), parameters, strict=True):
        if min(column) == max(column):
            numbers.append(column[0])
        elif parameter.kind == "choice":
            numbers.append(Counter(column).most_common(1)[0][0])
        else:
            mean = float(np.mean(column))
            numbers.append(mean if parameter.kind == "real" else float(round(mean)))
    return numbers


def fit_profile(profile: Profile, factors: Mapping[int | None, float]) -> list[float]:
    """The numbers of a profile whose factors are closest to these, by least squares, within the bounds."""
    size = len(profile.parameters)
    constant = np.array([profile.factor([0.0] * size, layer) for layer in factors])
    columns = [[profile.factor(unit, layer) for layer in factors] for unit in np.eye(size).tolist()]
    slopes = np.array(columns).T - constant[:, None]
    wanted = np.array(list(factors.values())) - constant
    numbers: NDArray[np.float64] = np.asarray(np.linalg.lstsq(slopes, wanted, rcond=None)[0])
    low, high = (np.array([getattr(p, end) for p in profile.parameters]) for end in ("low", "high"))
    rounded: list[float] = np.clip(numbers.round(12), low, high).tolist()  # so that a factor of 1 stays exactly 1
    return rounded
