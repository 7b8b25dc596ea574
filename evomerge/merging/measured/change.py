"""The distance of a merged model from its base: norm(W - W0) / norm(W0) over all weights, measured as written.

The quality of a merge depends on this number more than on the direction of its change: when twelve checkpoints of a
language model were merged at fixed strength, the methods that went two to six times as far as task arithmetic fell
below the base (arXiv 2511.21437). So it is measured for every candidate of a search with a base.

Tensors are compared by name with the base's, in a path those of each hop with the layer of its number. Tensors that the
base lacks, such as hops beyond its depth, or has in another shape, are left out on both sides. Sources that are aligned
to another vocabulary are compared with their aligned base, including rows of tokens that it lacks. The scale of a hop
counts as the factor that an export has in its weights. If several tensors replace one, as in a mixture of experts, each
counts for its share of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from evomerge.checkpoints.parts import Fold, fold_in
from evomerge.checkpoints.source import Source
from evomerge.merging.arithmetic import scans
from evomerge.merging.arithmetic.jobs import WorkerThreads
from evomerge.merging.measured.facts import Weights
from evomerge.merging.site import Ref

if TYPE_CHECKING:  # a live model needs transformers, which takes seconds to import
    from evomerge.checkpoints.live import LiveModel

_MAX_KNOWN = 1 << 15
"""How many tensors' changes are cached: more than a path over the layers of a few sources needs."""

_PIECE = 1 << 26  # elements of a tensor on a device at once, to bound the memory of float32 copies

_CPU = torch.device("cpu")

Read = Callable[[Ref, torch.device], Tensor]
"""(a tensor of a source, device) -> the tensor there, contiguous."""


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor of a written model.

    Attributes:
        name: in the model, and in the base.
        tensor: contiguous, of any float dtype, on any device.
        way: everything that it depends on; for one name, equal ways give equal tensors. None if unknown.
        factor, fold: how a scale goes into it; see ``parts.fold_in``.
        share: its weight in the sum.
    """

    name: str
    tensor: Tensor
    way: Hashable = None
    factor: float = 1.0
    fold: Fold = "times"
    share: float = 1.0


class ChangeMeter:
    """Measures models that are written one after another, each tensor only if it has changed.

    Differences are computed in float32 and their squares added up in float64, in an order that depends neither on
    threads nor on earlier measurements.

    Args:
        base: the source that models are compared with.
        read: returns its tensors.
        weights: computes on the CPU.
    """

    def __init__(self, base: Source, read: Read, weights: Weights) -> None:
        self._base, self._read, self._weights = base, read, weights
        self._sizes: dict[str, float] = {}
        self._known: dict[Hashable, float] = {}

    def of(self, model: Iterable[Written]) -> float | None:
        """The change of a model; None if it has no tensor in common with the base, or the base is zero."""
        known: dict[Hashable, float] = {}
        squares, sizes = [], []
        for written in model:
            entry = self._base.tensors.get(written.name)
            if entry is None or tuple(entry.shape) != tuple(written.tensor.shape):
                continue
            key = written.name, written.way, written.factor, written.fold
            if written.way is None or (square := self._known.get(key)) is None:
                square = self._square(written)
            known[key] = square
            squares.append(written.share * square)
            sizes.append(written.share * self._size(written.name))
        self._known = known if len(self._known) > _MAX_KNOWN else self._known | known
        size = math.fsum(sizes)
        return math.sqrt(sum(squares) / size) if size else None

    def _square(self, written: Written) -> float:
        """The squared norm of a tensor's difference from the base's."""
        made = written.tensor.detach()
        if written.factor != 1.0:
            made = made.clone()
            fold_in(made, written.factor, written.fold)
        base = self._read((self._base.name, written.name), made.device)
        if made.device.type == "cpu":
            return float(self._weights.scan_tensors((base, made), np.zeros(1), scans.change)[0])
        return squared_distance(base, made)

    def _size(self, name: str) -> float:
        """The squared norm of a tensor of the base, computed once."""
        if name not in self._sizes:
            base = self._read((self._base.name, name), _CPU)
            self._sizes[name] = float(self._weights.scan_tensors((base,), np.zeros(1), scans.squares)[0])
        return self._sizes[name]


def squared_distance(base: Tensor, made: Tensor, piece: int = _PIECE) -> float:
    """The squared norm of the difference of two tensors of equal shape, on their device.

    Args:
        piece: elements that are in float32 at once.
    """
    before, after = (torch.split(tensor.reshape(-1), piece) for tensor in (base, made))
    norms = [
        torch.linalg.vector_norm(w.float() - b.float(), dtype=torch.float64) for b, w in zip(before, after, strict=True)
    ]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


def change_of(live: LiveModel, source: Source, base: Source) -> float | None:
    """The change of a model that was loaded whole.

    Args:
        live: holds the model.
        source: where it was loaded from; it provides the tensors' names.
        base: the source that it is compared with.
    """

    def read(ref: Ref, device: torch.device = _CPU) -> Tensor:
        return base.read(ref[1]).contiguous().to(device)

    def written() -> Iterator[Written]:
        held = live.model.state_dict()
        for name, part in source.parts.items():
            if part.tensor in held:
                yield Written(name, part.of(held[part.tensor]).contiguous())
            if name in base.tensors:  # a path may have more layers
                base.release(name)

    return ChangeMeter(base, read, Weights(read, WorkerThreads())).of(written())
