"""Parameter space: how much of each source goes into each part of the merged model.

A genome holds the numbers of one merge method (a weight, a density, ...) for every source and every layer group. This
is the parameter-space half of Akiba et al., "Evolutionary Optimization of Model Merging Recipes" (arXiv 2403.13187,
section 3.1). Weights are not normalised unless asked: the optimum that the paper reports has weights that sum to about
2, which no normalised merge can reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, FiniteFloat

from evomerge.errors import InputError
from evomerge.genome import Genome, Landmark, Parameter
from evomerge.method_spec import MethodSpec, check_blend, default_parameters
from evomerge.recipe import Blend, Recipe, Role, roles
from search_spaces.base import SpaceContext, SpaceSettings

# Methods whose merge is the plain weighted sum when nothing is dropped, so that equal weights are the uniform average.
_WEIGHTED_SUMS = ("linear", "task_arithmetic", "dare_linear")


class ParameterSpaceSettings(SpaceSettings):
    """``space:`` of a search file.

    Args:
        method: the merge method.
        granularity: how the model is cut into layer groups that have numbers of their own. "model": one group. "layer":
            each layer, and the embedding, final norm and head. "block": as "layer", attention and mlp apart (a layer's
            norms go with its attention). A number n: groups of n layers.
        bounds: a parameter's range, where the method's own is not wanted: ``weight: [0, 2]``. Parameters that a search
            leaves alone by default (``lambda``, ``gamma``, ``epsilon``) are searched when they are given one.
        fixed: a parameter that is not searched: ``density: 0.5``.
        switches: the method's yes/no settings: ``normalize: true``.
    """

    kind: Literal["parameter_space"] = "parameter_space"
    method: str
    granularity: Literal["model", "layer", "block"] | Annotated[int, Field(ge=1)] = "model"
    bounds: dict[str, tuple[FiniteFloat, FiniteFloat]] = Field(default_factory=dict)
    fixed: dict[str, FiniteFloat] = Field(default_factory=dict)
    switches: dict[str, bool] = Field(default_factory=dict)

    def build(self, context: SpaceContext) -> ParameterSpace:
        spec = context.method(self.method)
        self._check_names(spec)
        if spec.needs_base and context.base is None:
            raise InputError("base", f"{spec.name} merges task vectors and needs a base", "Name it: `base: NAME`.")
        if isinstance(self.granularity, int) and self.granularity > context.layers:
            raise InputError(
                "space.granularity", f"is {self.granularity}, but the sources have {context.layers} layers"
            )
        for name, (low, high) in self.bounds.items():
            if low >= high:
                raise InputError(f"space.bounds.{name}", f"the lower bound {low} is not below the upper bound {high}")
        return ParameterSpace(self, context)

    def _check_names(self, spec: MethodSpec) -> None:
        known = {p.name for p in spec.parameters}
        for field, names, allowed in (
            ("bounds", self.bounds, known),
            ("fixed", self.fixed, known),
            ("switches", self.switches, set(spec.switches)),
        ):
            for name in names:
                if name not in allowed:
                    options = ", ".join(sorted(allowed)) or "none"
                    raise InputError(f"space.{field}.{name}", f"{spec.name} has no such setting; it has: {options}")
        if both := sorted(set(self.bounds) & set(self.fixed)):
            raise InputError(f"space.fixed.{both[0]}", "is given bounds as well", "Keep one of the two.")
        if {p.name for p in spec.parameters if p.searched or p.name in self.bounds} <= set(self.fixed):
            raise InputError("space.fixed", "leaves nothing to search", "Leave out at least one parameter.")


@dataclass(frozen=True)
class _Gene:
    """Where one number of the genome goes: a parameter of a group's blend, of one source or (None) of all."""

    group: str
    parameter: str
    source: str | None


class ParameterSpace:
    """The numbers of one merge method for every layer group; see the module's text."""

    def __init__(self, settings: ParameterSpaceSettings, context: SpaceContext) -> None:
        self._settings = settings
        self._context = context
        self._spec = context.method(settings.method)
        self._group_of = {role: self._group(role) for role in roles(context.layers)}
        self._genes, self.parameters = self._lay_out()
        self.shelves = context.layers
        check_blend(self._blend("", {}), self._spec, "space")

    def decode(self, genome: Genome) -> Recipe:
        values: dict[str, dict[str, float | dict[str, float]]] = {}
        for gene, number in zip(self._genes, genome.tolist(), strict=True):
            group = values.setdefault(gene.group, {})
            if gene.source is None:
                group[gene.parameter] = number
            else:
                group.setdefault(gene.parameter, {})[gene.source] = number  # type: ignore[index]
        blends = {name: self._blend(name, found) for name, found in values.items()}
        at = {role: blends[group] for role, group in self._group_of.items()}
        return Recipe.compose(
            sources=self._context.sources,
            tokenizer=self._context.tokenizer,
            embedding=at[Role("embedding")],
            hops=(
                (i, at[Role("attention", i)], at[Role("mlp", i)], at[Role("norm", i)])
                for i in range(self._context.layers)
            ),
            norm=at[Role("norm")],
            head=at[Role("head")],
            vocabulary=self._context.vocabulary,
            seed=self._context.recipe_seed,
            dtype=self._context.dtype,
        )

    def landmarks(self) -> Iterator[Landmark]:
        """Every source alone, the uniform average of the merged ones, and the method's usual defaults."""
        mixed = self._context.mixed
        for name in self._context.sources:
            if name in mixed:
                alone = self._genome_of({name: 1.0})
            else:  # task vectors that all weigh nothing leave the base
                alone = self._genome_of({}) if self._spec.needs_base else None
            yield Landmark(name, "source", self._weighted({name: 1.0}), alone)
        share = {name: 1.0 / len(mixed) for name in mixed}
        point = self._genome_of(share) if self._spec.name in _WEIGHTED_SUMS else None
        yield Landmark("uniform average", "average", self._weighted(share), point)
        usual = np.array([p.default for p in self.parameters], dtype=np.float64)
        yield Landmark(f"{self._spec.name} defaults", "default", self.decode(usual), usual)

    def _group(self, role: Role) -> str:
        granularity = self._settings.granularity
        if granularity == "model":
            return "model"
        if role.layer is None:
            # A tied head is the embedding's own tensor; a gene for it would do nothing.
            return "embedding" if role.kind == "head" and self._context.tied else role.kind
        if granularity == "layer":
            return f"layers.{role.layer}"
        if granularity == "block":
            return f"layers.{role.layer}.{'mlp' if role.kind == 'mlp' else 'attention'}"
        first = role.layer // granularity * granularity
        return f"layers.{first}-{min(first + granularity, self._context.layers) - 1}"

    def _lay_out(self) -> tuple[Sequence[_Gene], Sequence[Parameter]]:
        genes, parameters = [], []
        for group in dict.fromkeys(self._group_of.values()):
            for p in self._spec.parameters:
                if p.name in self._settings.fixed or not (p.searched or p.name in self._settings.bounds):
                    continue
                low, high = self._settings.bounds.get(p.name, (p.low, p.high))
                for source in self._context.mixed if p.scope == "source" else (None,):
                    name = ".".join(part for part in (group, p.name, source) if part)
                    genes.append(_Gene(group, p.name, source))
                    parameters.append(Parameter(name, low, high, float(np.clip(p.default, low, high)), group=group))
        return genes, parameters

    def _blend(self, group: str, found: dict[str, float | dict[str, float]]) -> Blend:
        mixed = self._context.mixed
        numbers = default_parameters(self._spec, mixed) | self._settings.switches | found
        for p in self._spec.parameters:
            if p.name in self._settings.fixed:
                value = self._settings.fixed[p.name]
                numbers[p.name] = dict.fromkeys(mixed, value) if p.scope == "source" else value
        base = self._context.base if self._spec.needs_base else None
        return Blend(method=self._spec.name, sources=mixed, base=base, parameters=numbers)

    def _weighted(self, weights: dict[str, float]) -> Recipe:
        """The plain weighted sum of sources, whatever the method of this space."""
        blend = Blend(method="linear", sources=tuple(weights), parameters={"weight": weights, "normalize": False})
        return Recipe.uniform(
            blend,
            sources=self._context.sources,
            tokenizer=self._context.tokenizer,
            layers=self._context.layers,
            vocabulary=self._context.vocabulary,
            seed=self._context.recipe_seed,
            dtype=self._context.dtype,
        )

    def _genome_of(self, weights: dict[str, float]) -> Genome | None:
        """The point that is the weighted sum with nothing dropped, or None where the bounds or the method forbid it."""
        fixed = self._settings.fixed
        if "weight" in fixed or fixed.get("density", 1.0) != 1.0:
            return None
        wanted = []
        for gene in self._genes:
            if gene.parameter == "weight" and gene.source is not None:
                wanted.append(weights.get(gene.source, 0.0))
            elif gene.parameter == "density":
                wanted.append(1.0)
            else:
                return None
        if any(not p.low <= value <= p.high for p, value in zip(self.parameters, wanted, strict=True)):
            return None
        return np.array(wanted, dtype=np.float64)
