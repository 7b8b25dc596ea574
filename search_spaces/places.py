"""The places of a model from coarse to fine: the whole, halves of its depth, halves of these, down to single layers."""

from __future__ import annotations

MODEL, OUTSIDE = "model", "outside the layers"


def path_outside(group: str) -> tuple[str, ...]:
    """The places of a part outside the layers, from the whole model to the part itself."""
    return (MODEL, OUTSIDE, group)


def path_to(layer: int, layers: int, size: int = 1) -> tuple[str, ...]:
    """The places of a layer, from the whole model to its group of ``size`` layers.

    Groups are never divided; the second half of an odd number of groups has one more.
    """
    first, last = 0, -(-layers // size)  # in groups
    unit, path = layer // size, [MODEL]
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (first, middle) if unit < middle else (middle, last)
        path.append(layers_name(first * size, min(last * size, layers)))
    return tuple(path) if len(path) > 1 else (MODEL, layers_name(0, layers))


def layers_name(begin: int, end: int) -> str:
    """The name of layers from ``begin`` to before ``end``: layers.4-7, layers.4."""
    return f"layers.{begin}" if end - begin == 1 else f"layers.{begin}-{end - 1}"
