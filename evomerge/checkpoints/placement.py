"""Which of a worker's devices each layer of a model lies on.

What is outside the layers (embedding, last norm, head) lies on the first device, and the layers share out all devices
in their order. A layer computes where its weights are: what it is given is moved there, which is one hidden state for
each device and forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence


def spread_layers(outside: int, layers: Sequence[int], devices: int) -> list[int]:
    """The device of each layer, counted from 0, so that the fullest device holds as little as can be.

    Args:
        outside: bytes of what is outside the layers.
        layers: bytes of each layer.
        devices: how many there are; those before the last hold no layer where what is outside is larger than a share.
    """
    choices = (_spread(layers, first, devices) for first in range(len(layers) + 1))
    return min(choices, key=lambda placed: max(device_bytes(outside, layers, placed, devices)))


def device_bytes(outside: int, layers: Sequence[int], placed: Sequence[int], devices: int) -> list[int]:
    """Bytes on each device, with layers where ``placed`` says."""
    held = [outside, *[0] * (devices - 1)]
    for size, device in zip(layers, placed, strict=True):
        held[device] += size
    return held


def _spread(layers: Sequence[int], first: int, devices: int) -> list[int]:
    """So many first layers on the first device, and the rest in equal shares on the others."""
    if devices == 1:
        return [0] * len(layers)
    rest = layers[first:]
    placed, before, total = [0] * first, 0, sum(rest)
    for size in rest:  # a layer goes where its middle is
        share = int((before + size / 2) * (devices - 1) / total)
        placed.append(1 + min(share, devices - 2))
        before += size
    return placed
