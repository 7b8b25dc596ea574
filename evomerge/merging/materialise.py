"""From a recipe to tensors: one code path for the live model of a search and for the exported one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from evomerge.checkpoints.live import LiveModel, load_weights
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.drops import Drops
from evomerge.merging.methods import Method
from evomerge.merging.registry import find_method
from evomerge.recipe import Blend, Recipe, Role, check_blend


def check_recipe(recipe: Recipe, sources: Mapping[str, Source]) -> None:
    """Refuse a recipe that cannot be made of these sources. Opens no tensor.

    Raises:
        InputError: an unknown method, a blend that its method cannot compute, a source that is not open, or a path that
            is not every layer of the sources once and in order.
    """
    if missing := sorted((recipe.used_sources() | {recipe.tokenizer}) - set(sources)):
        opened = ", ".join(sorted(sources))
        raise InputError(f"recipe.sources.{missing[0]}", "is not among the opened sources", f"These are: {opened}.")
    methods = {blend.method: find_method(blend.method, "recipe.blends") for blend in recipe.blends}
    for number, blend in enumerate(recipe.blends):
        _check_numbers(blend, methods[blend.method], f"recipe.blends[{number}]")
    path = [hop.layer for hop in recipe.hops]
    if path != list(range(len(path))):
        raise InputError(
            "recipe.hops",
            f"visits layers {path}",
            "Only paths that take every layer once, in order, can be made so far.",
        )
    for name in sorted(recipe.used_sources() | {recipe.tokenizer}):
        if sources[name].layers != len(path):
            raise InputError("recipe.hops", f"has {len(path)} hops, but {name} has {sources[name].layers} layers")


def _check_numbers(blend: Blend, method: Method, place: str) -> None:
    check_blend(blend, method.spec, place)
    for name, (low, high) in method.limits.items():
        value = blend.parameters[name]
        for number in value.values() if isinstance(value, dict) else (value,):
            if not low <= number <= high:
                raise InputError(f"{place}.{name}", f"is {number:g}; it must be from {low:g} to {high:g}")


def merged_tensors(
    recipe: Recipe,
    sources: Mapping[str, Source],
    roles: Mapping[str, Role],
    *,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The merged model's tensors, one at a time, in the order of ``roles``.

    Everything is computed in float32 on the CPU, where the same recipe gives the same bits on every machine of a kind,
    and cast once at the end. The memory needed is that of one tensor of every source in float32 and a few more like it.

    Args:
        recipe: as ``check_recipe`` lets it through.
        sources: at least those that the recipe uses, and its tokenizer's.
        roles: the role of every tensor to make.
        names: make only these.

    Yields:
        (name, tensor in the recipe's dtype; in that of the tokenizer's source where the recipe has none).
    """
    methods = {blend.method: find_method(blend.method, "recipe.blends") for blend in recipe.blends}
    for name, role in roles.items():
        if names is not None and name not in names:
            continue
        blend = recipe.blend_for(role)
        base = sources[blend.base].read(name) if blend.base is not None else None
        tensors = [sources[source].read(name) for source in blend.sources]
        stored = sources[recipe.tokenizer].read(name).dtype
        merged = methods[blend.method].merge(base, tensors, blend, Drops(recipe.seed, name))
        yield name, merged.to(getattr(torch, recipe.dtype) if recipe.dtype else stored)


class Materialiser:
    """Opened sources, kept for life, and the writing of recipes into a live model.

    Args:
        sources: by the names that recipes use; all of one architecture.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources

    def write(self, recipe: Recipe, live: LiveModel) -> None:
        """Write the merged model in place into ``live``, whose parameters keep their memory, device and dtype.

        Raises:
            InputError: the recipe cannot be made of these sources.
        """
        check_recipe(recipe, self._sources)
        load_weights(live, merged_tensors(recipe, self._sources, live.roles))
