"""What a step is: it changes what a merge method made, tensor by tensor, and is looked up by name as methods are.

A step works on the change Delta = m - b that a method made to the base: m is what the method, and the steps before,
give for a tensor, and b the base's own. Steps of this project are a file each in ``evomerge.steps``; a package adds its
own by an entry point of the group ``evomerge.merge_steps`` that names a ``Step``. Nothing here imports torch, nor do
this project's steps before a tensor is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from evomerge.errors import InputError
from evomerge.method import MethodParameter, Need, Value
from evomerge.plugins import find_named
from evomerge.recipes.stack import Blend, BlendStep

if TYPE_CHECKING:
    from evomerge.merging.arithmetic.passes import Pass
    from evomerge.merging.measured.facts import Facts

GROUP = "evomerge.merge_steps"

Values = Mapping[str, Value]
"""Values of a step's parameters by name, every one of them."""

Plan: TypeAlias = "Callable[[Facts, Blend, Values, Pass], Pass]"
"""(facts about one tensor, blend, the step's values, how the tensor is made so far) -> how it is made after the step.

The blend has a base. Equal arguments give equal plans; a tensor that the step leaves alone keeps its plan.
"""


@dataclass(frozen=True)
class Step:
    """A step after a merge method.

    Attributes:
        name: in recipes and search files.
        plan: its equation.
        parameters: what it takes, each of scope "blend".
        needs: what it needs beside weights: nothing but "channels", for a step sees the base alone.
        neutral: values at which it changes nothing, to the last bit, whatever its other parameters are; empty where
            there are none. A blend at these does without the step.
        factor: (values) -> by what it multiplies the change of every tensor, where it does nothing else: how much of
            each source is taken then counts as much more. None of other steps.
        in_any_basis: whether it makes of a change Q D P, for orthonormal Q and P, what it makes of D between these two:
            it goes by lengths, singular values and what is turned with D alone. In core space it then works on the
            small D.
        keeps_derivatives: whether it gives a ``passes.Differentiable`` for one, with the numbers of this among its own:
            it multiplies the change, element by element, by what the change has no part in.
        differentiable: the parameters that the pass which it gives follows without jumps.
        title: its name as people write it.
        reference: where it is described.
    """

    name: str
    plan: Plan
    parameters: tuple[MethodParameter, ...] = ()
    needs: tuple[Need, ...] = ()
    neutral: Mapping[str, Value] = field(default_factory=dict)
    factor: Callable[[Values], float] | None = None
    in_any_basis: bool = False
    keeps_derivatives: bool = False
    differentiable: tuple[str, ...] = ()
    title: str = ""
    reference: str = ""

    def __post_init__(self) -> None:
        if apart := [p.name for p in self.parameters if p.scope != "blend"]:
            raise ValueError(f"{self.name}: {apart[0]} must be of scope 'blend': a step sees one change, not sources")
        if {"calibration", "fit"} & {*self.needs}:
            raise ValueError(f"{self.name}: a step may need nothing of the sources")
        if unknown := set(self.neutral) - {p.name for p in self.parameters}:
            raise ValueError(f"{self.name}: {min(unknown)} is neutral and no parameter")

    def values(self, given: Values) -> dict[str, Value]:
        """The values of all parameters: those given, and the defaults of the others."""
        return {p.name: p.default for p in self.parameters} | dict(given)

    def is_neutral(self, values: Values) -> bool:
        """Whether it changes nothing at these values of all parameters."""
        return bool(self.neutral) and all(values[name] == value for name, value in self.neutral.items())


def find_step(name: str, place: str) -> Step:
    """The step of this name.

    Raises:
        InputError: there is none, or a package's entry point names something else than a ``Step`` of this name.
    """
    return find_named(GROUP, name, place, Step)


def check_step(given: BlendStep, step: Step, blend: Blend, place: str) -> None:
    """Refuse what a blend says of a step that cannot be done.

    Raises:
        InputError: naming ``place``: an unknown parameter, a value that it cannot have, or no base.
    """
    if blend.base is None:
        problem = f"{step.name} changes what is added to a base, and this blend has none"
        raise InputError(place, problem, "Name the base model with `base:`.")
    known = {p.name: p for p in step.parameters}
    for name, value in given.parameters.items():
        if name not in known:
            options = ", ".join(known) or "none"
            raise InputError(f"{place}.{name}", f"is not a parameter of {step.name}; it takes: {options}")
        known[name].check(value, f"{place}.{name}")


def needs_of_steps(blend: Blend) -> set[Need]:
    """What the steps of a blend need beside weights."""
    return {need for given in blend.steps for need in find_step(given.name, "blend.steps").needs}
