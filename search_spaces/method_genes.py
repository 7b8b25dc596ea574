"""The parameters of a merge method, and of the steps after it, as numbers of a genome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from evomerge.errors import InputError
from evomerge.genome import Parameter
from evomerge.method import Method, Point, Value, default_parameters, find_method, value_at
from evomerge.recipes.stack import Basis, Blend, BlendStep
from evomerge.step import find_step
from search_spaces.base import SpaceContext
from search_spaces.gene import Bounds, Gene, searched
from search_spaces.profiles import Wave, waves_of
from search_spaces.step_genes import StepGenes, StepSettings


class MethodGenes:
    """What a search walks of a merge method and of steps, for one blend of all sources.

    Args:
        method: whose parameters they are.
        context: of the search.
        bounds: by parameter, where the method's own range is not wanted. One that is not ``searched`` is with bounds.
        fixed: values of parameters that are not searched.
        switches: the method's yes/no settings, where its defaults are not wanted.
        basis: of the blend.
        steps: after the method, by name, in their order.
        cosines: of the curve over depth that each weight of a source follows; 1 for the same weight everywhere.
    """

    def __init__(
        self,
        method: Method,
        context: SpaceContext,
        bounds: Bounds | None = None,
        fixed: Mapping[str, Value] | None = None,
        switches: Mapping[str, bool] | None = None,
        basis: Basis | None = None,
        steps: Mapping[str, StepSettings] | None = None,
        cosines: int = 1,
    ) -> None:
        self._method = method
        self._sources = context.mixed
        self._base = context.base
        self._basis = basis
        self._fixed = dict(fixed or {})
        self._switches = dict(switches or {})
        found = [(find_step(name, f"space.steps.{name}"), settings) for name, settings in (steps or {}).items()]
        self.has_derivatives = method.differentiable is not None and all(step.keeps_derivatives for step, _ in found)
        self._genes = list(self._lay_out(bounds or {}))
        self._waves = list(waves_of(self._genes, cosines))
        self._steps = [StepGenes(step, given, has_derivatives=self.has_derivatives) for step, given in found]

    @property
    def methods(self) -> tuple[Method, ...]:
        """Whose numbers they are."""
        return (self._method,)

    @property
    def own(self) -> int:
        """How many of the numbers are the method's own; those of steps come after."""
        return len(self._genes) + len(self._waves)

    def __len__(self) -> int:
        return self.own + sum(map(len, self._steps))

    @property
    def curves(self) -> list[tuple[int, int, Wave]]:
        """Of each cosine of a curve, the places of the weight and of its own number."""
        return [(wave.place, len(self._genes) + number, wave) for number, wave in enumerate(self._waves)]

    def parameters(self, prefix: str, group: str) -> list[Parameter]:
        """Those of one blend, named after ``prefix``; those of curves come after the method's others, then steps."""
        of_curves = (wave.described(prefix, group) for wave in self._waves)
        of_steps = (p for step in self._steps for p in step.parameters(prefix, group))
        return [*(gene.described(f"{prefix}.{gene.name}", group) for gene in self._genes), *of_curves, *of_steps]

    def blend(self, numbers: Sequence[float] = (), depth: float | None = None) -> Blend:
        """The blend that so many numbers say; without any, the method's and steps' defaults with what is fixed.

        Args:
            numbers: in the order of ``parameters``.
            depth: where curves are read, from 0 to 1; None outside of the stack of layers.
        """
        values = default_parameters(self._method, self._sources) | self._switches
        for name, value in self._fixed.items():
            values[name] = dict.fromkeys(self._sources, value) if isinstance(values[name], dict) else value
        for gene, number in zip(self._genes, self._at_depth(numbers, depth), strict=False):
            of_sources = values[gene.parameter.name]
            if gene.source is not None and isinstance(of_sources, dict):
                of_sources[gene.source] = gene.value(number)
            else:
                values[gene.parameter.name] = gene.value(number)
        steps = tuple(self._steps_at(numbers[self.own :]))
        return Blend(
            method=self._method.name,
            sources=self._sources,
            base=self._base if self._method.needs_base or self._basis or steps else None,
            parameters=values,
            basis=self._basis,
            steps=steps,
        )

    def nearest(self, blend: Blend, factor: float = 1.0) -> list[float] | None:
        """The numbers nearest to a blend, all of whose change is multiplied by a factor.

        Of another method, what both have is taken, and the rest is at its default. The factor goes to the shares of the
        sources. None where the blend is of other sources, takes its shares otherwise, or its method is not installed.
        """
        method, ours = _installed(blend.method), self._method
        if method is None or set(blend.sources) != set(self._sources) or blend.base not in (None, self._base):
            return None
        if method.name != ours.name and (method.needs_base != ours.needs_base or _shares(method) != _shares(ours)):
            return None
        values: dict[str, object] = {p.name: p.default for p in ours.parameters} | dict(blend.parameters)
        numbers = []
        for gene in self._genes:
            value = values[gene.parameter.name]
            if factor != 1 and gene.parameter.share:
                value = _times(value, factor)
            numbers.append(gene.nearest(value))
        flat = [0.0] * len(self._waves)
        return [*numbers, *flat, *(number for step in self._steps for number in step.nearest(blend.steps))]

    def defaults(self) -> list[tuple[Method, list[float]]]:
        """The method with the numbers of its and the steps' defaults."""
        return [(self._method, [p.default for p in self.parameters("", "")])]

    def numbers_at(self, point_of: Callable[[Method], Point | None]) -> list[float] | None:
        """The numbers of a method's point at which no step changes anything.

        None where it has no such point, bounds or what is fixed forbid it, it leaves a number open, or a step always
        changes something.
        """
        point, neutral = point_of(self._method), [step.neutral() for step in self._steps]
        if point is None or None in neutral:
            return None
        for name, fixed in self._fixed.items():
            if name in point and any(value_at(point, name, source) != fixed for source in self._sources):
                return None
        if any(gene.parameter.name not in point for gene in self._genes):
            return None
        numbers = [gene.number(value_at(point, gene.parameter.name, gene.source)) for gene in self._genes]
        inside = all(gene.low <= number <= gene.high for gene, number in zip(self._genes, numbers, strict=True))
        flat = [0.0] * len(self._waves)
        return [*numbers, *flat, *(number for of_step in neutral for number in of_step or ())] if inside else None

    def _at_depth(self, numbers: Sequence[float], depth: float | None) -> Sequence[float]:
        """The numbers of the genes at a depth, each weight with a curve within its range."""
        found = list(numbers[: len(self._genes)])
        if depth is None or not found:
            return found
        for wave, coefficient in zip(self._waves, numbers[len(self._genes) : self.own], strict=True):
            found[wave.place] += coefficient * wave.at(depth)
        for place in {wave.place for wave in self._waves}:
            found[place] = min(max(found[place], self._genes[place].low), self._genes[place].high)
        return found

    def _steps_at(self, numbers: Sequence[float]) -> Iterator[BlendStep]:
        begin = 0
        for step in self._steps:
            yield from step.steps(numbers[begin : begin + len(step)])
            begin += len(step)

    def _lay_out(self, bounds: Bounds) -> Iterator[Gene]:
        for p, low, high in searched(self._method.parameters, bounds, self._fixed):
            for source in self._sources if p.scope == "source" else (None,):
                smooth = self.has_derivatives and p.name in (self._method.differentiable or ())
                yield Gene(p, source, low, high, smooth)


def alone_at(method: Method, mixed: Sequence[str], source: str) -> Point | None:
    """Where a method gives one source, or the base, as it is; None where it has no such point."""
    if method.alone is None or not (source in mixed or method.needs_base):
        return None
    return method.alone(mixed, source if source in mixed else None)


def _installed(name: str) -> Method | None:
    try:
        return find_method(name, "blend")
    except InputError:
        return None


def _shares(method: Method) -> set[tuple[str, str]]:
    """The parameters that say how much of a source is taken; two methods of the same ones are told alike."""
    return {(p.name, p.scope) for p in method.parameters if p.share}


def _times(value: object, factor: float) -> object:
    if isinstance(value, Mapping):
        return {source: one * factor for source, one in value.items()}
    return value * factor if isinstance(value, float) else value
