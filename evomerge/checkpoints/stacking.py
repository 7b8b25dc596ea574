"""Whether layers keep what they are in the positions of a path, that is, in the model that its configuration describes.

At another position a layer may be built differently: as another kind, because the configuration names the layers of a
kind by number, or with constants that are computed from its number. Tensors outside the stack may also have a part for
each layer. There is no list of architectures here: both models are built without memory, and compared module by module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evomerge.checkpoints.layered import INDEX_ATTRIBUTES
from evomerge.checkpoints.structure import empty_model, layer_stack, parse_config, stored_tensors, text_config
from evomerge.errors import InputError

_LENDS = "store_full_length_kv"
"""The attribute that tells whether a layer of a Gemma keeps its keys for later layers. The last layer of a kind does,
even if no later layer uses them."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class EmptyStack:
    """A model on the meta device, with its stack of layers and the stack's name."""

    model: Any
    name: str
    layers: nn.ModuleList

    @classmethod
    def of(cls, config: Mapping[str, Any], layers: int, place: str) -> EmptyStack:
        """The model of a checked config.json.

        Raises:
            InputError: transformers cannot build it, or it has no stack of ``layers`` layers.
        """
        model = empty_model(parse_config(config, place), place)
        try:
            return cls(model, *layer_stack(model, layers))
        except LookupError as error:
            hint = "Only models with a stack of layers can be merged."
            raise InputError(place, f"cannot be merged: {error}", hint) from None

    def outside(self) -> dict[str, list[int]]:
        """Shapes of the tensors outside the stack."""
        return {n: list(t.shape) for n, t in stored_tensors(self.model).items() if not n.startswith(self.name + ".")}


def path_problem(config: Mapping[str, Any], path: Sequence[tuple[EmptyStack, int]], ends: EmptyStack) -> str:
    """Why the model of ``config`` would not consist of the layers of a path; empty if it would.

    Args:
        config: the config.json to be written for the path.
        path: for each layer the model that it comes from, and its number there.
        ends: the model that gives everything outside the stack.
    """
    try:
        built = EmptyStack.of(config, len(path), "")
    except InputError as error:
        return error.problem
    if differing := next(_differences(ends.outside(), built.outside()), None):
        name, mine, theirs = differing
        return f"{name}, outside the layers, has a part for each layer: {mine}; {len(path)} layers need {theirs}"
    if problem := _image_problem(ends, [number for _, number in path]):
        return problem
    shares = bool(getattr(text_config(built.model.config), "num_kv_shared_layers", 0))
    for number, (model, layer) in enumerate(path):
        if problem := _layer_problem(model.layers[layer], layer, built.layers[number], number, shares):
            return problem
    return ""


def _image_problem(ends: EmptyStack, numbers: Sequence[int]) -> str:
    """The problem of a path that moves layers after which a model adds image features by position, as Qwen3-VL does."""
    added = len(getattr(getattr(ends.model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if list(numbers[:added]) == list(range(added)):
        return ""
    return f"it adds image features after each of its first {added} layers, which must stay there"


def _layer_problem(layer: nn.Module, own: int, built: nn.Module, number: int, shares: bool) -> str:
    """How a layer differs from the one that is built at its new position.

    Args:
        own: its number in the model that it comes from.
        built: the layer of the new model.
        number: its number there.
        shares: layers of the new model use keys of other layers.
    """
    modules, others = dict(layer.named_modules()), dict(built.named_modules())
    kinds, other_kinds = ({name: type(m).__name__ for name, m in named.items()} for named in (modules, others))
    there = f"layer {own}, moved to position {number}, would be built differently"
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
    """The attributes of a module with plain values, with "own" in place of the number of its layer."""
    settings = {key: value for key, value in vars(module).items() if not key.startswith("_") and _is_plain(value)}
    if not shares:
        settings.pop(_LENDS, None)
    return settings | {key: "own" for key in INDEX_ATTRIBUTES & settings.keys() if settings[key] == number}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ, with both values; None for a missing one."""
    for key in {**one, **other}:
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)
