"""Tiers of layers whose changes can be trusted equally: LARV's measure, from weights alone.

Wang et al., "LARV: Data-Free Layer-wise Adaptive Rescaling Veneer for Model Merging" (arXiv 2602.09413), section 3.2:

    e_l = r(W0) / r(tau)                                            effective ranks (``directions``)
    k_l = (||W0 tau^T - tau W0^T|| + ||W0^T tau - tau^T W0||) / (2 ||W0|| ||tau||)     how far the two do not commute
    s_l = e_l^eta ((l + 1) / L)^rho / (1 + softplus(z_l)),          z_l: k_l standardised over the layers

with eta 1 and rho 1/2. A concentrated change to a layer with a broad spectrum scores high, one that conflicts with the
base's weights low. The thirds of the scores are tiers, and a search gives each tier its own factor. The paper has one
matrix per layer and one task; here e_l is of all matrices of a layer as blocks of one, k_l is their mean, and both are
means over the sources that change the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.checkpoints.source import Source
from evomerge.merging.adapters.low_rank_change import is_low_rank, low_rank_factors
from evomerge.merging.measured.directions import Directions, Factors, of_matrices
from evomerge.merging.measured.evidence import Evidence

COUNT = 3
"""The number of tiers: low, middle and high scores. The paper finds two or three the most robust."""

_ETA, _RHO = 1.0, 0.5


def tiers_of(sources: Mapping[str, Source], base: str, evidence: Evidence) -> tuple[int, ...]:
    """The tier of each layer, 0 for the lowest scores: measured once per search.

    Args:
        sources: aligned to one vocabulary, with equal numbers of layers.
    """
    names = [name for name in sources if name != base]
    contents = tuple(evidence.content_of(name) for name in (base, *names))
    kept = evidence.get("layer scores 1", (contents,), lambda: {"scores": _scores(sources, base, names)})
    return thirds(kept["scores"].numpy())


def thirds(scores: NDArray[np.float64]) -> tuple[int, ...]:
    """The tier of each layer by its score; of equal scores the lower layer is in the lower tier."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    return tuple(int(rank * COUNT // len(scores)) for rank in ranks)


def scores(contrasts: NDArray[np.float64], conflicts: NDArray[np.float64]) -> NDArray[np.float64]:
    """s_l from e_l and k_l, float64 [layers] each."""
    spread = float(conflicts.std())
    standardised = (conflicts - conflicts.mean()) / (spread if spread > 1e-12 else 1.0)
    depth = (np.arange(len(contrasts)) + 1) / len(contrasts)
    return np.asarray(contrasts**_ETA * depth**_RHO / (1 + np.logaddexp(0, standardised)))


def conflict(base: Tensor, change: Tensor | Factors) -> float:
    """k of one matrix [rows, columns] and a change to it; 0 if either is zero.

    Computed on the short side alone: with X = W0 tau^T, or its equivalent for a tall matrix, the norms are ||X - X^T||
    and, squared, 2 <W0 W0^T, tau tau^T> - 2 tr(X X).
    """
    if base.shape[0] > base.shape[1]:
        base, change = base.T, (change[1].T, change[0].T) if isinstance(change, tuple) else change.T
    base = base.double()
    gram = base @ base.T
    if isinstance(change, tuple):
        left, right = (factor.double() for factor in change)
        cross, square = (base @ right.T) @ left.T, left @ (right @ right.T) @ left.T
    else:
        cross, square = base @ change.double().T, change.double() @ change.double().T
    lengths = math.sqrt(max(float(gram.trace() * square.trace()), 0.0))
    if not lengths:
        return 0.0
    along = float(torch.linalg.vector_norm(cross - cross.T))
    across = 2 * float((gram * square).sum()) - 2 * float((cross * cross.T).sum())
    return (along + math.sqrt(max(across, 0.0))) / (2 * lengths)


def _scores(sources: Mapping[str, Source], base: str, names: Sequence[str]) -> Tensor:
    origin = sources[base]
    found = [_Layer(len(names)) for _ in range(origin.layers)]
    for tensor, entry in origin.tensors.items():
        layer = origin.roles[tensor].layer
        if layer is not None and len(entry.shape) == 2:
            stored = origin.read(tensor).double()
            found[layer].take(stored, [_change(origin, sources[name], tensor, stored) for name in names])
        for name in (base, *names):
            sources[name].release(tensor)
    contrasts, conflicts = _over([each.contrasts for each in found]), _over([each.conflicts for each in found])
    return torch.from_numpy(scores(contrasts, conflicts))


def _change(base: Source, source: Source, tensor: str, stored: Tensor) -> Tensor | Factors:
    """A source's change to a matrix of the base, as its adapters' factors if these are all of it."""
    if not base.changes and is_low_rank(base, source):
        return low_rank_factors(source, tensor) or (stored[:, :0], stored[:0])
    return source.read(tensor).double() - stored


class _Layer:
    """The measurements of one layer, for n sources."""

    def __init__(self, count: int) -> None:
        self._base, self._changes = Directions.none(1), Directions.none(count)
        self._conflicts: list[list[float]] = [[] for _ in range(count)]

    def take(self, base: Tensor, changes: Sequence[Tensor | Factors]) -> None:
        """Add one of its matrices, float64 [rows, columns], and each source's change to it."""
        found = of_matrices(changes)
        self._base += of_matrices([base])
        self._changes += found
        for k, (kept, change) in enumerate(zip(self._conflicts, changes, strict=True)):
            if found.squares[k] > 0:
                kept.append(conflict(base, change))

    @property
    def contrasts(self) -> list[float]:
        """e of each source that changes it."""
        whole = self._base.rank(0) or 0.0
        ranks = (self._changes.rank(k) for k in range(len(self._conflicts)))
        return [whole / rank for rank in ranks if rank is not None]

    @property
    def conflicts(self) -> list[float]:
        """k of each source that changes it."""
        return [float(np.mean(kept)) for kept in self._conflicts if kept]


def _over(of_layers: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The mean over sources, float64 [layers]; for a layer that none changes, the mean of all others."""
    means = np.array([np.mean(values) if values else np.nan for values in of_layers])
    known = means[np.isfinite(means)]
    return np.where(np.isfinite(means), means, known.mean() if len(known) else 1.0)
