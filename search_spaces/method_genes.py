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
    """What a search varies in a merge method and in steps, for one blend of all sources.

    Args:
        method: the method.
        context: what is known about the search.
        bounds: ranges by parameter, in place of the method's own. A parameter with bounds is always searched.
        fixed: values of parameters that are not searched.
        switches: the method's yes/no settings, in place of its defaults.
        basis: the blend's basis.
        steps: the steps after the method, by name, in order.
        cosines: the number of cosines in the curve over depth of each source weight; 1 for a constant weight.
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
        """The methods that the numbers belong to."""
        return (self._method,)

    @property
    def own(self) -> int:
        """How many of the numbers belong to the method; those of steps come after."""
        return len(self._genes) + len(self._waves)

    def __len__(self) -> int:
        return self.own + sum(map(len, self._steps))

    @property
    def curves(self) -> list[tuple[int, int, Wave]]:
        """For each cosine of a curve, the positions of the weight and of the cosine's own number."""
        return [(wave.place, len(self._genes) + number, wave) for number, wave in enumerate(self._waves)]

    def parameters(self, prefix: str, group: str) -> list[Parameter]:
        """The parameters of one blend, named after ``prefix``; curves come after the method's others, then steps."""
        of_curves = (wave.described(prefix, group) for wave in self._waves)
        of_steps = (p for step in self._steps for p in step.parameters(prefix, group))
        return [*(gene.described(f"{prefix}.{gene.name}", group) for gene in self._genes), *of_curves, *of_steps]

    def blend(self, numbers: Sequence[float] = (), depth: float | None = None) -> Blend:
        """The blend that these numbers stand for; without numbers, the defaults of method and steps with fixed values.

        Args:
            numbers: in the order of ``parameters``.
            depth: where curves are evaluated, from 0 to 1; None outside the stack of layers.
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
        """The numbers closest to a blend whose whole change is multiplied by a factor.

        For a blend of another method, parameters that both have are kept and the rest are at their defaults. The factor
        is applied to the shares of the sources. None if the blend has other sources or expresses shares differently, or
        if its method is not installed.
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
        """The method with the default numbers of method and steps."""
        return [(self._method, [p.default for p in self.parameters("", "")])]

    def numbers_at(self, point_of: Callable[[Method], Point | None]) -> list[float] | None:
        """The numbers of a method's point at which no step changes anything.

        None if there is no such point, bounds or fixed values exclude it, it leaves a number undetermined, or a step
        always changes something.
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
        """The numbers at a depth; each weight with a curve is clipped to its range."""
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
    """The point at which a method returns one source, or the base, unchanged; None if there is no such point."""
    if method.alone is None or not (source in mixed or method.needs_base):
        return None
    return method.alone(mixed, source if source in mixed else None)


def _installed(name: str) -> Method | None:
    try:
        return find_method(name, "blend")
    except InputError:
        return None


def _shares(method: Method) -> set[tuple[str, str]]:
    """The parameters that say how much of a source is taken; methods with the same ones express shares the same way."""
    return {(p.name, p.scope) for p in method.parameters if p.share}


def _times(value: object, factor: float) -> object:
    if isinstance(value, Mapping):
        return {source: one * factor for source, one in value.items()}
    return value * factor if isinstance(value, float) else value
