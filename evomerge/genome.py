"""Genomes, the parameters that describe their numbers, and the search space interface."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.recipes.base import Recipe

Genome = NDArray[np.float64]
"""One point of a search space: float64 of shape [number of parameters], in the order of ``SearchSpace.parameters``."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One named, bounded number of a genome.

    A "real" is any float in [low, high], an "int" a whole number in that range, and a "choice" the index of one of
    ``choices`` (low 0, high len - 1). Genomes hold all three as floats. ``group`` groups parameters for display
    ("layers.3"). ``share_of`` names the source of which this is the share, if it is nothing else. ``differentiable``
    means that weights are differentiable in it, so that a smooth loss has a derivative with respect to it.

    For parameters that may be tied, ``places`` lists the parts of the model that it belongs to, from the whole to the
    smallest, and ``what`` is its kind ("weight.maths"): parameters of one kind can be tied in any place they share.
    """

    name: str
    low: float
    high: float
    default: float
    kind: Literal["real", "int", "choice"] = "real"
    group: str = ""
    choices: tuple[str, ...] = ()
    share_of: str = ""
    differentiable: bool = False
    places: tuple[str, ...] = ()
    what: str = ""

    def holds(self, value: float) -> bool:
        """Whether a value is allowed: within the bounds, and whole for "int" and "choice"."""
        return self.low <= value <= self.high and (self.kind == "real" or value == int(value))


def check_genome(genome: Genome, parameters: Sequence[Parameter], place: str) -> None:
    """Reject a genome that is not a point of the space with these parameters.

    Raises:
        InputError: naming ``place``, where the genome came from, and the first parameter with an invalid value.
    """
    hint = "Repair what gave it: float64 [parameters], within the bounds, whole numbers for int and choice."
    if not isinstance(genome, np.ndarray):
        raise InputError(place, f"gave a {type(genome).__name__} for a genome", hint)
    if genome.dtype != np.float64 or genome.shape != (len(parameters),):
        problem = f"gave a genome of {genome.dtype} {list(genome.shape)} for {len(parameters)} parameters"
        raise InputError(place, problem, hint)
    for parameter, value in zip(parameters, genome.tolist(), strict=True):
        if not parameter.holds(value):
            kind = f"{parameter.kind} in [{parameter.low:g}, {parameter.high:g}]"
            raise InputError(place, f"gave {value:g} for {parameter.name}, which is {kind}", hint)


@dataclass(frozen=True, slots=True)
class Baseline:
    """A recipe that every search scores first and compares everything later with.

    ``genome`` is the point of the space that decodes to the same model, or None if the space contains no such point.
    ``kind`` decides which comparisons it takes part in: confirmed candidates are compared with sources and the average.
    """

    label: str
    kind: Literal["source", "average", "default", "fit"]
    recipe: Recipe
    genome: Genome | None


class SearchSpace(Protocol):
    """Named, bounded parameters and the function that decodes them into a recipe.

    ``decode`` is total and pure: every genome inside the bounds gives a valid recipe, and equal genomes give equal
    recipes, in every process. Several genomes may decode to the same recipe.
    """

    @property
    def parameters(self) -> Sequence[Parameter]: ...

    @property
    def layer_buffers(self) -> int:
        """The largest number of distinct layers, by content, in any recipe of this space."""
        ...

    @property
    def hops(self) -> int:
        """The largest number of layers of any model of this space."""
        ...

    def decode(self, genome: Genome) -> Recipe: ...

    def baselines(self) -> Iterable[Baseline]: ...

    def genome_of(self, recipe: Recipe) -> Genome | None:
        """The point of this space closest to a recipe over the same sources; None if there is nothing comparable.

        For a recipe of this space, the point decodes to the same recipe, up to rounding.
        """
        ...


@runtime_checkable
class Refitting(Protocol):
    """A search space with something fitted once for all candidates that can be fitted again to a single candidate."""

    @property
    def refits(self) -> int:
        """How many of the best candidates to fit again at the end of a search."""
        ...

    def refitted(self, recipe: Recipe) -> Recipe | None:
        """The recipe with its fit repeated for this candidate; None if nothing is fitted, or nothing would change."""
        ...
