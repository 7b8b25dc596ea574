"""The layers of a live model: layer buffers, which hold weights, and a path of hops through them.

Parameter space is the simplest case: as many layer buffers as the model has layers, and a path that uses each once. A
path that repeats, skips or reorders layers needs no additional weights: a hop is a copy of the layer's modules that
shares the parameters of a layer buffer and has its own position in the KV cache (``layer_idx``; without it, cached
generation is wrong).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from evomerge.checkpoints.layered import INDEX_ATTRIBUTES, layer_settings, written_settings
from evomerge.checkpoints.parts import Part
from evomerge.checkpoints.residual import Writers
from evomerge.checkpoints.structure import text_config
from evomerge.recipes.stack import Role, renumber

LayerBuffer = Mapping[str, torch.Tensor]
"""The weights of one layer by their names inside it."""


@dataclass(frozen=True, slots=True)
class Step:
    """A hop in a live model.

    Attributes:
        layer_buffer: the layer buffer with its weights.
        like: the model's layer whose modules and settings it copies.
        factor: the factor on its blocks' outputs before they are added to the residual stream.
    """

    layer_buffer: int
    like: int
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of a layer: its name in the files, its role, and which part of which tensor inside the layer it is."""

    name: str
    role: Role
    inside: str
    part: Part


class Stack:
    """The stack of layers of a model, on one or more devices: a hop computes where its layer buffer is.

    Args:
        model: has as many layers as its configuration says; their parameters are the first layer buffers.
        name: the name of its list of layers.
        layers: that list, whose content becomes the path.
        parts, roles: those of the model's source.
        devices: the device of each layer buffer; buffers beyond the model's own layers are allocated now, on the
            devices of these layers.
        writers: where each layer writes to the residual stream; None if unknown, in which case factors are rejected.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        layers: nn.ModuleList,
        parts: Mapping[str, Part],
        roles: Mapping[str, Role],
        devices: Sequence[torch.device],
        writers: Sequence[Writers | None],
    ) -> None:
        self._config = text_config(model.config)
        self._list = layers
        self._layers = list(layers)
        self._writers = writers
        self.devices = tuple(devices)
        self.layer_buffers: list[LayerBuffer] = [layer.state_dict(keep_vars=True) for layer in self._layers]
        for number in range(len(self._layers), len(self.devices)):
            self.layer_buffers.append(_another(self.layer_buffers[number % len(self._layers)]))
        self._shapes = [{inside: t.shape for inside, t in buffer.items()} for buffer in self.layer_buffers]
        self._stored: list[list[_Stored]] = [[] for _ in self._layers]
        for stored, part in parts.items():
            role = roles[stored]
            if role.layer is not None:
                inside = part.tensor.removeprefix(f"{name}.{role.layer}.")
                self._stored[role.layer].append(_Stored(stored, role, inside, part))
        self._settings = layer_settings(self._config.to_dict(), len(self._layers))
        self._path: tuple[Step, ...] = ()
        self.lay([Step(number, number) for number in range(len(self._layers))])

    @property
    def path(self) -> tuple[Step, ...]:
        """The current hops of the model."""
        return self._path

    @property
    def depth(self) -> int:
        """How many layers the model's configuration has."""
        return len(self._layers)

    @property
    def hops(self) -> tuple[nn.Module, ...]:
        """The modules of the path, one per hop; hops that share a layer buffer have separate modules."""
        return tuple(self._list)

    def fits(self, layer_buffer: int, like: int) -> bool:
        """Whether the weights of a layer like this one fit into a layer buffer."""
        return self._shapes[like] == self._shapes[layer_buffer]

    def lay(self, path: Sequence[Step]) -> None:
        """Replace the model's layers by this path.

        Raises:
            LookupError: there is a factor other than 1, and it is unknown how to apply it.
        """
        if tuple(path) == self._path:
            return
        hops = [self._hop(number, step) for number, step in enumerate(path)]
        self._list._modules = OrderedDict((str(number), hop) for number, hop in enumerate(hops))
        self._config.num_hidden_layers = len(hops)
        said = [{key: setting.values[step.like] for key, setting in self._settings.items()} for step in path]
        for key, value in written_settings(self._settings, said).items():
            setattr(self._config, key, value)
        self._path = tuple(path)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the path by its name in the merged model; shared ones are repeated for each hop."""
        for number, step in enumerate(self._path):
            yield from self.tensors_of(number, step)

    def tensors_of(self, number: int, step: Step) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a hop by their names in the merged model, in which the hop has this number."""
        layer_buffer = self.layer_buffers[step.layer_buffer]
        for stored in self._stored[step.like]:
            yield renumber(stored.name, stored.role, number), stored.part.of(layer_buffer[stored.inside])

    def _hop(self, number: int, step: Step) -> nn.Module:
        device = self.devices[step.layer_buffer]
        hop = _sharing(self._layers[step.like], self.layer_buffers[step.layer_buffer], "", device)
        for module in hop.modules():
            for field in INDEX_ATTRIBUTES & vars(module).keys():
                if getattr(module, field) == step.like:
                    setattr(module, field, number)
        if step.factor != 1.0:
            writers = self._writers[step.like]
            if writers is None:
                raise LookupError(f"where the layers of a {self._config.model_type} write to the residual stream")
            for name in writers.modules:
                hop.get_submodule(name).register_forward_hook(partial(_scale, step.factor))
        return hop


def _another(layer_buffer: LayerBuffer) -> LayerBuffer:
    """A new layer buffer with the same shapes."""
    return {
        inside: nn.Parameter(t.detach().clone(), False) if isinstance(t, nn.Parameter) else t.clone()
        for inside, t in layer_buffer.items()
    }


def _sharing(module: nn.Module, layer_buffer: LayerBuffer, prefix: str, device: torch.device) -> nn.Module:
    """A copy of a module and its submodules, with its own hooks and the parameters of the layer buffer.

    Args:
        device: the layer buffer's device, to which buffers that are not stored in files are moved.
    """
    same_as = copy.copy(module)
    same_as._forward_hooks = OrderedDict()
    same_as._forward_hooks_with_kwargs = OrderedDict()
    same_as._forward_hooks_always_called = OrderedDict()
    same_as._parameters = {
        name: None if parameter is None else layer_buffer[prefix + name]  # type: ignore[misc]
        for name, parameter in module._parameters.items()
    }
    same_as._buffers = {
        name: layer_buffer.get(prefix + name, None if buffer is None else buffer.to(device))
        for name, buffer in module._buffers.items()
    }
    same_as._modules = {
        name: None if child is None else _sharing(child, layer_buffer, f"{prefix}{name}.", device)
        for name, child in module._modules.items()
    }
    return same_as


def _scale(factor: float, module: nn.Module, given: Any, output: Any) -> Any:
    """Multiply the output of a module that writes to the residual stream; for a tuple, its first element."""
    if isinstance(output, tuple):
        return (output[0] * factor, *output[1:])
    return output * factor
