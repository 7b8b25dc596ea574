"""How much of a task vector is lost to rounding when a merge is stored.

A 16-bit weight has few digits: the steps of bfloat16 are 0.4% to 0.8% of a weight. A task vector d that is no larger,
such as many an adapter's, becomes r(b + d) - r(b) after rounding r: zero in some places, a whole step in others. The
loss is the relative length of the difference, ||r(b + d) - r(b) - d|| / ||d||.
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
"""The lost share of a task vector from which people are warned."""

_ELEMENTS = 1 << 24
"""How many elements of a source are checked, by whole tensors: reading a large model would take minutes."""

_BLOCK = 1 << 18  # elements


def is_exact(source: Source, name: str, dtype: torch.dtype) -> bool:
    """Whether every value of a tensor of a source, adapters folded in, is one of ``dtype``."""
    own = torch.float32 if name in source.changes else TORCH_DTYPES[source.tensors[name].dtype]
    return dtype in (own, torch.float32)


def squared_loss(base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Tensor:
    """The square of ||r(b + d) - r(b) - d||: float64 [].

    Args:
        base, tuned: b and b + d, of one shape, float32.
        dtype: what r rounds to; larger numbers become its largest.
    """
    most = torch.finfo(dtype).max
    before, after = (tensor.clamp(-most, most).to(dtype).float() for tensor in (base, tuned))
    return ((after - before) - (tuned - base)).double().square().sum()


def share_lost(squared: float, squared_length: float) -> float | None:
    """||r(b + d) - r(b) - d|| / ||d|| from the squares of both; None if d is zero."""
    return math.sqrt(squared / squared_length) if squared_length else None


def shares_lost(
    sources: Mapping[str, Source], base: str | None, model: Source, dtype: torch.dtype | None
) -> dict[str, float]:
    """For each source that loses anything to the merge's dtype, the approximate lost share of its task vector.

    It is that of the layers, or, if these lose nothing, of everything else. Reads some tensors of those sources, and
    none of others.

    Args:
        base: what task vectors are differences from; without one, adapted sources are compared with what they adapt.
        model: the source that the merged model is laid out as.
        dtype: of the merged model's weights; None means as ``model`` stores them.
    """
    origin = sources[base] if base is not None else None
    losses = {}
    for name, source in sources.items():
        if name != base and (loss := _loss(source, origin, model, dtype)) is not None:
            losses[name] = loss
    return losses


def _loss(source: Source, origin: Source | None, model: Source, dtype: torch.dtype | None) -> float | None:
    """The share of a source's task vector that is lost; None if nothing can be lost."""
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
    """The tensors that the source, the origin of its task vector and the merged model have in equal shapes."""
    others = [model] if origin is None else [model, origin]
    return [
        name
        for name in (source.changes if origin is None else source.roles)
        if all(name in s.tensors and s.tensors[name].shape == source.tensors[name].shape for s in others)
    ]


def _both_exact(source: Source, origin: Source | None, name: str, dtype: torch.dtype) -> bool:
    return is_exact(source, name, dtype) and (origin is None or is_exact(origin, name, dtype))


def _some(source: Source, names: list[str]) -> list[str]:
    """All of the tensors, or a reproducible random choice of them with ``_ELEMENTS`` elements."""
    picked, count = [], 0
    for name in random.Random(0).sample(names, len(names)):
        if count >= _ELEMENTS:
            break
        picked.append(name)
        count += math.prod(source.tensors[name].shape)
    return picked


def rounding_warning(lost: Mapping[str, float], dtype: torch.dtype, *, adapted: bool, where: str = "") -> str:
    """A sentence for people, without a full stop.

    Args:
        lost: the lost share of each source's task vector, by the source's name; at least one.
        adapted: the sources are models with adapters.
        where: the parts of the model that it applies to, if not to the whole.
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
