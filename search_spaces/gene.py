"""One number of a genome, for a parameter of a method or a step, and what a search file may say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.errors import InputError
from evomerge.genome import Parameter
from evomerge.method import MethodParameter, Value

Bounds = Mapping[str, tuple[float, float]]
"""By parameter, the range that a search covers instead of the parameter's own."""


@dataclass(frozen=True)
class Gene:
    """One number, for a parameter of one source, or of all (None). ``differentiable`` is as in ``Parameter``."""

    parameter: MethodParameter
    source: str | None
    low: float
    high: float
    differentiable: bool = False

    @property
    def name(self) -> str:
        return ".".join(part for part in (self.parameter.name, self.source) if part)

    def value(self, number: float) -> Value:
        """The parameter's value for a number."""
        return self.parameter.choices[int(number)] if self.parameter.kind == "choice" else number

    def number(self, value: Value) -> float:
        """The number for a parameter's value."""
        return float(self.parameter.choices.index(value)) if isinstance(value, str) else float(value)

    def nearest(self, value: object) -> float:
        """The number within the bounds closest to a value; the default if it is not a valid value."""
        if isinstance(value, Mapping):
            value = float(np.mean(list(value.values()))) if self.source is None else value[self.source]
        if self.parameter.kind == "choice":
            return self.number(value if value in self.parameter.choices else self.parameter.default)
        if not isinstance(value, int | float):
            value = self.number(self.parameter.default)
        return float(np.clip(value if self.parameter.kind == "real" else round(value), self.low, self.high))

    def described(self, name: str, group: str) -> Parameter:
        default = float(np.clip(self.number(self.parameter.default), self.low, self.high))
        share_of = self.source if self.parameter.share and self.source is not None else ""
        kind, choices = self.parameter.kind, self.parameter.choices
        return Parameter(name, self.low, self.high, default, kind, group, choices, share_of, self.differentiable)


def searched(
    parameters: Sequence[MethodParameter], bounds: Bounds, fixed: Mapping[str, Value]
) -> Iterator[tuple[MethodParameter, float, float]]:
    """The parameters that a search varies, each with its range; giving bounds to one makes it searched."""
    for p in parameters:
        if p.name in fixed or not (p.searched or p.name in bounds):
            continue
        low, high = (0.0, len(p.choices) - 1.0) if p.kind == "choice" else bounds.get(p.name, (p.low, p.high))
        yield p, low, high


def check_ranges(
    owner: str,
    parameters: Sequence[MethodParameter],
    bounds: Bounds,
    fixed: Mapping[str, Value],
    place: str,
    key: Callable[[str, str], str] = lambda field, name: name,
) -> None:
    """Reject ``bounds`` and ``fixed`` that do not fit the parameters of a method or a step.

    Args:
        owner: its name.
        place: where the two keys are in the search file.
        key: (field, parameter) -> the parameter's name there, if it differs from its own name.

    Raises:
        InputError: naming the key.
    """
    known = [p.name for p in parameters]
    for field, names in (("bounds", bounds), ("fixed", fixed)):
        for name in names:
            if name not in known:
                options = ", ".join(sorted(known)) or "none"
                raise InputError(f"{place}.{field}.{name}", f"{owner} has no such setting; it has: {options}")
    if both := sorted(set(bounds) & set(fixed)):
        raise InputError(f"{place}.fixed.{key('fixed', both[0])}", "is given bounds as well", "Keep one of the two.")
    for p in parameters:
        if p.name in bounds:
            _check_bounds(p, bounds[p.name], f"{place}.bounds.{key('bounds', p.name)}")
        if p.name in fixed:
            p.check(fixed[p.name], f"{place}.fixed.{key('fixed', p.name)}")


def _check_bounds(parameter: MethodParameter, bounds: tuple[float, float], place: str) -> None:
    if parameter.kind == "choice":
        options = ", ".join(parameter.choices)
        raise InputError(place, f"is a choice and has no bounds: {options}", "Give one of them under `fixed:`.")
    if bounds[0] >= bounds[1]:
        raise InputError(place, f"the lower bound {bounds[0]} is not below the upper bound {bounds[1]}")
    for bound in bounds:
        parameter.check(bound, place)
