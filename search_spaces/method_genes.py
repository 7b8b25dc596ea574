"""The parameters of a merge method as numbers of a genome."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.genome import Parameter
from evomerge.method import Method, MethodParameter, Point, Value, default_parameters, value_at
from evomerge.recipes.stack import Basis, Blend
from search_spaces.base import SpaceContext


@dataclass(frozen=True)
class _Gene:
    """One number: of a parameter, and of one source or (None) of all."""

    parameter: MethodParameter
    source: str | None
    low: float
    high: float

    @property
    def name(self) -> str:
        return ".".join(part for part in (self.parameter.name, self.source) if part)

    def value(self, number: float) -> Value:
        """What the number says."""
        return self.parameter.choices[int(number)] if self.parameter.kind == "choice" else number

    def number(self, value: Value) -> float:
        """The number that says it."""
        return float(self.parameter.choices.index(value)) if isinstance(value, str) else float(value)

    def described(self, name: str, group: str) -> Parameter:
        default = float(np.clip(self.number(self.parameter.default), self.low, self.high))
        share_of = self.source if self.parameter.share and self.source is not None else ""
        kind, choices = self.parameter.kind, self.parameter.choices
        return Parameter(name, self.low, self.high, default, kind, group, choices, share_of)


class MethodGenes:
    """What a search walks of a merge method, for one blend of all sources.

    Args:
        method: whose parameters they are.
        context: of the search.
        bounds: by parameter, where the method's own range is not wanted. One that is not ``searched`` is with bounds.
        fixed: values of parameters that are not searched.
        switches: the method's yes/no settings, where its defaults are not wanted.
        basis: of the blend.
    """

    def __init__(
        self,
        method: Method,
        context: SpaceContext,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        fixed: Mapping[str, Value] | None = None,
        switches: Mapping[str, bool] | None = None,
        basis: Basis | None = None,
    ) -> None:
        self._method = method
        self._sources = context.mixed
        self._base = context.base if method.needs_base or basis else None
        self._basis = basis
        self._fixed = dict(fixed or {})
        self._switches = dict(switches or {})
        self._genes = list(self._lay_out(dict(bounds or {})))

    @property
    def method(self) -> Method:
        """Whose numbers they are."""
        return self._method

    def __len__(self) -> int:
        return len(self._genes)

    def parameters(self, prefix: str, group: str) -> list[Parameter]:
        """Those of one blend, named after ``prefix``."""
        return [gene.described(f"{prefix}.{gene.name}", group) for gene in self._genes]

    def blend(self, numbers: Sequence[float] = ()) -> Blend:
        """The blend that so many numbers say; without any, the method's defaults with what is fixed."""
        values = default_parameters(self._method, self._sources) | self._switches
        for name, value in self._fixed.items():
            values[name] = dict.fromkeys(self._sources, value) if isinstance(values[name], dict) else value
        for gene, number in zip(self._genes, numbers, strict=False):
            of_sources = values[gene.parameter.name]
            if gene.source is not None and isinstance(of_sources, dict):
                of_sources[gene.source] = gene.value(number)
            else:
                values[gene.parameter.name] = gene.value(number)
        return Blend(
            method=self._method.name, sources=self._sources, base=self._base, parameters=values, basis=self._basis
        )

    def numbers_at(self, point: Point | None) -> list[float] | None:
        """The numbers of a point; None where bounds or what is fixed forbid it, or it leaves a number open."""
        if point is None:
            return None
        for name, fixed in self._fixed.items():
            if name in point and any(value_at(point, name, source) != fixed for source in self._sources):
                return None
        if any(gene.parameter.name not in point for gene in self._genes):
            return None
        numbers = [gene.number(value_at(point, gene.parameter.name, gene.source)) for gene in self._genes]
        inside = all(gene.low <= number <= gene.high for gene, number in zip(self._genes, numbers, strict=True))
        return numbers if inside else None

    def _lay_out(self, bounds: Mapping[str, tuple[float, float]]) -> Iterator[_Gene]:
        for p in self._method.parameters:
            if p.name in self._fixed or not (p.searched or p.name in bounds):
                continue
            low, high = (0.0, len(p.choices) - 1.0) if p.kind == "choice" else bounds.get(p.name, (p.low, p.high))
            for source in self._sources if p.scope == "source" else (None,):
                yield _Gene(p, source, low, high)
