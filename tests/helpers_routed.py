"""Experts on a tiny model for the tests of routed recipes: random adapters, random routers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.live import LiveModel, live_model
from evomerge.checkpoints.source import Source, open_source
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.routed import LayerGroup, RoutedRecipe, Router
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.routed import computing
from evomerge.routed.live import LiveExperts
from evomerge.routed.routers import routings
from evomerge.routed.sites import Place, places_of, sites_of
from evomerge.routed.trunk import base_alone

CPU = torch.device("cpu")
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = torch.arange(3, 21).reshape(3, 6)

MakeRouter = Callable[[Place, int], computing.Router]


def opened(base: Path, **adapters: Path) -> dict[str, Source]:
    named = {"base": str(base)} | {name: f"{base}+{folder}" for name, folder in adapters.items()}
    return {name: open_source(name, reference, place=f"sources.{name}") for name, reference in named.items()}


def routed(sources: Mapping[str, Source], *, group: Mapping[str, Any] | None = None, **changes: Any) -> RoutedRecipe:
    """A recipe with all adapters as experts in all layers, with a softmax over all; by default with Arrow routers."""
    experts = tuple(name for name in sources if name != "base")
    groups = (LayerGroup(layers=sources["base"].layers, experts=experts, **(group or {})),)
    settings: dict[str, Any] = {"router": Router(kind="arrow"), "groups": groups, **changes}
    return RoutedRecipe(
        sources={name: source.reference for name, source in sources.items()},
        tokenizer="base",
        base="base",
        experts=experts,
        **settings,
    )


def random_routers(seed: int = 0, size: float = 1.0) -> MakeRouter:
    """Random linear routers."""

    def make(place: Place, experts: int) -> computing.Router:
        numbers = torch.Generator().manual_seed(seed + hash_of(place.name))
        weight = size * torch.randn(experts, place.width, generator=numbers)
        return computing.Router("linear", weight, 0.3 * torch.randn(experts, generator=numbers))

    return make


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**number for number, letter in enumerate(name)) % 10_007


def zeros(place: Place, experts: int) -> computing.Router:
    return computing.Router("linear", torch.zeros(experts, place.width), torch.zeros(experts))


def loaded(sources: Mapping[str, Source], recipe: StackRecipe, dtype: torch.dtype = torch.float32) -> LiveModel:
    live = live_model(sources["base"], CPU, dtype)
    Materialiser(sources).write(recipe, live)
    return live


def merge(sources: Mapping[str, Source], **weights: float) -> LiveModel:
    """The base with a weighted sum of adapters folded into its weights."""
    blend = Blend(method="task_arithmetic", sources=tuple(weights), base="base", parameters={"weight": weights})
    recipe = StackRecipe.uniform(
        blend,
        sources={name: source.reference for name, source in sources.items()},
        tokenizer="base",
        layers=sources["base"].layers,
    )
    return loaded(sources, recipe)


@contextmanager
def routing(
    sources: Mapping[str, Source], recipe: RoutedRecipe, make: MakeRouter = zeros, dtype: torch.dtype = torch.float32
) -> Iterator[LiveModel]:
    """The base with experts added, gated by routers from ``make``."""
    base = sources["base"]
    live = loaded(sources, base_alone(recipe, base.layers), dtype)
    sites = sites_of(recipe, sources)
    places = places_of(recipe, sites, base)
    count = len(recipe.experts) + recipe.router.base_expert
    routers = {name: make(place, count) for name, place in places.items()}
    with LiveExperts(live, sites, recipe.experts).install(recipe, places, routings(recipe, places, routers)):
        yield live


@torch.inference_mode()
def logits(live: LiveModel, prompts: Tensor = PROMPTS, **given: Any) -> Tensor:
    found: Tensor = live.model(prompts, use_cache=False, **given).logits
    return found.float()
