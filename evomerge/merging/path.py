"""The layers of a merged model: their tensors, which tensor of a source each is made from, and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints.differences import differences
from evomerge.checkpoints.layered import with_text_settings, written_settings
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.site import Ref, Site
from evomerge.method import find_method, is_copy
from evomerge.recipes.stack import Blend, Hop, Role, StackRecipe, renumber


@dataclass(frozen=True, slots=True)
class Merged:
    """One tensor of the merged model.

    Attributes:
        name: its name in the tokenizer's source, with the number of the hop in place of the layer's.
        role: with the number of the hop for its layer.
        stored: its name in a source that has it.
        origin: its role in that source, with the number of the layer.
    """

    name: str
    role: Role
    stored: str
    origin: Role


def merged_tensors(recipe: StackRecipe, sources: Mapping[str, Source]) -> list[Merged]:
    """All tensors of a recipe's model, in the order of the tokenizer's source, layers in the order of the path."""
    merged: list[Merged] = []
    path_done = False
    for name, role in sources[recipe.tokenizer].roles.items():
        if role.layer is None:
            merged.append(Merged(name, role, name, role))
        elif not path_done:
            path_done = True
            for number in range(len(recipe.hops)):
                merged += _hop(recipe, number, sources)
    return merged


def _hop(recipe: StackRecipe, number: int, sources: Mapping[str, Source]) -> list[Merged]:
    hop = recipe.hops[number]
    source = giver(hop, recipe)
    layer = hop.layer_of(source)
    return [
        Merged(renumber(name, role, number), Role(role.kind, number), name, role)
        for name, role in sources[source].roles.items()
        if role.layer == layer
    ]


def giver(hop: Hop, recipe: StackRecipe) -> str:
    """The source whose layer determines a hop's tensors; the tokenizer's source may not have that many layers."""
    return recipe.blends[hop.attention].sources[0]


def site_of(merged: Merged, recipe: StackRecipe, blend: Blend, sources: Mapping[str, Source]) -> Site:
    """What the method of a blend plans for."""
    names = (*((blend.base,) if blend.base is not None else ()), *blend.sources)
    refs = {name: _ref(merged, recipe, name) for name in names}
    source, stored = refs[names[-1]]
    shape = tuple(sources[source].tensors[stored].shape)
    return Site(merged.stored, merged.role, shape, refs, input_axis=0 if stored in sources[source].transposed else 1)


def _ref(merged: Merged, recipe: StackRecipe, source: str) -> Ref:
    """The tensor of a source that a merged tensor is made from."""
    if merged.role.layer is None:
        return source, merged.stored
    return source, renumber(merged.stored, merged.origin, recipe.hops[merged.role.layer].layer_of(source))


def configured_by(recipe: StackRecipe, sources: Mapping[str, Source]) -> str:
    """The source whose configuration a recipe's model has: the one that gives the tokenizer.

    A copy of another source equals that source only with its own settings, if the differences affect computation.
    """
    first = recipe.blends[0]
    name = first.sources[0]
    copies = recipe.blends == (first,) and is_copy(first) and not recipe.is_scaled
    copies = copies and not sources[recipe.tokenizer].takes_images  # image parts are the tokenizer's source's own
    whole = [hop.layer_of(name) for hop in recipe.hops] == list(range(sources[name].layers)) if copies else False
    return name if whole and differences(sources[recipe.tokenizer], sources[name]) else recipe.tokenizer


def is_plain(recipe: StackRecipe, sources: Mapping[str, Source]) -> bool:
    """Whether the path consists of the layers of the configuration's source, each in its place."""
    name = configured_by(recipe, sources)
    return [hop.layer for hop in recipe.hops] == list(range(sources[name].layers))


def is_made_in_order(recipe: StackRecipe) -> bool:
    """Whether a blend's method needs the inputs of layers behind the merged layers before them."""
    return any(needs_merged_inputs(blend) for blend in recipe.blends)


def needs_merged_inputs(blend: Blend) -> bool:
    """Whether the method of a blend needs a layer's inputs behind the merged layers before it."""
    return "merged_inputs" in find_method(blend.method, "recipe.blends").needs


def check_order(recipe: StackRecipe, sources: Mapping[str, Source]) -> None:
    """Refuse layers that must be made from their inputs but are not in their places.

    Raises:
        InputError: naming the method.
    """
    blend = next((blend for blend in recipe.blends if needs_merged_inputs(blend)), None)
    if blend is None or (is_plain(recipe, sources) and not recipe.is_scaled):
        return
    problem = (
        f"{blend.method} makes each layer from the outputs of the merged layers before it: each in its place, unscaled"
    )
    raise InputError("recipe.hops", problem, "Search over weights alone: `kind: parameter_space`.")


def merged_config(recipe: StackRecipe, sources: Mapping[str, Source]) -> dict[str, Any]:
    """The config.json of the merged model: a source's, with the merged dtype and the path's layers."""
    model = sources[configured_by(recipe, sources)]
    config = {key: value for key, value in model.config.items() if key not in ("_name_or_path", "torch_dtype")}
    config["dtype"] = recipe.dtype or str(sources[recipe.tokenizer].dtype).removeprefix("torch.")
    if is_plain(recipe, sources):
        return config
    givers = [(sources[name], hop.layer_of(name)) for hop in recipe.hops for name in [giver(hop, recipe)]]
    said = [
        {key: source.layered.get(key, setting).values[layer] for key, setting in model.layered.items()}
        for source, layer in givers
    ]
    laid = {model.settings["depth"]: len(recipe.hops), **written_settings(model.layered, said)}
    return with_text_settings(config, laid)


def check_places(recipe: StackRecipe, sources: Mapping[str, Source]) -> None:
    """Refuse a path whose layers would be built differently in their new places. Builds models without memory.

    Raises:
        InputError: naming the difference.
    """
    from evomerge.checkpoints.stacking import EmptyStack, path_problem  # which imports transformers

    givers = [giver(hop, recipe) for hop in recipe.hops]
    stacks = {
        name: EmptyStack.of(sources[name].config, sources[name].layers, sources[name].place)
        for name in {recipe.tokenizer, *givers}
    }
    path = [(stacks[name], hop.layer_of(name)) for name, hop in zip(givers, recipe.hops, strict=True)]
    if problem := path_problem(merged_config(recipe, sources), path, stacks[recipe.tokenizer]):
        kind = sources[recipe.tokenizer].config["model_type"]
        raise InputError(
            "recipe.hops",
            f"this path of {len(path)} layers cannot be made of a {kind}: {problem}",
            "Keep all layers in their places, and merge only weights.",
        )
