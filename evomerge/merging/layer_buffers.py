"""Which layer buffer of a live model holds which hop of a recipe, so that as little as possible is rewritten."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.path import Merged, giver, is_made_in_order, merged_tensors, needs_merged_inputs
from evomerge.recipes.stack import Blend, StackRecipe, renumber

if TYPE_CHECKING:  # needs transformers, which takes seconds to import
    from evomerge.checkpoints.stack import Stack, Step

Held = dict[str, Hashable]
"""The content of a layer buffer: for each tensor, by its name in a first layer, everything it was made from."""


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor of a recipe's model.

    Attributes:
        merged: the tensor.
        place: its name; in a layer, that of the same tensor in a first layer.
        way: everything that it depends on except the sources; equal ways give equal tensors.
    """

    merged: Merged
    place: str
    way: Hashable


def tensors_made(recipe: StackRecipe, sources: Mapping[str, Source]) -> tuple[list[Made], list[list[Made]]]:
    """The tensors outside the stack of layers, and those of each hop."""
    blends = [blend.model_dump_json() for blend in recipe.blends]
    layers = [hop.layer if isinstance(hop.layer, int) else tuple(sorted(hop.layer.items())) for hop in recipe.hops]
    outside: list[Made] = []
    hops: list[list[Made]] = [[] for _ in recipe.hops]
    for merged in merged_tensors(recipe, sources):
        number = recipe.blend_number(merged.role, merged.name)
        if number is None:
            blend = recipe.tokenizer
        else:
            blend = _unchanged(merged, recipe.blends[number], sources) or blends[number]
        if merged.role.layer is None:
            outside.append(Made(merged, merged.name, (blend, recipe.seed)))
        else:
            place = renumber(merged.stored, merged.origin, 0)
            hops[merged.role.layer].append(Made(merged, place, (blend, layers[merged.role.layer], recipe.seed)))
    return outside, list(_in_order(recipe, outside, hops)) if is_made_in_order(recipe) else hops


def _in_order(recipe: StackRecipe, outside: Sequence[Made], hops: Sequence[list[Made]]) -> Iterator[list[Made]]:
    """The hops, if tensors of some also depend on everything before them."""
    before = _digest("", outside)
    for hop in hops:
        made_so = [
            replace(made, way=(made.way, before))
            if needs_merged_inputs(recipe.blend_for(made.merged.role, made.merged.name))
            else made
            for made in hop
        ]
        before = _digest(before, made_so)
        yield made_so


def _digest(before: str, made: Sequence[Made]) -> str:
    return hashlib.sha256(repr((before, [(one.place, one.way) for one in made])).encode()).hexdigest()


def _unchanged(merged: Merged, blend: Blend, sources: Mapping[str, Source]) -> str | None:
    """The base whose tensor it is, if no adapter changes it in core space; None if the blend makes it."""
    if blend.basis is None or any(merged.stored in sources[name].changes for name in blend.sources):
        return None
    return blend.base


def assign(recipe: StackRecipe, hops: Sequence[Sequence[Made]], stack: Stack, held: Sequence[Held]) -> list[Step]:
    """A layer buffer for every hop: one that already holds its layer, or a free one.

    Equal hops share one. Empty buffers are filled first, so that if there are enough for every source, all layers are
    written once. Otherwise a hop gets one on the device of the layer that it resembles, and the one with its own number
    if possible, so that a search over weights alone finds each layer where it was and writes only the tensors that
    differ.

    Args:
        hops: the tensors of each.
        held: what each layer buffer holds.

    Raises:
        InputError: there are not enough layer buffers.
    """
    from evomerge.checkpoints.stack import Step

    contents = [frozenset((made.place, made.way) for made in hop) for hop in hops]
    there = {frozenset(content.items()): layer_buffer for layer_buffer, content in enumerate(held)}
    taken = {content: there[content] for content in contents if content in there}
    free = [layer_buffer for layer_buffer in range(len(stack.layer_buffers)) if layer_buffer not in taken.values()]
    path = []
    for number, (hop, content, factor) in enumerate(zip(recipe.hops, contents, recipe.factors, strict=True)):
        like = min(hop.layer_of(giver(hop, recipe)), stack.depth - 1)
        if content not in taken:
            fitting = [buffer for buffer in free if stack.fits(buffer, like)]
            if not fitting:
                problem = (
                    f"is made of {len(set(contents))} different layers; the live model holds {len(stack.layer_buffers)}"
                )
                raise InputError("recipe.hops", problem, "Export it to a folder.")
            # Prefer an empty buffer to one whose layer may be needed again, and the hop's own to others.
            *_, taken[content] = min(
                (bool(held[buffer]), stack.devices[buffer] != stack.devices[like], buffer != number, buffer)
                for buffer in fitting
            )
            free.remove(taken[content])
        path.append(Step(taken[content], like, factor))
    return path
