"""The parameters of steps after a merge method as numbers of a genome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from evomerge.errors import InputError
from evomerge.genome import Parameter
from evomerge.recipes.stack import BlendStep, ChoiceName
from evomerge.step import Step, find_step
from search_spaces.base import SpaceContext
from search_spaces.gene import Gene, check_ranges, searched


class StepSettings(BaseModel):
    """The settings of one step after the method in a search file.

    Args:
        bounds: a parameter's range, in place of the step's own: ``strength: [0, 0.5]``.
        fixed: a parameter that is not searched: ``strength: 0.2``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bounds: dict[str, tuple[FiniteFloat, FiniteFloat]] = Field(default_factory=dict)
    fixed: dict[str, FiniteFloat | ChoiceName] = Field(default_factory=dict)


class StepGenes:
    """What a search varies in one step.

    Args:
        has_derivatives: whether the method and the other steps let a loss have derivatives.
    """

    def __init__(self, step: Step, settings: StepSettings, *, has_derivatives: bool = False) -> None:
        self._step = step
        self._fixed = dict(settings.fixed)
        ranges = searched(step.parameters, settings.bounds, settings.fixed)
        self._genes = [
            Gene(p, None, low, high, has_derivatives and p.name in step.differentiable) for p, low, high in ranges
        ]

    def __len__(self) -> int:
        return len(self._genes)

    def parameters(self, prefix: str, group: str) -> list[Parameter]:
        """The parameters of one blend, named after ``prefix`` and the step."""
        return [gene.described(f"{prefix}.{self._step.name}.{gene.name}", group) for gene in self._genes]

    def steps(self, numbers: Sequence[float] = ()) -> tuple[BlendStep, ...]:
        """The step for these numbers, or none if it changes nothing; without numbers, the step at its defaults."""
        given = {gene.parameter.name: gene.value(number) for gene, number in zip(self._genes, numbers, strict=False)}
        values = self._step.values(self._fixed | given)
        return () if self._step.is_neutral(values) else (BlendStep(name=self._step.name, parameters=values),)

    def nearest(self, steps: Sequence[BlendStep]) -> list[float]:
        """The numbers closest to the settings of this step among the given ones; if it is absent, those that change
        nothing, or else the defaults.
        """
        given = next((step for step in steps if step.name == self._step.name), None)
        if given is None and (neutral := self.neutral()) is not None:
            return neutral
        values = self._step.values({} if given is None else given.parameters)
        return [gene.nearest(values[gene.parameter.name]) for gene in self._genes]

    def neutral(self) -> list[float] | None:
        """Numbers at which the step changes nothing; None if there are none within the bounds."""
        values = self._step.values(self._fixed | {n: v for n, v in self._step.neutral.items() if n not in self._fixed})
        numbers = [gene.number(values[gene.parameter.name]) for gene in self._genes]
        inside = all(gene.low <= number <= gene.high for gene, number in zip(self._genes, numbers, strict=True))
        return numbers if inside and self._step.is_neutral(values) else None


def check_steps(steps: Mapping[str, StepSettings], context: SpaceContext) -> None:
    """Reject steps of a search file that cannot be computed.

    Raises:
        InputError: naming the key: an unknown step or parameter, a wrong range, no base, or no calibration texts.
    """
    for name, settings in steps.items():
        place = f"space.steps.{name}"
        step = find_step(name, place)
        if context.base is None:
            raise InputError("base", f"the step {name} changes what is added to a base", "Name it: `base: NAME`.")
        check_ranges(name, step.parameters, settings.bounds, settings.fixed, place)
        context.check_needs(step, place)
