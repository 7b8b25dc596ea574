"""Parts: a tensor of the model as transformers builds it, or a piece of one, and where it is in the files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from evomerge.checkpoints.headers import DTYPE_BITS, TensorEntry
from evomerge.errors import InputError

Cut = int | tuple[int, int]
"""The range of a piece in one dimension: a single index, or (start, stop)."""

COPY_AGAIN = "Copy config.json and all files again, of one model."
"""What to do about files that are not those of the configuration."""

Fold = Literal["times", "shifted"]
"""How a factor f is folded into a stored tensor t: as f t, or as (1 + t) f - 1 for norms with the weight 1 + t, as
Gemma's."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the model (``cuts`` is empty), or the piece ``tensor[cuts]`` of it."""

    tensor: str
    cuts: tuple[Cut, ...] = ()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of a whole tensor: the tensor itself, or a view into it."""
        if not self.cuts:
            return tensor
        return tensor[tuple(cut if isinstance(cut, int) else slice(*cut) for cut in self.cuts)]


def fold_in(tensor: torch.Tensor, factor: float, fold: Fold) -> None:
    """Fold a factor into a stored tensor of any float dtype in place, computed in float32."""
    wide = tensor.float()
    tensor.copy_(wide * factor if fold == "times" else (1.0 + wide) * factor - 1.0)


def check_shape(name: str, shape: Sequence[int], wanted: Sequence[int], place: str) -> None:
    """Refuse a tensor in the files that has another shape than in the model.

    Raises:
        InputError: naming the tensor and both shapes.
    """
    if list(shape) != list(wanted):
        problem = f"{name} has shape {list(shape)} in the files; config.json asks for {list(wanted)}"
        raise InputError(place, problem, COPY_AGAIN)


def holders(parts: Mapping[str, Part], located: Mapping[Part, str]) -> Iterator[tuple[str, str, Part]]:
    """For each part: its name, the checkpoint's tensor that holds it, and which piece of that tensor it is.

    If the checkpoint has the whole tensor of a part, as with experts that were saved together, the part is a piece of
    it. Parts that the checkpoint does not have are left out.
    """
    for name, part in parts.items():
        if part in located:
            yield name, located[part], Part(part.tensor)
        elif (whole := Part(part.tensor)) in located:
            yield name, located[whole], part


def entries(
    parts: Mapping[str, Part], located: Mapping[Part, str], stored: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, TensorEntry]]:
    """Where each part is in the files, by name; parts that are not one contiguous range of bytes are left out."""
    for name, holder, part in holders(parts, located):
        if (cut := _cut(stored[holder], part)) is not None:
            yield name, cut


def _cut(entry: TensorEntry, part: Part) -> TensorEntry | None:
    """The entry of a part within that of its whole tensor; None if its bytes are not contiguous."""
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
