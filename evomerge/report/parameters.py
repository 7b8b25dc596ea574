"""The parameters of a search space for people: values by name, and a few columns of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.genome import Genome, Parameter

MAX_COLUMNS = 6
"""The maximum number of parameters in a table of candidates; more would leave no room for the scores."""


@dataclass(frozen=True)
class ParameterColumn:
    """A parameter, or the mean of corresponding ones in all layer groups; ``places`` are positions in the genome."""

    title: str
    places: tuple[int, ...]
    parameters: tuple[Parameter, ...]

    def text(self, genome: Genome | None) -> str:
        """Its value; empty without a genome."""
        if genome is None:
            return ""
        if len(self.places) > 1:
            return f"{float(np.mean(genome[list(self.places)])):.3f}"
        value = _value(self.parameters[0], float(genome[self.places[0]]))
        return f"{value:.3f}" if isinstance(value, float) else str(value)


def columns_of(parameters: Sequence[Parameter]) -> list[ParameterColumn]:
    """The parameters, or if there are many their means over layer groups; empty if those are too many as well."""
    if len(parameters) <= MAX_COLUMNS:
        return [ParameterColumn(p.name, (place,), (p,)) for place, p in enumerate(parameters)]
    columns = [
        ParameterColumn(title, tuple(places), tuple(parameters[place] for place in places))
        for title, places in alike(parameters).items()
    ]
    return columns if len(columns) <= MAX_COLUMNS else []


def alike(parameters: Sequence[Parameter]) -> dict[str, list[int]]:
    """The positions of parameters that can be averaged over layer groups, by the name of the mean.

    Such parameters have the same name apart from the group, and the same range. Categorical parameters are not
    averaged, nor are parameters without counterparts.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, parameter in enumerate(parameters):
        groups.setdefault(_likeness(parameter), []).append(place)
    return {key[0] if len(places) > 1 else parameters[places[0]].name: places for key, places in groups.items()}


def _likeness(parameter: Parameter) -> tuple[str, ...]:
    name, group = parameter.name, parameter.group
    rest = name.removeprefix(f"{group}.") if group else name
    if parameter.kind == "choice" and len(parameter.choices) > 2:
        return (name,)
    return (f"mean {rest}", str(parameter.kind), str(parameter.low), str(parameter.high))


def parameters_of(genome: Genome | None, parameters: Sequence[Parameter]) -> Iterator[tuple[str, float | int | str]]:
    """The parameters of a genome as names and values, with choices by name; empty without a genome."""
    if genome is not None:
        for parameter, number in zip(parameters, genome.tolist(), strict=False):
            yield parameter.name, _value(parameter, number)


def _value(parameter: Parameter, number: float) -> float | int | str:
    if parameter.kind == "choice":
        return str(parameter.choices[int(number)])
    return int(number) if parameter.kind == "int" else number


def parameter_text(value: float | int | str) -> str:
    """The value of a parameter for people."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
