"""Recipes of low-rank adapters on one model that can be computed beside its weights: the numbers that distinguish them.

If every source is the base or an adapter of it (LoRA), and every tensor is a linear combination of the sources whose
coefficients sum to 1, the merged weight is W0 + sum_k c_k s_k B_k A_k, and candidates differ only in the few numbers
c_k. Merged in core space by any method, it is W0 + Q M P, and they differ in a small matrix M for each weight. In
either case several candidates can be computed in one forward pass (``checkpoints.low_rank_rows``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.blends import planned
from evomerge.checkpoints.source import Source
from evomerge.merging.arithmetic.jobs import WorkerThreads
from evomerge.merging.arithmetic.passes import Combine
from evomerge.merging.core_space import Core, CoreSpace, NotLowRankError, check_adapters, steps_in_core
from evomerge.merging.materialise import check_stack
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts, FittedTo, Weights
from evomerge.merging.path import Merged, merged_tensors, site_of
from evomerge.merging.site import Ref
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.vocabulary import Vocabulary

_ROUNDING = 1e-6
"""The relative tolerance for coefficients that sum to 1: float32 weights have no more precision."""


@dataclass(frozen=True)
class Family:
    """A model and sources that are low-rank adapters of it.

    Attributes:
        base: the source that is the model itself.
        adapted: the sources that are not.
        weights: the weights that any of them changes, in the order of the model.
    """

    base: str
    adapted: tuple[str, ...]
    weights: tuple[str, ...]


class _WeightsReadError(Exception):
    """A method needs statistics of the weights."""


def low_rank_problem(recipe: Recipe, sources: Mapping[str, Source]) -> str | None:
    """Why a recipe of these sources cannot be computed beside the weights; None if it can. Opens no tensor.

    Raises:
        InputError: the recipe cannot be made of these sources at all.
    """
    try:
        family = family_of(sources)
        if in_core_space(recipe):
            _check_core_recipe(recipe, sources, family)
        else:
            coefficients(recipe, sources, family, _Ones())
    except NotLowRankError as error:
        return str(error)
    return None


def are_adapters(sources: Mapping[str, Source]) -> bool:
    """Whether the sources are one model and low-rank adapters of it."""
    try:
        family_of(sources)
    except NotLowRankError:
        return False
    return True


def family_of(sources: Mapping[str, Source]) -> Family:
    """The family of sources, if they are one model and low-rank adapters of it.

    Raises:
        NotLowRankError: they are not.
    """
    base = next((name for name, source in sources.items() if not source.changes), None)
    if base is None:
        raise NotLowRankError("the model under the adapters is not a source itself")
    for name, source in sources.items():
        check_adapters(name, source, base, sources[base])
        _check_rows(name, source)
    adapted = tuple(name for name, source in sources.items() if source.changes)
    if not adapted:
        raise NotLowRankError("no source has a low-rank adapter")
    changed = {weight for name in adapted for weight in sources[name].changes}
    return Family(base, adapted, tuple(weight for weight in sources[base].tensors if weight in changed))


def _check_rows(name: str, source: Source) -> None:
    """Refuse an adapter that cannot be computed beside the weights."""
    for tensor in source.changes:
        if source.roles[tensor].kind == "embedding":
            raise NotLowRankError(f"the adapter of {name} changes the embedding, {tensor}")
        if source.parts[tensor].cuts:
            raise NotLowRankError(f"the adapter of {name} changes {tensor}, which is one piece of a larger tensor")


def base_recipe(recipe: Recipe, sources: Mapping[str, Source], family: Family) -> StackRecipe:
    """The model under the adapters alone, with the settings of ``recipe``, a weighted sum of the family."""
    vocabulary = recipe.vocabulary if isinstance(recipe, StackRecipe) else Vocabulary()
    blend = Blend(
        method="linear", sources=(family.base,), parameters={"weight": {family.base: 1.0}, "normalize": False}
    )
    return StackRecipe.uniform(
        blend,
        sources=recipe.sources,
        tokenizer=recipe.tokenizer,
        layers=sources[family.base].layers,
        vocabulary=vocabulary,
        seed=recipe.seed,
        dtype=recipe.dtype,
    )


class _Ones:
    """Stands for a fit when only checking whether recipes that need one can be computed."""

    def of(self, base: str, sources: Sequence[str], tensor: str) -> list[float]:
        return [1.0] * len(sources)


def coefficients(
    recipe: Recipe, sources: Mapping[str, Source], family: Family, fitted: FittedTo | None = None
) -> Tensor:
    """The coefficient of each adapted source's change to each weight in a recipe: float32 [weights, adapted sources].

    Args:
        fitted: the numbers fitted to right answers, for a recipe that needs them.

    Raises:
        NotLowRankError: the recipe is not a weighted sum of the family.
        InputError: it cannot be made of these sources at all.
    """
    recipe = _plain_stack(recipe, sources, family)
    weights = Weights(_refuse_to_read, WorkerThreads(), lambda name: sources[name].tensors)
    by_weight: dict[str, list[float]] = {}
    for merged in merged_tensors(recipe, sources):
        combined = _combined(merged, recipe, sources, weights, fitted)
        by_weight[merged.name] = [combined.get(name, 0.0) for name in family.adapted]
    return torch.tensor([by_weight[weight] for weight in family.weights], dtype=torch.float64).float()


def _plain_stack(recipe: Recipe, sources: Mapping[str, Source], family: Family) -> StackRecipe:
    """The recipe, if its layers are those of the base. Raises as ``coefficients``."""
    if not isinstance(recipe, StackRecipe):
        raise NotLowRankError(f"a recipe of the kind {recipe.kind} is not a weighted sum of adapters")
    check_stack(recipe, sources)
    if recipe.is_scaled:
        raise NotLowRankError("its hops have scales")
    if [hop.layer for hop in recipe.hops] != list(range(sources[family.base].layers)):
        raise NotLowRankError("its hops are not the model's own layers in their order")
    return recipe


def _combined(
    merged: Merged,
    recipe: StackRecipe,
    sources: Mapping[str, Source],
    weights: Weights,
    fitted: FittedTo | None,
) -> Mapping[str, float]:
    """The coefficients of a tensor by source: a linear combination that preserves what the sources share."""
    blend = recipe.blend_for(merged.role, merged.name)
    if blend.basis is not None:
        raise NotLowRankError(f"{blend.method} merges it in core space")
    if recipe.calibration is not None:
        raise NotLowRankError(f"{blend.method} is planned by what layers are given, not by numbers of the recipe alone")
    facts = Facts(site_of(merged, recipe, blend, sources), weights, Evidence(), recipe.seed, fitted=fitted)
    try:
        plan = planned(facts, blend)
    except _WeightsReadError:
        problem = f"{blend.method} plans by what the weights are, where only the recipe's numbers may decide"
        raise NotLowRankError(problem) from None
    if not isinstance(plan, Combine):
        raise NotLowRankError(f"{blend.method} makes {merged.name} otherwise than as a weighted sum")
    total, size = sum(plan.coefficients.values()), sum(map(abs, plan.coefficients.values()))
    if not abs(total - 1) <= _ROUNDING * max(1.0, size):
        problem = (
            f"{blend.method} gives {merged.name} coefficients that sum to {total:g}, not to 1, which scales the base"
        )
        raise NotLowRankError(problem)
    return plan.coefficients


def in_core_space(recipe: Recipe) -> bool:
    """Whether any part of a recipe is merged in core space."""
    return isinstance(recipe, StackRecipe) and any(blend.basis == "core" for blend in recipe.blends)


def _check_core_recipe(recipe: Recipe, sources: Mapping[str, Source], family: Family) -> StackRecipe:
    """The recipe, if all of it is merged in the core space of the whole family. Raises as ``coefficients``."""
    stack = _plain_stack(recipe, sources, family)
    for blend in stack.blends:
        if (done := steps_in_core(blend)) < len(blend.steps):
            raise NotLowRankError(f"the step {blend.steps[done].name} takes whole weights, not those of core space")
        if blend.basis != "core":
            raise NotLowRankError(f"only some of its parts are merged in core space; one by {blend.method} is not")
        if (blend.base, blend.sources) != (family.base, family.adapted):
            mixed = ", ".join(blend.sources)
            raise NotLowRankError(
                f"it merges {mixed} on {blend.base}, not {', '.join(family.adapted)} on {family.base}"
            )
    return stack


class CoreMerges:
    """Recipes in core space as a small matrix for each weight.

    Args:
        space: of the sources.
        family: the sources' base and adapters.

    Raises:
        InputError: an adapter has NaN or Inf.
    """

    def __init__(self, space: CoreSpace, sources: Mapping[str, Source], family: Family) -> None:
        self._space, self._sources, self._family = space, sources, family
        base = sources[family.base]
        self._cores: list[tuple[Merged, Core]] = []
        for weight in family.weights:
            merged = Merged(weight, base.roles[weight], weight, base.roles[weight])
            if (core := space.core(merged, family.base, family.adapted)) is not None:
                self._cores.append((merged, core))

    @property
    def bases(self) -> list[tuple[str, Tensor, Tensor]]:
        """For every weight that any source changes: its name in the transformers model, Q and P."""
        parts = self._sources[self._family.base].parts
        return [(parts[merged.stored].tensor, core.left, core.right) for merged, core in self._cores]

    def matrices(self, recipe: Recipe) -> list[Tensor]:
        """A recipe's merge of these weights' changes, in the order of ``bases``: float32 [p, q] each.

        Raises:
            NotLowRankError: it is not merged entirely in the core space of the whole family.
            InputError: it cannot be made of these sources at all.
        """
        stack = _check_core_recipe(recipe, self._sources, self._family)
        blends = ((core, stack.blend_for(merged.role, merged.name)) for merged, core in self._cores)
        return [self._space.merged(core, blend, stack.seed) for core, blend in blends]


def _refuse_to_read(ref: Ref) -> Tensor:
    raise _WeightsReadError
