"""The tensors of a merged model: their names, what they are, and which tensor of a source each is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.checkpoints.source import Source
from evomerge.merging.statistics import Ref
from evomerge.recipe import Hop, Recipe, Role, renumber


@dataclass(frozen=True, slots=True)
class Merged:
    """One tensor of the merged model.

    Attributes:
        name: as the tokenizer's source names it, with the number of the hop in the layer's place.
        role: with the number of the hop for its layer.
        stored: its name in a source that has it.
        origin: its role in that source, with the number of the layer.
    """

    name: str
    role: Role
    stored: str
    origin: Role


def merged_tensors(recipe: Recipe, sources: Mapping[str, Source]) -> list[Merged]:
    """All tensors of a recipe's model, in the order of the tokenizer's source, layers in the order of the path."""
    found: list[Merged] = []
    path_done = False
    for name, role in sources[recipe.tokenizer].roles.items():
        if role.layer is None:
            found.append(Merged(name, role, name, role))
        elif not path_done:
            path_done = True
            for number in range(len(recipe.hops)):
                found += _hop(recipe, number, sources)
    return found


def _hop(recipe: Recipe, number: int, sources: Mapping[str, Source]) -> list[Merged]:
    hop = recipe.hops[number]
    source = giver(hop, recipe)
    layer = hop.layer_of(source)
    return [
        Merged(renumber(name, role, number), Role(role.kind, number), name, role)
        for name, role in sources[source].roles.items()
        if role.layer == layer
    ]


def giver(hop: Hop, recipe: Recipe) -> str:
    """The source whose layer says what tensors a hop has; the tokenizer's source may not have that many layers."""
    return recipe.blends[hop.attention].sources[0]


def ref(merged: Merged, recipe: Recipe, source: str) -> Ref:
    """The tensor of a source that a merged tensor is made from."""
    if merged.role.layer is None:
        return source, merged.stored
    return source, renumber(merged.stored, merged.origin, recipe.hops[merged.role.layer].layer_of(source))
