"""Converts a routed model to a plain one: the average contribution of each expert is merged into the weights.

With the mean gate c_e of an expert at a module, over the tokens of some texts, the module's weight becomes
W0 + sum_e c_e D_e. This is a different model from the routed one, with a different score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing

import torch

from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.fitting.fit import Fit
from evomerge.merging.measured.inputs import Inputs
from evomerge.recipes.routed import RoutedRecipe
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.routed.sites import Site, place_of
from evomerge.routed.trunk import trunk_of

_STEPS = 8
"""How many steps of a fit provide the items over which gates are averaged: over a hundred texts."""


def run_over_texts(recipe: RoutedRecipe, live: LiveModel, fit: Fit | None, inputs: Inputs | None) -> None:
    """Run a model on items that it may be fitted to, or else on the calibration texts of the experts.

    Raises:
        InputError: there are neither.
    """
    if fit is not None:
        for step in range(min(_STEPS, fit.steps)):
            with closing(fit.passes(live, step)) as parts:
                for part in parts:
                    del part  # only the gates are observed, nothing is learnt
        return
    if inputs is None:
        problem = "is exported as a plain model by the mean of its gates, and there are no texts to measure them on"
        raise InputError("recipe", problem, "Give `calibration` texts, or a `fit` split.")
    with torch.inference_mode():
        for expert in recipe.experts:
            for text in inputs.tokens_of(expert, live, recipe.base):
                live.model(text, use_cache=False)


def flattened(
    recipe: RoutedRecipe, sites: Sequence[Site], means: Mapping[str, Sequence[float]], sources: Mapping[str, Source]
) -> StackRecipe:
    """The plain merge for a routed recipe with these mean gates by place."""
    trunk = trunk_of(recipe, sources[recipe.base].layers)
    tensors: dict[str, Blend] = {}
    for site in sites:
        of_experts = means.get(place_of(recipe, site))
        names = [name for name, changes in zip(recipe.experts, site.changes, strict=True) if changes]
        present = [name for name in names if name in recipe.group_of(site.layer).experts]
        if of_experts is None or not present:
            continue
        weights = {name: of_experts[recipe.experts.index(name)] for name in present}
        blend = Blend(
            method="task_arithmetic", sources=tuple(present), base=recipe.base, parameters={"weight": dict(weights)}
        )
        tensors |= dict.fromkeys(_tensors(site, present, sources), blend)
    return with_tensors(trunk, tensors)


def _tensors(site: Site, experts: Sequence[str], sources: Mapping[str, Source]) -> Iterator[str]:
    """The weight of a site, and its bias if experts scale that as well."""
    yield site.weight
    bias = site.weight.removesuffix("weight") + "bias"
    if any(bias in sources[name].changes for name in experts):
        yield bias


def with_tensors(recipe: StackRecipe, tensors: Mapping[str, Blend]) -> StackRecipe:
    """A recipe with exceptions for some tensors."""
    part: Callable[[int], Blend] = recipe.blends.__getitem__
    return StackRecipe.compose(
        sources=recipe.sources,
        tokenizer=recipe.tokenizer,
        embedding=part(recipe.embedding),
        hops=((hop.layer, part(hop.attention), part(hop.mlp), part(hop.norm)) for hop in recipe.hops),
        norm=part(recipe.norm),
        head=part(recipe.head),
        tensors=tensors,
        seed=recipe.seed,
        dtype=recipe.dtype,
    )
