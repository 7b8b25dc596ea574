"""Finds the modules that experts change, and the inputs of their routers. Opens no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from evomerge.checkpoints.adapter_changes import Change, LowRank, Vector
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.recipes.routed import RoutedRecipe

_PLAIN = "Experts are LoRA adapters of one model, or (IA)3 adapters of one, saved by peft."


@dataclass(frozen=True)
class Site:
    """A linear layer that experts change: all by low-rank matrices, or all by vectors for its inputs or outputs.

    Attributes:
        weight: its name in the sources' files.
        module: the name of the layer in the transformers model.
        layer: the layer of the stack that contains it.
        kind: "attention" or "mlp".
        block: the name of that block of its layer.
        changes: each expert's changes to it, in order; empty for experts that do not change it.
    """

    weight: str
    module: str
    layer: int
    kind: Literal["attention", "mlp"]
    block: str
    changes: tuple[tuple[Change, ...], ...]

    @property
    def form(self) -> Literal["low_rank", "inputs", "outputs"]:
        """How experts change it: its weight by low-rank matrices, or its inputs or outputs by vectors."""
        change = next(change for of_expert in self.changes for change in of_expert)
        if isinstance(change, Vector):
            return "inputs" if change.inputs else "outputs"
        return "low_rank"


@dataclass(frozen=True)
class Place:
    """The input of a router.

    Attributes:
        name: the name of the module or block that it belongs to.
        layer, kind: as for a ``Site``.
        is_block: its input is that of the block, for all modules in it.
        width: the width of its input.
        is_output: its input is the module's output, which experts scale there; otherwise the module's input.
        heads: into how many parts its input is divided, each of which is routed separately.
    """

    name: str
    layer: int
    kind: Literal["attention", "mlp"]
    is_block: bool
    width: int
    is_output: bool = False
    heads: int = 1

    def seen(self, values: Tensor) -> Tensor:
        """The router's input, given a module's input or output: [..., width], or [..., heads, width]."""
        return values if self.heads == 1 else values.view(*values.shape[:-1], self.heads, self.width)


def sites_of(recipe: RoutedRecipe, sources: Mapping[str, Source]) -> list[Site]:
    """The sites that the experts of a recipe change in its routed blocks, in the order of the model.

    Raises:
        InputError: the experts are not adapters of the recipe's base, or change something that cannot be routed.
    """
    base = sources[recipe.base]
    if base.changes or base.replaced:
        raise InputError("recipe.base", f"{recipe.base} has an adapter itself", "Name the model without it as base.")
    for name in recipe.experts:
        _check_expert(name, sources[name], recipe.base, base)
    changed = {weight for name in recipe.experts for weight in sources[name].changes}
    found = []
    for weight, role in base.roles.items():
        if weight not in changed or _goes_along(weight, base) or (recipe.where != "all" and role.kind != recipe.where):
            continue
        if role.layer is None or role.kind not in ("attention", "mlp") or base.parts[weight].cuts:
            owner = next(name for name in recipe.experts if weight in sources[name].changes)
            problem = f"{owner} changes {weight}, which is not a separate linear layer in attention or mlp"
            raise InputError("recipe.experts", problem, "Only those can be routed.")
        module = base.parts[weight].tensor.removesuffix(".weight")
        changes = tuple(tuple(sources[name].changes.get(weight, ())) for name in recipe.experts)
        site = Site(weight, module, role.layer, role.kind, _block(module, role.layer), changes)
        _check_form(site, recipe)
        found.append(site)
    if not found:
        raise InputError("recipe.experts", f"change nothing in {recipe.where} blocks")
    return found


def _goes_along(weight: str, base: Source) -> bool:
    """Whether it is the bias of a layer whose outputs are scaled including the bias."""
    return weight.endswith(".bias") and len(base.tensors[weight].shape) == 1


def _check_form(site: Site, recipe: RoutedRecipe) -> None:
    """Reject changes of several kinds at one site (InputError)."""
    every = [change for of_expert in site.changes for change in of_expert]
    kinds = {(isinstance(change, LowRank), getattr(change, "inputs", None)) for change in every}
    if len(kinds) > 1:
        problem = f"change {site.weight} in several ways: matrices, or vectors of its inputs or of its outputs"
        raise InputError("recipe.experts", problem, _PLAIN)
    if site.form != "low_rank" and recipe.router.kind in ("arrow", "spectral"):
        problem = f"{recipe.router.kind} routers follow from low-rank matrices, and experts are (IA)3 vectors"
        raise InputError("recipe.router.kind", problem, "Take `fitted` or `prototypes`.")
    stored = [isinstance(one, LowRank) and one.router is not None for of_expert in site.changes for one in of_expert]
    if recipe.router.kind == "stored" and not (all(stored) and max(map(len, site.changes)) == 1):
        problem = f"{site.weight} is changed by an expert for which no router is stored"
        hint = "Name experts of one folder of MoLA or LoRAMoE, `BASE+FOLDER#0` and so on, or take fitted routers."
        raise InputError("recipe.router.kind", problem, hint)
    if site.form == "low_rank" and recipe.router.heads:
        raise InputError("recipe.router.heads", "are of (IA)3 vectors, and experts are LoRA adapters", "Leave it out.")


def _check_expert(name: str, source: Source, base_name: str, base: Source) -> None:
    place = f"recipe.experts.{name}"
    if source.folder != base.folder:
        raise InputError(place, f"is another model than {base_name}, not an adapter of it", _PLAIN)
    if type(source) is not type(base) or type(source) is not Source:
        raise InputError(place, "its embeddings are laid out for another vocabulary", _PLAIN)
    if source.replaced:
        held = source.replaced[0]
        raise InputError(place, f"holds {held} in full (modules_to_save, or a trained bias)", _PLAIN)
    if not source.changes:
        raise InputError(place, "has no adapter", _PLAIN)
    for tensor, changes in source.changes.items():
        for change in changes:
            if not isinstance(change, LowRank | Vector):
                raise InputError(place, change.words(tensor), _PLAIN)
            if isinstance(change, LowRank) and change.magnitude is not None:
                raise InputError(place, "is a DoRA: its norms are no sum", _PLAIN)


def _block(module: str, layer: int) -> str:
    """The name of the block of a layer that contains a module: the part after the layer's number."""
    parts = module.split(".")
    return ".".join(parts[: parts.index(str(layer)) + 2])


def places_of(recipe: RoutedRecipe, sites: Sequence[Site], base: Source) -> dict[str, Place]:
    """The places of the routers of some sites, by name.

    Raises:
        InputError: the model's blocks are not separate modules.
    """
    places: dict[str, Place] = {}
    for site in sites:
        if recipe.router.per == "block":
            if site.block == site.module:
                problem = f"{site.module} is in no module of attention or mlp, which could be routed as one"
                raise InputError("recipe.router.per", problem, "Take `per: module`.")
            width = int(base.settings["hidden_size"])
            places.setdefault(site.block, Place(site.block, site.layer, site.kind, True, width))
        else:
            inputs, outputs = _widths(site, base)
            is_output = site.form == "outputs"
            by_head = recipe.router.heads and is_output and site.kind == "attention"
            heads = outputs // _head_width(base) if by_head else 1
            width = outputs // heads if is_output else inputs
            places[site.module] = Place(site.module, site.layer, site.kind, False, width, is_output, heads)
    return places


def place_of(recipe: RoutedRecipe, site: Site) -> str:
    """The name of the place whose router gates a site."""
    return site.block if recipe.router.per == "block" else site.module


def _widths(site: Site, base: Source) -> tuple[int, int]:
    """The numbers of inputs and outputs of a site's layer."""
    shape = base.tensors[site.weight].shape
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if site.weight in base.transposed else (columns, rows)


def _head_width(base: Source) -> int:
    width = base.settings.get("head_dim") or base.settings["hidden_size"] // base.settings["num_attention_heads"]
    return int(width)


def check_layers(recipe: RoutedRecipe, base: Source) -> None:
    """Reject groups that do not cover all layers of the base (InputError)."""
    if (layers := sum(group.layers for group in recipe.groups)) != base.layers:
        raise InputError("recipe.groups", f"have {layers} layers together, and {recipe.base} has {base.layers}")
