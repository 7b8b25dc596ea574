"""The definition of a step, which changes the result of a merge method, tensor by tensor; looked up like methods.

A step works on the change Delta = m - b, where m is a tensor as computed by the method and the previous steps, and b
the base's own. This project's steps are in ``evomerge.steps``, one per file; a package adds its own with an entry point
of the group ``evomerge.merge_steps`` that names a ``Step``. Neither this module nor the steps import torch before a
tensor is computed.
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
"""Values of all of a step's parameters by name."""

Plan: TypeAlias = "Callable[[Facts, Blend, Values, Pass], Pass]"
"""(facts about one tensor, blend, the step's values, the plan so far) -> the plan including the step.

The blend has a base. Equal arguments give equal plans; a tensor that the step does not affect keeps its plan.
"""


@dataclass(frozen=True)
class Step:
    """A step after a merge method.

    Attributes:
        name: its name in recipes and search files.
        plan: its equation.
        parameters: the parameters it takes, each of scope "blend".
        needs: what it needs in addition to weights: nothing or "channels", because a step sees only the base.
        neutral: values at which it changes nothing, bit for bit, whatever its other parameters are; empty if there are
            none. A blend with these values omits the step.
        factor: (values) -> the factor on the change of every tensor, if the step does nothing else; the shares of the
            sources are multiplied by it too. None for other steps.
        in_any_basis: whether, for orthonormal Q and P, it maps a change Q D P to Q times what it makes of D times P: it
            depends only on lengths, singular values and what is rotated with D. In core space it then works on the
            small D.
        keeps_derivatives: whether, given a ``passes.Differentiable``, it returns one that includes the numbers of the
            given one: it multiplies the change, element by element, by factors independent of the change.
        differentiable: the parameters in which the returned pass is differentiable.
        title: its display name.
        reference: where it is published.
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
        """The values of all parameters: those given, and defaults for the others."""
        return {p.name: p.default for p in self.parameters} | dict(given)

    def is_neutral(self, values: Values) -> bool:
        """Whether the step changes nothing at these values of all parameters."""
        return bool(self.neutral) and all(values[name] == value for name, value in self.neutral.items())


def find_step(name: str, place: str) -> Step:
    """The step with this name.

    Raises:
        InputError: there is none, or a package's entry point names something other than a ``Step`` with this name.
    """
    return find_named(GROUP, name, place, Step)


def check_step(given: BlendStep, step: Step, blend: Blend, place: str) -> None:
    """Reject a step in a blend that cannot be computed.

    Raises:
        InputError: naming ``place``: an unknown parameter, an invalid value, or no base.
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
    """What the steps of a blend need in addition to weights."""
    return {need for given in blend.steps for need in find_step(given.name, "blend.steps").needs}
