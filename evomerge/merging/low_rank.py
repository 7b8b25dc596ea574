"""Recipes that are a weighted sum of low-rank adapters on one model: their coefficients, weight by weight.

Where every source is the base or an adapter of it (LoRA), and every tensor is a linear combination of the sources whose
coefficients sum to 1, the merged weight is W0 + sum_k c_k s_k B_k A_k: nothing but the few numbers c_k tells candidates
apart, and several can be computed in one forward pass (``checkpoints.low_rank_rows``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.blends import planned
from evomerge.checkpoints.source import Source
from evomerge.merging.core_space import NotLowRankError, check_adapters
from evomerge.merging.evidence import Evidence
from evomerge.merging.facts import Facts, Weights
from evomerge.merging.jobs import WorkerThreads
from evomerge.merging.materialise import check_stack
from evomerge.merging.passes import Combine
from evomerge.merging.path import Merged, merged_tensors, site_of
from evomerge.merging.site import Ref
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.vocabulary import Vocabulary

_ROUNDING = 1e-6
"""By how much coefficients may miss a sum of 1, beside the sum of their sizes: float32 tells no more of a weight."""


@dataclass(frozen=True)
class Family:
    """A model and sources that are low-rank adapters of it.

    Attributes:
        base: the source that is the model itself.
        adapted: the sources that are not.
        weights: what any of them changes, in the order of the model.
    """

    base: str
    adapted: tuple[str, ...]
    weights: tuple[str, ...]


class _WeightsReadError(Exception):
    """A method asks for statistics of the weights."""


def low_rank_problem(recipe: Recipe, sources: Mapping[str, Source]) -> str | None:
    """Why a recipe of these sources is no weighted sum of low-rank adapters; None where it is. Opens no tensor.

    Raises:
        InputError: the recipe cannot be made of these sources at all.
    """
    try:
        coefficients(recipe, sources, family_of(sources))
    except NotLowRankError as error:
        return str(error)
    return None


def family_of(sources: Mapping[str, Source]) -> Family:
    """What sources have in common, if they are one model and low-rank adapters of it.

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
    """Refuse an adapter of what cannot be computed beside the weights."""
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


def coefficients(recipe: Recipe, sources: Mapping[str, Source], family: Family) -> Tensor:
    """What a recipe multiplies each adapted source's change of each weight by: float32 [weights, adapted sources].

    Raises:
        NotLowRankError: the recipe is no weighted sum of the family.
        InputError: it cannot be made of these sources at all.
    """
    if not isinstance(recipe, StackRecipe):
        raise NotLowRankError(f"a recipe of the kind {recipe.kind} is not a weighted sum of adapters")
    check_stack(recipe, sources)
    if recipe.is_scaled:
        raise NotLowRankError("its hops have scales")
    if [hop.layer for hop in recipe.hops] != list(range(sources[family.base].layers)):
        raise NotLowRankError("its hops are not the model's own layers in their order")
    weights = Weights(_refuse_to_read, WorkerThreads(), lambda name: sources[name].tensors)
    by_weight: dict[str, list[float]] = {}
    for merged in merged_tensors(recipe, sources):
        combined = _combined(merged, recipe, sources, weights)
        by_weight[merged.name] = [combined.get(name, 0.0) for name in family.adapted]
    return torch.tensor([by_weight[weight] for weight in family.weights], dtype=torch.float64).float()


def _combined(
    merged: Merged, recipe: StackRecipe, sources: Mapping[str, Source], weights: Weights
) -> Mapping[str, float]:
    """The coefficients of a tensor by source: a linear combination that leaves what sources share as it is."""
    blend = recipe.blend_for(merged.role, merged.name)
    if blend.basis is not None:
        raise NotLowRankError(f"{blend.method} merges it in core space")
    facts = Facts(site_of(merged, recipe, blend, sources), weights, Evidence(), recipe.seed)
    try:
        plan = planned(facts, blend)
    except _WeightsReadError:
        problem = f"{blend.method} plans by what the weights are, where only numbers of the recipe may decide"
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


def _refuse_to_read(ref: Ref) -> Tensor:
    raise _WeightsReadError
