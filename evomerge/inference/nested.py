"""Nested lists of tensors, as returned by vision towers: one per picture, or one list of pictures per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested lists with every tensor replaced."""
    return [mapped(part, change) for part in value] if isinstance(value, list | tuple) else change(value)


def joined(values: Sequence[Any]) -> Any:
    """Join the outputs for several prompts to those of one batch: the pictures one after another, layer by layer."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first[0], Tensor):
        return [tensor for value in values for tensor in value]
    return [joined(layer) for layer in zip(*values, strict=True)]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in mappings and lists, by path, such as ``outputs/pooler_output/0``."""
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from flat(part, f"{path}/{key}" if path else str(key))


def unflat(tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``flat``; mappings without a tensor are lost."""
    if list(tensors) == [""]:
        return tensors[""]
    parts: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        key, _, rest = path.partition("/")
        parts.setdefault(key, {})[rest] = tensor
    found = {key: unflat(part) for key, part in parts.items()}
    return [found[str(n)] for n in range(len(found))] if all(key.isdecimal() for key in found) else found
