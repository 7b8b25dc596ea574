"""What a merge method is: one object, which knows all that anybody asks of it, and how methods are looked up by name.

Methods of this project are a file each in ``evomerge.methods``; a package adds its own by an entry point of the group
``evomerge.merge_methods`` that names a ``Method``. Nothing here imports torch, nor do this project's methods before a
tensor is made, so that a wrong name or number is refused at once.
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
"""(facts about one tensor, blend) -> how it is made. Equal arguments give equal plans."""

FRACTION = (0.0, 1.0)
"""Limits of a parameter that is a share of a whole."""

AUTO = "auto"
"""In a search file, in place of a method's name: the one that is taken where nobody knows better."""

AUTO_METHOD = "task_arithmetic"
"""Which that is: docs/methods.md says why. A search records this name, so that another choice changes no old search."""

Value = float | str
"""Of a parameter: a number, or the name of a choice."""

Point = Mapping[str, Value | Mapping[str, Value]]
"""Values of parameters by name. One value for a parameter of scope "source" is that of every source."""

Shares = Callable[[Blend], Mapping[str, float]]
"""(blend) -> how much it takes of each of its sources (of the changes to the base, where there is one)."""

Kept = Callable[[int, int, int], int]
"""(rows, columns, sources) -> bytes of a method's evidence of one matrix [out, in] of a layer."""

Need = Literal["calibration", "channels", "merged_inputs", "fit"]
"""What a method or a step needs beside weights. Calibration texts tell: "calibration" is what layers of every source
that is mixed are given as input, "channels" how large each channel of that is in the base, for which this alone is run,
and "merged_inputs" what layers of every mixed source are given behind the merged layers before, anew for each
candidate. "fit" is how much of each source right answers want (``merging.fitting.coefficients``)."""


@dataclass(frozen=True, slots=True)
class MethodParameter:
    """A number or a choice that a merge method takes, with the range that a search walks by default.

    Attributes:
        name: in a blend's ``parameters``.
        scope: "source" means one value for every source of the blend (base excepted), "blend" one value for all; the
            latter may be left out of a blend, and then is the default.
        low, high: what a search walks by default. Of a choice neither counts.
        default: what is taken where nobody says anything.
        searched: whether a search walks it without having been given bounds.
        kind: "real", "int" for whole numbers (a blend holds them as floats), "choice" for one of ``choices``.
        choices: names, which begin with a letter.
        limits: the least and the largest value that it may have at all; a blend outside them is refused.
        share: whether it says how much of a source is taken.
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
        """Refuse a value that the parameter cannot have.

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
        name: in recipes and search files.
        plan: its equation.
        parameters: what it takes.
        needs_base: whether it cannot do without a base.
        min_sources, max_sources: how many it mixes, the base not counted; ``max_sources`` is None for any number.
        switches: its yes/no settings with their defaults (``normalize``); a search does not walk them.
        needs: what it needs beside weights.
        kept: how much evidence it keeps of a matrix of a layer, at most; None where that is next to nothing.
        whole_models: its facts are of whole models (``Facts.model_threshold``), not of one tensor at a time.
        shares: how much a blend takes of each source, for pictures. The values of the parameter that has ``share``
            where None; all alike where there is no such parameter.
        alone: (sources, one of them, or None for the base) -> the point where the merge is that source as it is. None
            where there is no such point, as ``uniform``.
        uniform: (sources) -> the point where the merge is the plain average of all sources.
        arithmetic: (sources, weight) -> the point where the merge is the base and that weight times each task vector,
            where no switch has it divide by weights. None where there is no such point.
        differentiable: the parameters that its passes (each a ``passes.Differentiable``) follow without jumps, the
            masks being as they are; None where a loss has no derivative by what its passes are made with.
        mergekit: what mergekit lets one say of it; None where mergekit has no such method.
        title: its name as people write it.
        reference: where it is described.
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


# ---- looking up ------------------------------------------------------------------------------------------------------


def find_method(name: str, place: str) -> Method:
    """The method of this name.

    Raises:
        InputError: there is none, or a package's entry point names something else than a ``Method`` of this name.
    """
    return find_named(GROUP, name, place, Method)


def named_method(value: object) -> object:
    """What a search file says of the method, with ``auto`` as the method that it stands for."""
    return AUTO_METHOD if value == AUTO else value


def own_methods() -> dict[str, Method]:
    """This project's methods, by name."""
    return {name: find_method(name, name) for name in OWN[GROUP]}


# ---- what is asked of blends -----------------------------------------------------------------------------------------


def check_blend(blend: Blend, method: Method, place: str) -> None:
    """Refuse a blend that its method cannot compute: wrong number of sources, missing base, unknown or missing values.

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
    """What may need something beside weights: a method, or a step after it."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[Need, ...]: ...


def needs_texts(needs: Iterable[Need]) -> bool:
    """Whether calibration texts tell any of what is needed."""
    return any(need != "fit" for need in needs)


def check_needs(part: Needing, place: str, *, has_texts: bool, has_fit: bool) -> None:
    """Refuse a method or a step that needs texts where there are none, or items to fit to.

    Raises:
        InputError: naming ``place``.
    """
    if "fit" in part.needs and not has_fit:
        problem = f"{part.name} is fitted to right answers, which there are none of"
        raise InputError(place, problem, "Name items that nothing else is scored on: `fit:`.")
    if needs_texts(part.needs) and not has_texts:
        problem = f"{part.name} needs calibration, which there is none of"
        raise InputError(place, problem, "Name some texts: `calibration:`.")


def plan_of(method: Method, facts: Facts, blend: Blend) -> Pass:
    """How a method makes a tensor by a blend that ``check_blend`` let through; what that leaves out has its default.

    Raises:
        TypeError: the method gives something else than a pass.
        ValueError: the pass reads what the blend has not.
    """
    defaults = dict(method.switches) | {p.name: p.default for p in method.parameters if p.scope == "blend"}
    if not defaults.keys() <= blend.parameters.keys():
        blend = blend.model_copy(update={"parameters": defaults | blend.parameters})
    made = method.plan(facts, blend)
    inputs = getattr(made, "inputs", None)
    if inputs is None:
        kind = type(made).__name__
        raise TypeError(f"{method.name} planned a {kind}, not a pass such as Combine, Elementwise or Whole")
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
    """How much the method of a blend takes of each of its sources; see ``Shares``.

    Of a method that is not installed here, as where a page shows the search of somebody else, all count alike.
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
    """The names of the parameters that say how much of a source is taken; none of a method that is not installed."""
    try:
        return [p.name for p in find_method(method, "blend").parameters if p.share]
    except InputError:
        return []


def _alike(blend: Blend) -> dict[str, float]:
    return dict.fromkeys(blend.sources, 1.0 / len(blend.sources))


def is_copy(blend: Blend) -> bool:
    """Whether a blend is its one source as it is."""
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
    """The value of a parameter at a point, of ``source`` where each has its own. KeyError where it has none."""
    value = point[name]
    if isinstance(value, Mapping):
        if source is None:
            raise KeyError(f"{name} has a value for each source; say which")
        return value[source]
    return value
