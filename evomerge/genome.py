"""Genomes, the parameters that name their numbers, and the contract of a search space."""

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

    A "real" is any float in [low, high]; an "int" a whole number in it; a "choice" the position of one of ``choices``
    (low 0, high len - 1). Genomes carry all three as floats. ``group`` gathers parameters for display ("layers.3").
    ``share_of`` is the source that it says the share of, where it is nothing but that. ``differentiable`` says that
    weights follow it without jumps, so that a smooth loss has a derivative by it.

    Where numbers may be tied, ``places`` are those of the model that it is of, from the whole to its own, and ``what``
    is its kind ("weight.maths"): numbers of one kind can be one in any place that they share.
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
        """Whether it can have this value: within the bounds, and whole for "int" and "choice"."""
        return self.low <= value <= self.high and (self.kind == "real" or value == int(value))


def check_genome(genome: Genome, parameters: Sequence[Parameter], place: str) -> None:
    """Refuse a genome that is no point of the space of these parameters.

    Raises:
        InputError: naming ``place``, which is what gave it, and the first parameter that has no such value.
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
    """A recipe that every search scores first and shows everything later against.

    ``genome`` is the point of the space that decodes to the same model, or None where the space holds no such point.
    ``kind`` says which comparisons it takes part in: confirmed candidates are compared with sources and the average.
    """

    label: str
    kind: Literal["source", "average", "default", "fit"]
    recipe: Recipe
    genome: Genome | None


class SearchSpace(Protocol):
    """Named, bounded parameters and the function that decodes them into a recipe.

    ``decode`` is total and pure: every genome inside the bounds gives a valid recipe, and the same genome the same
    recipe, in every process. It may map many genomes to one recipe.
    """

    @property
    def parameters(self) -> Sequence[Parameter]: ...

    @property
    def layer_buffers(self) -> int:
        """The most different layers, by content, that one recipe of this space is made of."""
        ...

    @property
    def hops(self) -> int:
        """The most layers that a model of this space has."""
        ...

    def decode(self, genome: Genome) -> Recipe: ...

    def baselines(self) -> Iterable[Baseline]: ...

    def genome_of(self, recipe: Recipe) -> Genome | None:
        """The point of this space nearest to a recipe over the same sources; None where none says anything like it.

        Of a recipe that is of this space it is a point that decodes to the same, up to rounding.
        """
        ...


@runtime_checkable
class Refitting(Protocol):
    """A search space of models of which something is fitted once for all candidates, and may be fitted to each."""

    @property
    def refits(self) -> int:
        """How many of the best candidates are to be fitted anew at the end of a search."""
        ...

    def refitted(self, recipe: Recipe) -> Recipe | None:
        """The recipe with what is fitted of it fitted to itself; None where that is nothing, or nothing new."""
        ...
