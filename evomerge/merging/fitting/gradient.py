"""The gradient of a merged model's loss with respect to the numbers of a genome.

With W the tensors of the model, n the numbers that their passes are made with, and x the genome,

    dL/dx = sum over tensors of <dL/dW, dW/dn> dn/dx.

dL/dW comes from a backward pass through the live model, tensor by tensor. It is turned into dL/dn at once
(``derivatives``) and freed, so that at most one tensor's gradient is in memory. dn/dx is a central difference of the
plans: these are arithmetic in float64 on a few numbers, and read only facts of weights that are already known. Masks
are those of the genome, and count as constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.blends import derivative_problem, planned
from evomerge.checkpoints.adapter_changes import LowRank
from evomerge.checkpoints.backward import gradients
from evomerge.checkpoints.live import LiveModel
from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.merging.arithmetic.changes import Rescale, differentiable
from evomerge.merging.arithmetic.derivatives import derivatives_of, with_every_source
from evomerge.merging.arithmetic.passes import Combine, Differentiable, Pass
from evomerge.merging.core_space import Core
from evomerge.merging.materialise import Materialiser
from evomerge.merging.measured.facts import Remembered
from evomerge.merging.path import Merged, merged_tensors
from evomerge.merging.plans import base_of
from evomerge.merging.site import Ref
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import StackRecipe

_STEP = 1e-8
"""The width of a difference, as a fraction of a gene's range: rounding in float64 and curvature are both below 1e-6."""

_INSIDE = 4 * _STEP
"""How far, as a fraction of its range, a gene is first moved towards the middle of its range. At its bounds, and at
values such as a weight of zero, plans differ from those nearby: a source without weight is not read."""

_ROUNDING = 1e-6
"""The relative tolerance for a sum of rates that is zero."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class _Plan:
    """How a tensor is made: a pass and its inputs; in core space the pass makes the tensor's core."""

    made: Differentiable
    refs: Sequence[Ref] = ()
    core: Core | None = None


@dataclass
class Point:
    """A genome at which a gradient is taken.

    Attributes:
        recipe: of the model whose loss is taken.
        gradient: float64 [genes], accumulated so far; NaN for genes without a derivative.
    """

    recipe: StackRecipe
    gradient: Vector
    _plans: Mapping[str, _Plan]
    _rates: Mapping[str, Sequence[tuple[int, Vector]]]
    _materialiser: Materialiser = field(repr=False)

    @contextmanager
    def listening(self, live: LiveModel, recomputed: bool = False) -> Iterator[None]:
        """While open, each backward pass through the model, which holds the recipe, adds to the gradient.

        Args:
            recomputed: keep less of forward passes; see ``backward.gradients``.
        """
        takes = {name: lambda gradient, name=name: self._take(name, gradient) for name in self._rates}
        with gradients(live, takes, recomputed=recomputed):
            yield

    def _take(self, name: str, gradient: Tensor) -> None:
        found = self._derivatives(self._plans[name], gradient)
        for gene, rates in self._rates[name]:
            self.gradient[gene] += found @ rates

    def _derivatives(self, plan: _Plan, gradient: Tensor) -> Vector:
        """The derivative with respect to each number of a plan: float64 [numbers]."""
        if plan.core is not None:
            left, right = plan.core.left.to(gradient.device), plan.core.right.to(gradient.device)
            gradient = left.T @ gradient.float() @ right.T
            tensors = [t.to(gradient.device) for t in self._materialiser.core_space.read(plan.core, plan.made)]
        elif isinstance(plan.made, Combine) and (products := self._adapters_products(plan.refs, gradient)) is not None:
            return products
        else:
            tensors = [self._materialiser.read_on(ref, gradient.device) for ref in plan.refs]
        return derivatives_of(plan.made, tensors, gradient).cpu().numpy()

    def _adapters_products(self, refs: Sequence[Ref], gradient: Tensor) -> Vector | None:
        """<G, x> for sources that are low-rank adapters of one model, or the model itself; None if they are not.

        Computed as <G, W0> + sum s <L^T G, R>, without folding adapters, which would need whole weights for each
        source.
        """
        sources, (_, stored) = [self._materialiser.sources[name] for name, _ in refs], refs[0]
        changed = [one.changes.get(stored, ()) for one in sources]
        alike = {(type(one), one.tensors.get(name)) for one, (_, name) in zip(sources, refs, strict=True)}
        plain = all(isinstance(c, LowRank) and c.magnitude is None for changes in changed for c in changes)
        if len(alike) > 1 or not plain:
            return None
        whole, wide = sources[0].read_stored(stored).to(gradient.device), gradient.float()
        products = np.full(len(refs), derivatives_of(Combine({"": 1.0}), [whole], gradient).item())
        for number, source in enumerate(sources):
            for left, right, scale in source.low_rank(stored):
                product = left.to(gradient.device).T @ wide * right.to(gradient.device)
                products[number] += scale * float(product.sum(dtype=torch.float64))
        return products


class Decoding(Protocol):
    """What genomes belong to: a search space, or an object that is like one for gradients."""

    @property
    def parameters(self) -> Sequence[Parameter]: ...

    def decode(self, genome: Genome) -> Recipe: ...


class GenomeGradients:
    """Gradients at genomes of one search space, whose choices and paths stay as in the first genome.

    Args:
        materialiser: of the models.
        space: of stack recipes.
    """

    def __init__(self, materialiser: Materialiser, space: Decoding) -> None:
        self._materialiser, self._space = materialiser, space
        self._groups: list[dict[str, int]] | None = None
        self._facts: dict[str, Remembered] = {}  # by tensor: masks and sources are the same at all points

    def at(self, genome: Genome) -> Point:
        """Prepare for the gradient at a genome, up to about 1e-8 of the ranges of its numbers.

        Raises:
            InputError: there is no gradient; names the method or step.
        """
        parameters = self._space.parameters
        inside = _inside(genome, parameters)
        recipe = self._decoded(inside)
        for number, blend in enumerate(recipe.blends):
            if (problem := derivative_problem(blend)) is not None:
                raise InputError(f"recipe.blends[{number}]", f"has no gradient: {problem}")
        merged = {one.name: one for one in merged_tensors(recipe, self._materialiser.sources)}
        if self._groups is None:
            self._groups = self._grouped(inside, recipe, list(merged.values()))
        plans: dict[str, _Plan] = {}
        rates: dict[str, list[tuple[int, Vector]]] = {}
        for genes in self._groups:
            before, after = (self._beside(inside, genes.values(), side) for side in (-1.0, 1.0))
            recipes = self._decoded(before), recipe, self._decoded(after)
            for name, gene in genes.items():
                found = [self._plan(merged[name], one) for one in recipes]
                if (plan := found[1]) is not None:
                    plans[name] = plan
                    rate = _rate([one.made for one in found if one], [x[gene] for x in (before, inside, after)])
                    rates.setdefault(name, []).append((gene, rate))
        gradient = np.array([0.0 if p.differentiable else np.nan for p in parameters])
        return Point(recipe, gradient, plans, rates, self._materialiser)

    def _decoded(self, genome: Genome) -> StackRecipe:
        recipe = self._space.decode(genome)
        if not isinstance(recipe, StackRecipe):
            raise InputError("recipe.kind", f"is {recipe.kind}, and such models have no gradient")
        return recipe

    def _plan(self, merged: Merged, recipe: StackRecipe) -> _Plan | None:
        """How a tensor is made; None if it is the base's own, which no adapter changes."""
        blend = recipe.blend_for(merged.role, merged.name)
        if blend.basis == "core":
            space = self._materialiser.core_space
            core = space.core(merged, base_of(blend), blend.sources)
            if core is None:
                return None
            return _Plan(differentiable(with_every_source(space.plan(core, blend, recipe.seed))), core=core)
        if merged.name not in self._facts:
            self._facts[merged.name] = Remembered.of(self._materialiser.facts(merged, recipe))
        facts = self._facts[merged.name]
        plan = with_every_source(planned(facts, blend))
        return _Plan(differentiable(plan), [facts.site.refs[name] for name in plan.inputs])

    def _grouped(self, genome: Genome, recipe: StackRecipe, merged: Sequence[Merged]) -> list[dict[str, int]]:
        """Groups of genes that change disjoint sets of tensors: for each group the tensors, by name, with their gene.

        The genes of a group are moved at once, so that as few recipes as possible are decoded.
        """
        groups: list[dict[str, int]] = []
        for gene, parameter in enumerate(self._space.parameters):
            if not parameter.differentiable:
                continue
            touched = dict.fromkeys(_changed(recipe, self._decoded(self._beside(genome, [gene], 1.0)), merged), gene)
            group = next((group for group in groups if group.keys().isdisjoint(touched)), None)
            if group is None:
                groups.append(touched)
            else:
                group.update(touched)
        return groups

    def _beside(self, genome: Genome, genes: Iterable[int], side: float) -> Genome:
        """The genome with some genes moved by the width of a difference, up or down."""
        moved = genome.copy()
        for gene in set(genes):
            parameter = self._space.parameters[gene]
            moved[gene] += side * _STEP * (parameter.high - parameter.low)
        return moved


def _inside(genome: Genome, parameters: Sequence[Parameter]) -> Genome:
    """The genome with its differentiable genes moved slightly towards the middle of their ranges."""
    low, high = (np.array([getattr(p, end) for p in parameters]) for end in ("low", "high"))
    moving = np.array([p.differentiable for p in parameters])
    towards = np.where(genome <= (low + high) / 2, 1.0, -1.0)
    return np.where(moving, genome + towards * _INSIDE * (high - low), genome)


def _changed(one: StackRecipe, other: StackRecipe, merged: Sequence[Merged]) -> Iterator[str]:
    """The names of the tensors that two recipes with the same path make with different blends."""
    differ: dict[tuple[int | None, int | None], bool] = {}
    for tensor in merged:
        numbers = one.blend_number(tensor.role, tensor.name), other.blend_number(tensor.role, tensor.name)
        if numbers not in differ:
            differ[numbers] = one.blend_for(tensor.role, tensor.name) != other.blend_for(tensor.role, tensor.name)
        if differ[numbers]:
            yield tensor.name


def _rate(plans: Sequence[Differentiable], values: Sequence[float]) -> Vector:
    """How fast the numbers of a plan change with a gene: float64 [numbers].

    Computed as a central difference. If the plan has another form on one side, which happens if factors become too
    large for it, a difference to the other side is used.

    Args:
        plans: before, at and after the point in question.
        values: of the gene there.
    """
    form = _form(plans[1])
    ends = [number for number in (0, 2) if _form(plans[number]) == form]
    first, last = (ends[0], ends[-1]) if len(ends) == 2 else (min(1, *ends), max(1, *ends))
    rate = (plans[last].numbers - plans[first].numbers) / (values[last] - values[first])
    if isinstance(plans[1], Combine) and abs(rate.sum()) < _ROUNDING * np.abs(rate).max():
        rate[0] -= rate.sum()  # coefficients with a constant sum: the rest is rounding, times large weights
    return np.asarray(rate)


def _form(plan: Pass) -> tuple[object, ...]:
    return type(plan), plan.inputs, *(_form(plan.made) if isinstance(plan, Rescale) else ())
