"""What a merge method needs and takes, as data: so that blends are checked and search spaces made without a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from evomerge.errors import InputError
from evomerge.recipe import Blend


@dataclass(frozen=True, slots=True)
class MethodParameter:
    """A number that a merge method takes, with the range that a search walks by default.

    Scope "source" means one value for every source of the blend (base excepted), "blend" one value for all; the latter
    may be left out of a blend, and then is the default. A search walks it if it is ``searched`` or has bounds given.
    """

    name: str
    scope: Literal["source", "blend"]
    low: float
    high: float
    default: float
    searched: bool = True


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """What a merge method needs and takes, as data, so that a search space can be made for it.

    ``switches`` are the method's yes/no settings with their defaults (``normalize``); a search does not walk them.
    ``max_sources`` is None where any number will do. Sources are counted without the base.
    """

    name: str
    parameters: tuple[MethodParameter, ...]
    needs_base: bool
    min_sources: int = 1
    max_sources: int | None = None
    switches: Mapping[str, bool] = field(default_factory=dict)


def check_blend(blend: Blend, spec: MethodSpec, place: str) -> None:
    """Refuse a blend that its method cannot compute: wrong number of sources, missing base, unknown or missing numbers.

    Raises:
        InputError: naming ``place`` and what to change.
    """
    count, most = len(blend.sources), spec.max_sources
    if count < spec.min_sources or (most is not None and count > most):
        wanted = f"{spec.min_sources}" if spec.min_sources == most else f"{spec.min_sources} or more"
        raise InputError(place, f"{spec.name} mixes {wanted} sources, not {count} ({', '.join(blend.sources)})")
    if spec.needs_base and blend.base is None:
        raise InputError(place, f"{spec.name} needs a base", "Name the base model with `base:`.")
    known = {p.name: p for p in spec.parameters}
    for name, value in blend.parameters.items():
        if name not in known and name not in spec.switches:
            options = ", ".join([*known, *spec.switches]) or "none"
            raise InputError(f"{place}.{name}", f"is not a parameter of {spec.name}; it takes: {options}")
        if isinstance(value, dict) and set(value) != set(blend.sources):
            raise InputError(f"{place}.{name}", f"must have one value for each of {', '.join(blend.sources)}")
    for p in spec.parameters:
        if p.scope == "source" and p.name not in blend.parameters:
            raise InputError(place, f"{spec.name} needs a value for {p.name}")


def default_parameters(spec: MethodSpec, sources: Sequence[str]) -> dict[str, bool | float | dict[str, float]]:
    """The method's own defaults, in the form of ``Blend.parameters``."""
    values: dict[str, bool | float | dict[str, float]] = dict(spec.switches)
    for p in spec.parameters:
        values[p.name] = dict.fromkeys(sources, p.default) if p.scope == "source" else p.default
    return values
