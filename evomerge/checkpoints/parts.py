"""Parts: a tensor of the model as transformers builds it, or a piece of one, and where it lies in the files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from evomerge.checkpoints.headers import DTYPE_BITS, TensorEntry
from evomerge.errors import InputError

Cut = int | tuple[int, int]
"""What a piece takes of one dimension: an index, or from a start to a stop."""

COPY_AGAIN = "Copy config.json and all files again, of one model."
"""What to do about files that are not those of the configuration."""

Fold = Literal["times", "shifted"]
"""How a factor f goes into a stored tensor t: f t, or (1 + t) f - 1 for norms whose weight is 1 + t, as Gemma's."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the model (``cuts`` is empty), or the piece ``tensor[cuts]`` of it."""

    tensor: str
    cuts: tuple[Cut, ...] = ()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of that tensor: itself, or a view into it."""
        if not self.cuts:
            return tensor
        return tensor[tuple(cut if isinstance(cut, int) else slice(*cut) for cut in self.cuts)]


def fold_in(tensor: torch.Tensor, factor: float, fold: Fold) -> None:
    """Put a factor into a stored tensor in place, computed in float32."""
    wide = tensor.float()
    tensor.copy_(wide * factor if fold == "times" else (1.0 + wide) * factor - 1.0)


def check_shape(name: str, shape: Sequence[int], wanted: Sequence[int], place: str) -> None:
    """Refuse a tensor of another shape than the model's.

    Raises:
        InputError: naming the tensor and both shapes.
    """
    if list(shape) != list(wanted):
        problem = f"{name} has shape {list(shape)} in the files; config.json asks for {list(wanted)}"
        raise InputError(place, problem, COPY_AGAIN)


def holders(parts: Mapping[str, Part], located: Mapping[Part, str]) -> Iterator[tuple[str, str, Part]]:
    """For each part by its name, the checkpoint's tensor that holds it and what of that to take.

    A part whose tensor lies whole in the checkpoint, as of experts that were saved in one, is a cut of it. Parts that
    are nowhere are left out.
    """
    for name, part in parts.items():
        if part in located:
            yield name, located[part], Part(part.tensor)
        elif (whole := Part(part.tensor)) in located:
            yield name, located[whole], part


def entries(
    parts: Mapping[str, Part], located: Mapping[Part, str], stored: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, TensorEntry]]:
    """Where each part lies in the files, by its name; those that no file holds in one run of bytes are left out."""
    for name, holder, part in holders(parts, located):
        if (cut := _cut(stored[holder], part)) is not None:
            yield name, cut


def _cut(entry: TensorEntry, part: Part) -> TensorEntry | None:
    """The bytes of a part in those of its whole tensor; None where they do not lie together."""
    shape, begin, size = entry.shape, 0, DTYPE_BITS[entry.dtype] // 8
    kept: tuple[int, ...] = ()
    for axis, cut in enumerate(part.cuts):
        if kept:
            return None
        row = math.prod(shape[axis + 1 :])
        if isinstance(cut, int):
            begin += cut * row
        else:
            begin += cut[0] * row
            kept = (cut[1] - cut[0],)
    kept += shape[len(part.cuts) :]
    start = entry.begin + begin * size
    return replace(entry, shape=kept, begin=start, end=start + math.prod(kept) * size)
