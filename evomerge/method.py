"""The definition of a merge method, one object with everything that the program needs to know, and lookup by name.

This project's methods are in ``evomerge.methods``, one per file; a package adds its own with an entry point of the
group ``evomerge.merge_methods`` that names a ``Method``. Neither this module nor the methods import torch before a
tensor is computed, so a wrong name or number is rejected immediately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from evomerge.errors import InputError
from evomerge.plugins import OWN, find_named
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.mergekit.grammar import Grammar
    from evomerge.merging.arithmetic.passes import Pass
    from evomerge.merging.measured.facts import Facts

GROUP = "evomerge.merge_methods"

Plan: TypeAlias = "Callable[[Facts, Blend], Pass]"
"""(facts about one tensor, blend) -> how the tensor is computed. Equal arguments give equal plans."""

FRACTION = (0.0, 1.0)
"""Limits of a parameter that is a fraction."""

AUTO = "auto"
"""In a search file, in place of a method's name: the recommended method."""

AUTO_METHOD = "task_arithmetic"
"""The method that ``auto`` stands for; docs/methods.md explains why. A search records this name, so changing the
recommendation later does not change old searches."""

Value = float | str
"""A parameter's value: a number, or the name of a choice."""

Point = Mapping[str, Value | Mapping[str, Value]]
"""Parameter values by name. A single value for a parameter of scope "source" applies to every source."""

Shares = Callable[[Blend], Mapping[str, float]]
"""(blend) -> how much it takes of each source (of its change to the base, if there is a base)."""

Kept = Callable[[int, int, int], int]
"""(rows, columns, sources) -> the bytes of evidence that a method keeps for one matrix [out, in] of a layer."""

Need = Literal["calibration", "channels", "merged_inputs", "fit"]
"""What a method or step needs in addition to weights. The first three require calibration texts: "calibration" is the
layer inputs of every mixed source; "channels" is how large each input channel is in the base, so only the base is run;
"merged_inputs" is the layer inputs of every mixed source behind the preceding merged layers, computed again for each
candidate. "fit" is how much of each source fits right answers best (``merging.fitting.coefficients``)."""


@dataclass(frozen=True, slots=True)
class MethodParameter:
    """A number or a choice that a merge method takes, with the range that a search covers by default.

    Attributes:
        name: its key in a blend's ``parameters``.
        scope: "source" means one value for every source of the blend (base excepted), "blend" one value for all; the
            latter may be omitted from a blend, and then has the default.
        low, high: the range that a search covers by default; unused for a choice.
        default: the value if none is given.
        searched: whether a search varies it without having been given bounds.
        kind: "real", "int" for whole numbers (a blend holds them as floats), "choice" for one of ``choices``.
        choices: names, which begin with a letter.
        limits: the smallest and the largest valid value; a blend outside them is rejected.
        share: whether the value says how much of a source is taken.
    """

    name: str
    scope: Literal["source", "blend"]
    low: float = 0.0
    high: float = 1.0
    default: Value = 0.0
    searched: bool = True
    kind: Literal["real", "int", "choice"] = "real"
    choices: tuple[str, ...] = ()
    limits: tuple[float, float] | None = None
    share: bool = False

    def __post_init__(self) -> None:
        if (self.kind == "choice") != bool(self.choices):
            raise ValueError(f"{self.name}: a choice, and nothing else, has choices")
        if isinstance(self.default, str) != (self.kind == "choice"):
            raise ValueError(f"{self.name}: the default {self.default!r} is not of the kind {self.kind!r}")
        numbers = () if isinstance(self.default, str) else (self.low, self.high, self.default)
        if self.kind == "int" and any(number % 1 for number in numbers):
            raise ValueError(f"{self.name}: range and default of an int are whole numbers")

    def check(self, value: object, place: str) -> None:
        """Reject a value that the parameter cannot have.

        Raises:
            InputError: naming ``place``.
        """
        if self.kind == "choice":
            if value not in self.choices:
                raise InputError(place, f"is {value!r}; it must be one of: {', '.join(self.choices)}")
            return
        if not isinstance(value, int | float):
            raise InputError(place, f"is {value!r}; it must be a number")
        if self.kind == "int" and value % 1:
            raise InputError(place, f"is {value:g}; it must be a whole number")
        if self.limits is not None and not self.limits[0] <= value <= self.limits[1]:
            low, high = self.limits
            raise InputError(place, f"is {value:g}; it must be from {low:g} to {high:g}")


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: its name in recipes and search files.
        plan: its equation.
        parameters: the parameters it takes.
        needs_base: whether it requires a base.
        min_sources, max_sources: how many sources it mixes, not counting the base; ``max_sources`` is None for any
            number.
        switches: its yes/no settings with their defaults (``normalize``); a search does not vary them.
        needs: what it needs in addition to weights.
        kept: an upper bound on the evidence it keeps for a matrix of a layer; None if that is negligible.
        whole_models: its facts concern whole models (``Facts.model_threshold``), not one tensor at a time.
        shares: how much a blend takes of each source, for figures. If None, the values of the parameter with ``share``;
            equal for all sources if there is no such parameter.
        alone: (sources, one of them, or None for the base) -> the point at which the merge is that source unchanged.
            None if there is no such point; the same holds for ``uniform``.
        uniform: (sources) -> the point at which the merge is the plain average of all sources.
        arithmetic: (sources, weight) -> the point at which the merge is the base plus that weight times each task
            vector, unless a switch makes it divide by weights. None if there is no such point.
        differentiable: the parameters in which its passes (each a ``passes.Differentiable``) are differentiable for
            fixed masks; None if a loss has no derivative with respect to the inputs of its passes.
        mergekit: the settings that mergekit accepts for it; None if mergekit has no such method.
        title: its display name.
        reference: where it is published.
    """

    name: str
    plan: Plan
    parameters: tuple[MethodParameter, ...] = ()
    needs_base: bool = False
    min_sources: int = 1
    max_sources: int | None = None
    switches: Mapping[str, bool] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    kept: Kept | None = None
    whole_models: bool = False
    shares: Shares | None = None
    alone: Callable[[Sequence[str], str | None], Point] | None = None
    uniform: Callable[[Sequence[str]], Point] | None = None
    arithmetic: Callable[[Sequence[str], float], Point] | None = None
    differentiable: tuple[str, ...] | None = None
    mergekit: Grammar | None = None
    title: str = ""
    reference: str = ""


# ---- lookup ----------------------------------------------------------------------------------------------------------


def find_method(name: str, place: str) -> Method:
    """The method with this name.

    Raises:
        InputError: there is none, or a package's entry point names something other than a ``Method`` with this name.
    """
    return find_named(GROUP, name, place, Method)


def named_method(value: object) -> object:
    """The method setting of a search file, with ``auto`` replaced by the method that it stands for."""
    return AUTO_METHOD if value == AUTO else value


def own_methods() -> dict[str, Method]:
    """This project's methods, by name."""
    return {name: find_method(name, name) for name in OWN[GROUP]}


# ---- blends ----------------------------------------------------------------------------------------------------------


def check_blend(blend: Blend, method: Method, place: str) -> None:
    """Reject a blend that its method cannot compute: wrong number of sources, missing base, unknown or missing values.

    Raises:
        InputError: naming ``place`` and what to change.
    """
    count, most = len(blend.sources), method.max_sources
    if count < method.min_sources or (most is not None and count > most):
        wanted = f"{method.min_sources}" if method.min_sources == most else f"{method.min_sources} or more"
        raise InputError(place, f"{method.name} mixes {wanted} sources, not {count} ({', '.join(blend.sources)})")
    if method.needs_base and blend.base is None:
        raise InputError(place, f"{method.name} needs a base", "Name the base model with `base:`.")
    known = {p.name: p for p in method.parameters}
    for name, value in blend.parameters.items():
        if name not in known and name not in method.switches:
            options = ", ".join([*known, *method.switches]) or "none"
            raise InputError(f"{place}.{name}", f"is not a parameter of {method.name}; it takes: {options}")
        if isinstance(value, dict) and set(value) != set(blend.sources):
            raise InputError(f"{place}.{name}", f"must have one value for each of {', '.join(blend.sources)}")
        if name in known:
            for one in value.values() if isinstance(value, dict) else (value,):
                known[name].check(one, f"{place}.{name}")
        elif not isinstance(value, bool | float):
            raise InputError(f"{place}.{name}", "must be true or false")
    for p in method.parameters:
        if p.scope == "source" and p.name not in blend.parameters:
            raise InputError(place, f"{method.name} needs a value for {p.name}")


class Needing(Protocol):
    """Something with ``needs``: a method, or a step after it."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[Need, ...]: ...


def needs_texts(needs: Iterable[Need]) -> bool:
    """Whether any of these needs requires calibration texts."""
    return any(need != "fit" for need in needs)


def check_needs(part: Needing, place: str, *, has_texts: bool, has_fit: bool) -> None:
    """Reject a method or step that needs calibration texts or items to fit to if there are none.

    Raises:
        InputError: naming ``place``.
    """
    if "fit" in part.needs and not has_fit:
        problem = f"{part.name} is fitted to right answers, and there are none"
        raise InputError(place, problem, "Name items that nothing else is scored on: `fit:`.")
    if needs_texts(part.needs) and not has_texts:
        problem = f"{part.name} needs calibration texts, and there are none"
        raise InputError(place, problem, "Name some texts: `calibration:`.")


def plan_of(method: Method, facts: Facts, blend: Blend) -> Pass:
    """The method's plan for a tensor, given a blend that ``check_blend`` accepted; omitted values have their defaults.

    Raises:
        TypeError: the method returns something other than a pass.
        ValueError: the pass reads tensors of models that are not in the blend.
    """
    defaults = dict(method.switches) | {p.name: p.default for p in method.parameters if p.scope == "blend"}
    if not defaults.keys() <= blend.parameters.keys():
        blend = blend.model_copy(update={"parameters": defaults | blend.parameters})
    made = method.plan(facts, blend)
    inputs = getattr(made, "inputs", None)
    if inputs is None:
        kind = type(made).__name__
        raise TypeError(f"{method.name} planned a {kind}, not a pass such as Combine, RowFunction or TensorFunction")
    if None in inputs:
        raise ValueError(f"{method.name} reads a base, and there is none: let it say needs_base=True")
    if unknown := [name for name in inputs if name not in facts.site.refs]:
        raise ValueError(f"{method.name} reads {unknown[0]!r}; the blend has {', '.join(facts.site.refs)}")
    return made


def default_parameters(method: Method, sources: Sequence[str]) -> dict[str, bool | Value | dict[str, Value]]:
    """The method's own defaults, in the form of ``Blend.parameters``."""
    values: dict[str, bool | Value | dict[str, Value]] = dict(method.switches)
    for p in method.parameters:
        values[p.name] = dict.fromkeys(sources, p.default) if p.scope == "source" else p.default
    return values


def method_shares(blend: Blend) -> dict[str, float]:
    """How much the method of a blend takes of each source; see ``Shares``.

    If the method is not installed, for example when showing somebody else's search, all sources count equally.
    """
    try:
        method = find_method(blend.method, "blend")
    except InputError:
        return _alike(blend)
    if method.shares is not None:
        return dict(method.shares(blend))
    named = next((p.name for p in method.parameters if p.share and p.scope == "source"), None)
    if named is None or named not in blend.parameters:
        return _alike(blend)
    return {source: blend.value(named, source) for source in blend.sources}


def share_parameters(method: str) -> list[str]:
    """The names of the parameters that say how much of a source is taken; empty if the method is not installed."""
    try:
        return [p.name for p in find_method(method, "blend").parameters if p.share]
    except InputError:
        return []


def _alike(blend: Blend) -> dict[str, float]:
    return dict.fromkeys(blend.sources, 1.0 / len(blend.sources))


def is_copy(blend: Blend) -> bool:
    """Whether a blend is a plain copy of its only source."""
    if len(blend.sources) != 1 or blend.base is not None:
        return False
    try:
        method = find_method(blend.method, "blend")
    except InputError:
        return False
    if method.alone is None:
        return False
    (source,) = blend.sources
    point = method.alone(blend.sources, source)
    return all(
        name in blend.parameters and blend.value(name, source) == value_at(point, name, source) for name in point
    )


def value_at(point: Point, name: str, source: str | None) -> Value:
    """A parameter's value at a point, for ``source`` if each source has its own. KeyError if it has none."""
    value = point[name]
    if isinstance(value, Mapping):
        if source is None:
            raise KeyError(f"{name} has a value for each source; say which")
        return value[source]
    return value
