"""Whether the model that a configuration describes has the layers of a path, each as it is where it comes from.

A layer may be built otherwise in another place: as another kind, because the configuration says by number which layers
are of it, or with constants that are computed from its number. And tensors outside the stack may have a part for each
layer. No list of architectures is kept: both models are built without memory, and compared module by module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evomerge.checkpoints.layered import PLACES
from evomerge.checkpoints.structure import empty_model, layer_stack, parse_config, stored_tensors, text_config
from evomerge.errors import InputError

_LENDS = "store_full_length_kv"
"""Whether a layer of a Gemma keeps its keys for later ones: the last of its kind does, also where none needs them."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class EmptyStack:
    """A model without memory, with its stack of layers and what they are called."""

    model: Any
    name: str
    layers: nn.ModuleList

    @classmethod
    def of(cls, config: Mapping[str, Any], layers: int, place: str) -> EmptyStack:
        """That of a checked config.json.

        Raises:
            InputError: transformers cannot build it, or it has no stack of so many layers.
        """
        model = empty_model(parse_config(config, place), place)
        try:
            return cls(model, *layer_stack(model, layers))
        except LookupError as error:
            hint = "Only models that are a stack of layers can be."
            raise InputError(place, f"cannot be merged: {error}", hint) from None

    def outside(self) -> dict[str, list[int]]:
        """Shapes of the tensors outside the stack."""
        return {n: list(t.shape) for n, t in stored_tensors(self.model).items() if not n.startswith(self.name + ".")}


def path_problem(config: Mapping[str, Any], path: Sequence[tuple[EmptyStack, int]], ends: EmptyStack) -> str:
    """What keeps the model of ``config`` from being a path of layers; empty where nothing does.

    Args:
        config: the config.json that is to be written for the path.
        path: for each layer the model that it is of, and its number there.
        ends: the model that gives all that is outside the stack.
    """
    try:
        built = EmptyStack.of(config, len(path), "")
    except InputError as error:
        return error.problem
    if differing := next(_differences(ends.outside(), built.outside()), None):
        name, mine, theirs = differing
        return f"{name}, outside the layers, has a part for each layer: {mine}; {len(path)} layers ask for {theirs}"
    if problem := _seen_between(ends, [number for _, number in path]):
        return problem
    shares = bool(getattr(text_config(built.model.config), "num_kv_shared_layers", 0))
    for number, (model, layer) in enumerate(path):
        if problem := _layer_problem(model.layers[layer], layer, built.layers[number], number, shares):
            return problem
    return ""


def _seen_between(ends: EmptyStack, numbers: Sequence[int]) -> str:
    """That a path moves layers between which a model adds what it sees of an image, as Qwen3-VL does by their place."""
    added = len(getattr(getattr(ends.model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if list(numbers[:added]) == list(range(added)):
        return ""
    return f"it adds what it sees of an image behind each of its first {added} layers, which must stay there"


def _layer_problem(layer: nn.Module, own: int, built: nn.Module, number: int, shares: bool) -> str:
    """How a layer differs from what is built where it is put; ``shares`` says that layers use keys of others."""
    modules, others = dict(layer.named_modules()), dict(built.named_modules())
    kinds, other_kinds = ({name: type(m).__name__ for name, m in named.items()} for named in (modules, others))
    there = f"layer {own}, where it is put (as layer {number}), would be built otherwise"
    if differing := next(_differences(kinds, other_kinds), None):
        name, mine, theirs = differing
        return f"{there}: {name or 'it'} as {theirs or 'nothing'}, not as {mine or 'nothing'}"
    shapes, other_shapes = ({n: list(t.shape) for n, t in m.state_dict().items()} for m in (layer, built))
    if differing := next(_differences(shapes, other_shapes), None):
        name, mine, theirs = differing
        return f"{there}: {name} with shape {theirs or 'none'}, not {mine or 'none'}"
    for name, module in modules.items():
        settings, other_settings = _settings(module, own, shares), _settings(others[name], number, shares)
        if differing := next(_differences(settings, other_settings), None):
            key, mine, theirs = differing
            return f"{there}: {'.'.join(part for part in (name, key) if part)} is {theirs} there, not {mine}"
    return ""


def _settings(module: nn.Module, number: int, shares: bool) -> dict[str, Any]:
    """The plain values that a module keeps, with "own" for the number of its layer."""
    settings = {key: value for key, value in vars(module).items() if not key.startswith("_") and _is_plain(value)}
    if not shares:
        settings.pop(_LENDS, None)
    return settings | {key: "own" for key in PLACES & settings.keys() if settings[key] == number}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ, with both; None stands for none."""
    for key in {**one, **other}:
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)
