"""The tensors of a mixture, and what each is made from."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.layer_buffers import Made, tensors_made
from evomerge.mixture.architectures import ARCHITECTURES, Names, check_architecture, mixture_config
from evomerge.recipes.mixture import BIASED, MixtureRecipe
from evomerge.recipes.stack import StackRecipe

if TYPE_CHECKING:
    from evomerge.checkpoints.parts import Part


HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Skeleton:
    """A mixture's model without weights.

    Attributes:
        config: its config.json.
        parsed: the same, as parsed by transformers.
        parts: the tensors in its files, by name, and the part of the model that each is.
        shapes: their shapes.
        float32: those that are float32 whatever the model's dtype.
    """

    config: Mapping[str, Any]
    parsed: Any
    parts: Mapping[str, Part]
    shapes: Mapping[str, tuple[int, ...]]
    float32: frozenset[str]


def model_dtype(recipe: MixtureRecipe, source: Source) -> torch.dtype:
    """The dtype of most of an exported mixture's weights."""
    dtype: torch.dtype = source.dtype if recipe.dtype is None else getattr(torch, recipe.dtype)
    return dtype


def config_of(recipe: MixtureRecipe, source: Source) -> dict[str, Any]:
    """The config.json of a recipe's model."""
    return mixture_config(
        recipe.architecture,
        source,
        experts=len(recipe.slots),
        top_k=recipe.top_k,
        normalised=recipe.normalised,
        shared=recipe.shared is not None,
        dtype=str(model_dtype(recipe, source)).removeprefix("torch."),
    )


def skeleton_of(config: Mapping[str, Any], place: str) -> Skeleton:
    """The model for a mixture's config.json, built without memory.

    Raises:
        InputError: transformers cannot build it.
    """
    from evomerge.checkpoints.layout import checkpoint_parts
    from evomerge.checkpoints.structure import empty_model, loaded_in_float32, parse_config, stored_tensors

    parsed = parse_config(config, place)
    model = empty_model(parsed, place, torch.bfloat16)
    parts, stored = checkpoint_parts(model), stored_tensors(model)
    wide = loaded_in_float32(model, torch.bfloat16) | {n for n, t in stored.items() if t.dtype == torch.float32}
    return Skeleton(
        config=config,
        parsed=parsed,
        parts=parts,
        shapes={name: tuple(part.of(stored[part.tensor]).shape) for name, part in parts.items()},
        float32=frozenset(name for name, part in parts.items() if part.tensor in wide),
    )


@dataclass(frozen=True)
class Cell:
    """A tensor of a mixture that is made from the sources, or is constant.

    Attributes:
        name: its name in the files.
        made: the corresponding tensor of a dense model; None if it is zero.
        recipe: the recipe of that dense model.
        factor: its factor.
    """

    name: str
    made: Made | None = None
    recipe: StackRecipe | None = None
    factor: float = 1.0

    @property
    def is_slot(self) -> bool:
        """Whether it belongs to one slot, and others correspond to the same dense tensor."""
        return ".experts." in self.name

    @property
    def way(self) -> Hashable:
        """Everything that determines it except the sources."""
        return None if self.made is None else (self.made.way, self.factor)


def cells_of(recipe: MixtureRecipe, skeleton: Skeleton, sources: Mapping[str, Source]) -> list[Cell]:
    """All tensors of a mixture except those of its routers, in the order of its files."""
    names = ARCHITECTURES[recipe.architecture]
    slots = [recipe.dense(slot) for slot in recipe.slots]
    made_of = [_by_name(dense, sources) for dense in slots]
    shared = None if recipe.shared is None else recipe.dense(None)
    made_of_shared = {} if shared is None else _by_name(shared, sources)
    expert, beside = _patterns(names)
    cells = []
    for name in skeleton.parts:
        if match := expert.fullmatch(name):
            layer, number, weight = int(match[1]), int(match[2]), match[3]
            there = recipe.slots[number] in recipe.group_of(layer).slots
            dense_name = f"model.layers.{layer}.mlp.{_dense(names, weight)}.weight"
            cells.append(Cell(name, made_of[number][dense_name], slots[number]) if there else Cell(name))
        elif match := beside.fullmatch(name) if names.shared is not None else None:
            if shared is None or recipe.shared is None:
                cells.append(Cell(name))
                continue
            # The gate of a qwen2_moe's shared expert is zero, so its sigmoid is one half.
            twice = 2.0 if recipe.architecture == "qwen2_moe" else 1.0
            factor = twice * recipe.shared.scale if match[2] == "down_proj" else 1.0
            cells.append(Cell(name, made_of_shared[f"model.layers.{match[1]}.mlp.{match[2]}.weight"], shared, factor))
        elif not _is_of_router(name):
            made = made_of[0].get(name)
            if made is None and name == HEAD:  # the architecture never ties it to the embedding
                made = made_of[0][_EMBEDDING]
            cells.append(Cell(name, made, None if made is None else slots[0]))
    return cells


def _by_name(recipe: StackRecipe, sources: Mapping[str, Source]) -> dict[str, Made]:
    outside, hops = tensors_made(recipe, sources)
    return {made.merged.name: made for some in (outside, *hops) for made in some}


def _patterns(names: Names) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns for (layer, number, weight) of an expert's tensor, and (layer, weight) of a shared expert's."""
    block = rf"model\.layers\.(\d+)\.{names.block}\."
    return re.compile(rf"{block}experts\.(\d+)\.(\w+)\.weight"), re.compile(rf"{block}{names.shared}\.(\w+)\.weight")


def _dense(names: Names, weight: str) -> str:
    return next(dense for dense, classic in names.weights.items() if classic == weight)


def _is_of_router(name: str) -> bool:
    return name.endswith((".gate.weight", ".gate.e_score_correction_bias"))


def dtype_of(cell: Cell, recipe: MixtureRecipe, skeleton: Skeleton, source: Source) -> torch.dtype:
    """The dtype in which a tensor is exported."""
    if cell.name in skeleton.float32:
        return torch.float32
    dtype = model_dtype(recipe, source)
    if cell.made is None or cell.made.merged.stored not in source.tensors:
        return dtype
    return source.dtype_of(cell.made.merged.stored, None if recipe.dtype is None else dtype, dtype)


def check_mixture(recipe: MixtureRecipe, sources: Mapping[str, Source]) -> None:
    """Reject a mixture that cannot be made from these sources. Opens no tensors, and does not check blends.

    Raises:
        InputError: naming the part of the recipe.
    """
    model = sources[recipe.tokenizer]
    check_architecture(recipe.architecture, model)
    if recipe.layers != model.layers:
        raise InputError("recipe.groups", f"are {recipe.layers} layers, and {model.name} has {model.layers}")
    if recipe.architecture == "mixtral" and not recipe.normalised:
        raise InputError("recipe.normalised", "is false, and a mixtral always divides gates by their sum")
    if recipe.shared is not None and ARCHITECTURES[recipe.architecture].shared is None:
        fitting = [name for name, names in ARCHITECTURES.items() if names.shared is not None]
        problem = f"a {recipe.architecture} has no expert that computes every token"
        raise InputError("recipe.shared", problem, f"These have: {', '.join(fitting)}.")


def needed_bytes(model: Source, experts: int, shared: bool, *, untied: bool = False) -> int:
    """Bytes of a mixture's weights: those of the dense model, with one copy of its mlps per expert.

    Args:
        untied: it has a separate head, whether or not the dense model has one.
    """
    whole = sum(entry.end - entry.begin for entry in model.tensors.values())
    if untied and HEAD not in model.tensors:
        whole += model.tensors[_EMBEDDING].end - model.tensors[_EMBEDDING].begin
    mlps = sum(e.end - e.begin for name, e in model.tensors.items() if model.roles[name].kind == "mlp")
    return whole + mlps * (experts - 1 + shared)


def has_bias(recipe: MixtureRecipe) -> bool:
    """Whether its routers have a selection bias for each expert."""
    return recipe.architecture == BIASED
