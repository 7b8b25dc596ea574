"""How strongly to merge before anything is scored: lambda = kappa sqrt(N) on the mean of N task vectors.

The law of CORAM (arXiv 2608.17366, experts of MergeBench on Llama-3.2-3B): task vectors of different tasks are nearly
orthogonal, so that the norm of their mean falls as 1 / sqrt(N), and kappa sqrt(N) times the mean is about kappa times
as far from the base as one source. kappa is 1.15 where sources are about equally far, and 0.5 where their dispersion
D = max / min of norm(tau) / norm(W0) is large, because the farthest then dominates the mean. Weights of kappa / sqrt(N)
for each task vector are equivalent: 0.81 for two sources, and less for more, well within the range of 0 to 1.5 of a
search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from evomerge.checkpoints.source import Source
from evomerge.merging.arithmetic import scans
from evomerge.merging.arithmetic.jobs import WorkerThreads
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Weights
from evomerge.merging.site import Ref

EVEN, UNEVEN = 1.15, 0.5
"""kappa if the sources are about equally far from the base, and if they are not."""

LARGE_DISPERSION = 3.0
"""The D from which it counts as large. The paper gives no number; if one source is three times as far as another, nine
tenths of the squared norm of their sum come from it."""


def dispersion(norms: Sequence[float]) -> float:
    """max / min of the nonzero norms of task vectors; 1 if there are none."""
    known = [norm for norm in norms if norm > 0]
    return max(known) / min(known) if known else 1.0


def kappa(norms: Sequence[float]) -> float:
    """The law's factor for sources with task vectors of these norms, each relative to the base's."""
    return UNEVEN if dispersion(norms) >= LARGE_DISPERSION else EVEN


def relative_norms(sources: Mapping[str, Source], base: str, evidence: Evidence) -> dict[str, float]:
    """norm(tau) / norm(W0) over all weights, for every source except the base: reads all sources, once per search.

    Args:
        sources: aligned to one vocabulary; tensors count if a source and the base have them in the same shape.
    """
    names = [name for name in sources if name != base]
    contents = tuple(evidence.content_of(name) for name in (base, *names))
    kept = evidence.get("relative norms", (contents,), lambda: _measured(sources, base, names))
    return dict(zip(names, kept["norms"].tolist(), strict=True))


def _measured(sources: Mapping[str, Source], base: str, names: Sequence[str]) -> dict[str, Tensor]:
    def read(ref: Ref) -> Tensor:
        return sources[ref[0]].read(ref[1]).contiguous()

    weights, origin = Weights(read, WorkerThreads()), sources[base]
    squares: dict[str, list[float]] = {name: [] for name in names}
    sizes: dict[str, list[float]] = {name: [] for name in names}
    for tensor, entry in origin.tensors.items():
        stored = read((base, tensor))
        size = float(weights.scan_tensors((stored,), np.zeros(1), scans.squares)[0])
        for name in names:
            other = sources[name].tensors.get(tensor)
            if other is not None and tuple(other.shape) == tuple(entry.shape):
                gone = weights.scan_tensors((stored, read((name, tensor))), np.zeros(1), scans.change)
                squares[name].append(float(gone[0]))
                sizes[name].append(size)
        for source in chain([origin], (sources[name] for name in names if tensor in sources[name].tensors)):
            source.release(tensor)
    norms = [math.sqrt(math.fsum(squares[n]) / (math.fsum(sizes[n]) or 1.0)) for n in names]
    return {"norms": torch.tensor(norms, dtype=torch.float64)}
