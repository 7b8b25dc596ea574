"""How much of a task vector is rounded away where a merge is stored.

A weight of 16 bits has few digits: the steps of bfloat16 are 0.4% to 0.8% of a weight. A task vector d that is no
larger than that, as many an adapter's, is after rounding r what r(b + d) - r(b) is: zero here, a whole step there. What
is lost is the length of the difference, ||r(b + d) - r(b) - d|| / ||d||.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch
from torch import Tensor

from evomerge.checkpoints.headers import TORCH_DTYPES
from evomerge.checkpoints.source import Source

LOSSY = 0.1
"""Share of a task vector from which on people should know that it is rounded away."""

_ELEMENTS = 1 << 24
"""Elements of a source that are looked at, by whole tensors: reading all of a large model would take minutes."""

_BLOCK = 1 << 18  # elements


def is_exact(source: Source, name: str, dtype: torch.dtype) -> bool:
    """Whether every value of a tensor of a source, adapters folded in, is one of ``dtype``."""
    own = torch.float32 if name in source.changes else TORCH_DTYPES[source.tensors[name].dtype]
    return dtype in (own, torch.float32)


def squared_loss(base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Tensor:
    """The square of ||r(b + d) - r(b) - d||: float64 [].

    Args:
        base, tuned: b and b + d, of one shape, float32.
        dtype: what r rounds to; its largest number stands for what is beyond.
    """
    most = torch.finfo(dtype).max
    before, after = (tensor.clamp(-most, most).to(dtype).float() for tensor in (base, tuned))
    return ((after - before) - (tuned - base)).double().square().sum()


def share_lost(squared: float, squared_length: float) -> float | None:
    """||r(b + d) - r(b) - d|| / ||d|| from the squares of both; None where d is zero."""
    return math.sqrt(squared / squared_length) if squared_length else None


def shares_lost(
    sources: Mapping[str, Source], base: str | None, model: Source, dtype: torch.dtype | None
) -> dict[str, float]:
    """For each source of which the merge's dtype rounds anything away, the share of its task vector; about.

    It is that of the layers, or where these lose nothing of all else. Reads some of the tensors of those sources, and
    nothing of others.

    Args:
        base: what task vectors are taken against; if there is none, adapted sources are held against what they adapt.
        model: the source that the merged model is laid out as.
        dtype: of the merged model's weights; as ``model`` stores them when None.
    """
    origin = sources[base] if base is not None else None
    losses = {}
    for name, source in sources.items():
        if name != base and (loss := _loss(source, origin, model, dtype)) is not None:
            losses[name] = loss
    return losses


def _loss(source: Source, origin: Source | None, model: Source, dtype: torch.dtype | None) -> float | None:
    """The share of a source's task vector that is lost; None where nothing can be."""
    dtypes = {name: model.dtype_of(name, dtype, dtype or model.dtype) for name in _comparable(source, origin, model)}
    lossy = [name for name, kept in dtypes.items() if not _both_exact(source, origin, name, kept)]
    lossy = [name for name in lossy if source.roles[name].layer is not None] or lossy
    lost, length = 0.0, 0.0
    for name in _some(source, lossy):
        tuned = source.read(name).reshape(-1)
        base = (source.read_stored(name) if origin is None else origin.read(name)).reshape(-1)
        for begin in range(0, len(tuned), _BLOCK):
            after, before = (tensor[begin : begin + _BLOCK].float() for tensor in (tuned, base))
            lost += float(squared_loss(before, after, dtypes[name]))
            length += float((after - before).double().square().sum())
        for read in (source, origin):
            if read is not None:
                read.release(name)
    return share_lost(lost, length)


def _comparable(source: Source, origin: Source | None, model: Source) -> list[str]:
    """Tensors that the source, the origin of its task vector and the merged model have in one shape."""
    others = [model] if origin is None else [model, origin]
    return [
        name
        for name in (source.changes if origin is None else source.roles)
        if all(name in s.tensors and s.tensors[name].shape == source.tensors[name].shape for s in others)
    ]


def _both_exact(source: Source, origin: Source | None, name: str, dtype: torch.dtype) -> bool:
    return is_exact(source, name, dtype) and (origin is None or is_exact(origin, name, dtype))


def _some(source: Source, names: list[str]) -> list[str]:
    """All of the tensors, or as many of them as have ``_ELEMENTS`` elements, at random but always the same."""
    picked, count = [], 0
    for name in random.Random(0).sample(names, len(names)):
        if count >= _ELEMENTS:
            break
        picked.append(name)
        count += math.prod(source.tensors[name].shape)
    return picked


def rounding_warning(lost: Mapping[str, float], dtype: torch.dtype, *, adapted: bool, where: str = "") -> str:
    """A sentence for a person, without a full stop.

    Args:
        lost: share of each source's task vector that rounding takes, by the source's name; of one at least.
        adapted: the sources are models with adapters.
        where: the parts of the model of which that is true, where it is not true of the whole.
    """
    dtype_name, epsilon = str(dtype).removeprefix("torch."), torch.finfo(dtype).eps
    within = f" in {where}" if where else ""
    kept = ", ".join(f"{max(0.0, 1 - share):.0%}" for share in lost.values())
    survives = "its change{} survives" if len(lost) == 1 else "their changes{} survive"
    together = ", or `together`, which adds adapters without rounding them into the weights" if adapted else ""
    return (
        f"{', '.join(lost)}: {kept} of {survives.format(within)} in {dtype_name}, in which the merge is stored: a step "
        f"is {epsilon / 2:.2%} to {epsilon:.2%} of a weight. Merge with `dtype: float32`{together}"
    )
