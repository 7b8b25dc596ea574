"""Assigns the layers of a model to the devices of a worker.

Modules outside the layers (embedding, final norm, head) are on the first device, and the layers are spread over all
devices in order. A layer computes where its weights are: its inputs are moved there, which is one hidden state per
device and forward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

Devices: TypeAlias = torch.device | Sequence[torch.device]
"""A device, or several that the layers of a model are spread over."""


def as_devices(devices: Devices) -> tuple[torch.device, ...]:
    """One or more devices as a tuple, each with an index: ``cuda`` is the current one."""
    several = (devices,) if isinstance(devices, torch.device) else tuple(devices)
    return tuple(_numbered(device) for device in several)


def _numbered(device: torch.device) -> torch.device:
    if ":" in str(device) or device.type in ("cpu", "meta"):
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def place_model(model: Any, layers: nn.ModuleList, devices: Sequence[torch.device], buffers: int) -> list[torch.device]:
    """Move a model to its devices; tensors on the meta device get uninitialised memory.

    Args:
        layers: the model's stack.
        buffers: the number of layer buffers; those beyond the layers are placed on the devices of the layers.

    Returns:
        The device of each layer buffer.
    """
    sizes = [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in layers]
    outside = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - sum(sizes)
    placed = [devices[number] for number in place_buffers(outside, sizes, max(buffers, len(layers)), len(devices))]
    homes = {module: placed[number] for number, layer in enumerate(layers) for module in layer.modules()}
    for module in model.modules():
        _move(module, homes.get(module, devices[0]))
    model.tie_weights()  # newly allocated memory is separate for every module
    if len(devices) > 1:
        compute_where_weights_are(model, layers)
    return placed


def compute_where_weights_are(model: Any, layers: nn.ModuleList) -> None:
    """Make each layer, and each module outside them with its own weights, move its inputs to the weights' device."""
    inside = {module for layer in layers for module in layer.modules()}
    outside = [m for m in model.modules() if m not in inside and (m._parameters or m._buffers)]
    for module in [*layers, *outside]:
        module.register_forward_pre_hook(_to_weights, with_kwargs=True)


def _move(module: nn.Module, device: torch.device) -> None:
    """Move the tensors of a module, but not those of its submodules."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(moved(parameter.data), requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = moved(buffer)


def _to_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Move a module's inputs to the device of its weights."""
    weights = next(itertools.chain(module.parameters(), module.buffers()), None)
    return (args, kwargs) if weights is None else (_on(args, weights.device), _on(kwargs, weights.device))


def _on(given: Any, device: torch.device) -> Any:
    """Move tensors in tuples, lists and dictionaries to a device; everything else, such as a cache, is unchanged."""
    if isinstance(given, torch.Tensor):
        return given.to(device, non_blocking=True)
    if type(given) in (tuple, list):
        return type(given)(_on(part, device) for part in given)
    if type(given) is dict:
        return {key: _on(part, device) for key, part in given.items()}
    return given


def place_buffers(outside: int, layers: Sequence[int], buffers: int, devices: int) -> list[int]:
    """The device of each layer buffer, counted from 0; those beyond the model's layers go to these layers' devices.

    Layers with the same index, whichever source they come from, are thus on the same device, and a path moves between
    devices about as often as a plain model does.

    Args:
        outside: bytes of the modules outside the layers.
        layers: bytes of each layer of the model.
        buffers: the number of layer buffers, at least the number of layers.
        devices: the number of devices.
    """
    own = len(layers)
    shares = [size * len(range(number, buffers, own)) for number, size in enumerate(layers)]
    placed = spread_layers(outside, shares, devices)
    return [placed[number % own] for number in range(buffers)]


def spread_layers(outside: int, layers: Sequence[int], devices: int) -> list[int]:
    """The device of each layer, counted from 0, such that the fullest device holds as little as possible.

    Args:
        outside: bytes of the modules outside the layers.
        layers: bytes of each layer.
        devices: the number of devices; the first gets no layers if the modules outside exceed its share.
    """
    choices = (_spread(layers, first, devices) for first in range(len(layers) + 1))
    return min(choices, key=lambda placed: max(device_bytes(outside, layers, placed, devices)))


def device_bytes(outside: int, layers: Sequence[int], placed: Sequence[int], devices: int) -> list[int]:
    """Bytes on each device if layers are placed according to ``placed``."""
    held = [outside, *[0] * (devices - 1)]
    for size, device in zip(layers, placed, strict=True):
        held[device] += size
    return held


def _spread(layers: Sequence[int], first: int, devices: int) -> list[int]:
    """Put the given number of first layers on the first device, and the rest in equal shares on the others."""
    if devices == 1:
        return [0] * len(layers)
    rest = layers[first:]
    placed, before, total = [0] * first, 0, sum(rest)
    for size in rest:  # a layer goes to the share that contains its middle
        share = int((before + size / 2) * (devices - 1) / total)
        placed.append(1 + min(share, devices - 2))
        before += size
    return placed
