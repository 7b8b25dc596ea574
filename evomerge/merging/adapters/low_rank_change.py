"""The distance of weighted sums of adapters from a base, computed from their factors: no weight is ever made.

With Delta_w = sum_k c_k tau_k for each weight w, norm(Delta_w)^2 = sum_kl c_k c_l <tau_k, tau_l>, and of low-rank task
vectors tau_k = s_k B_k A_k the inner products are those of small matrices: <B_k A_k, B_l A_l> = <B_k^T B_l, A_k A_l^T>.
So a candidate costs a few numbers per weight, and its change is exact, because nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evomerge.checkpoints.adapter_changes import LowRank
from evomerge.checkpoints.headers import TensorEntry, map_file, view_entry
from evomerge.checkpoints.source import Source
from evomerge.merging.adapters.low_rank import Family


class LowRankChange:
    """Computes the change (``merging.measured.change``) of weighted sums of a family.

    Args:
        base: the source that changes are measured from, one of the family.
    """

    def __init__(self, sources: Mapping[str, Source], family: Family, base: str) -> None:
        adapted = [sources[name] for name in family.adapted]
        self._products = torch.stack([_products(adapted, weight) for weight in family.weights])
        self._size = _squared_norm(sources[base])
        # Measured from an adapted source, its coefficient is reduced by one.
        self._origin = torch.tensor([float(name == base) for name in family.adapted], dtype=torch.float64)

    def of(self, coefficients: Tensor) -> float | None:
        """norm(W - W0) / norm(W0) of one of them; None where W0 is zero.

        Args:
            coefficients: [weights, adapted sources], as of ``low_rank.coefficients``.
        """
        parts = coefficients.double() - self._origin
        shares = parts[:, :, None] * parts[:, None, :]
        # A sum without an adapter is valid even if that contains NaN.
        square = float(torch.where(shares == 0, 0.0, shares * self._products).sum())
        return math.sqrt(max(square, 0.0) / self._size) if self._size else None


class CoreChange:
    """The change of merges in core space, whose matrices are as long as what they add: bases are orthonormal.

    Args:
        base: the model under the adapters, from which they are measured.
    """

    def __init__(self, base: Source) -> None:
        self._size = _squared_norm(base)

    def of(self, matrices: Sequence[Tensor]) -> float | None:
        """norm(W - W0) / norm(W0) of one of them; None where W0 is zero.

        Args:
            matrices: of all weights, as of ``low_rank.CoreMerges``.
        """
        square = sum(float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2 for matrix in matrices)
        return math.sqrt(square / self._size) if self._size else None


def _products(sources: Sequence[Source], weight: str) -> Tensor:
    """The inner products of the sources' changes to a weight: float64 [sources, sources]."""
    factors = [low_rank_factors(source, weight) for source in sources]
    products = torch.zeros(len(sources), len(sources), dtype=torch.float64)
    for k, ours in enumerate(factors):
        for m, theirs in enumerate(factors[: k + 1]):
            if ours is not None and theirs is not None:
                products[k, m] = products[m, k] = ((ours[0].T @ theirs[0]) * (ours[1] @ theirs[1].T)).sum()
    return products


def is_low_rank(base: Source, other: Source) -> bool:
    """Whether a source is the base with only low-rank adapters, so that their factors are its whole change."""
    changes = [change for each in other.changes.values() for change in each]
    low_rank = all(isinstance(change, LowRank) and change.magnitude is None for change in changes)
    return bool(changes) and low_rank and other.folder == base.folder and other.tensors == base.tensors


def low_rank_factors(source: Source, weight: str) -> tuple[Tensor, Tensor] | None:
    """L [rows, ranks] and R [ranks, columns], whose product is the change of a source's adapters to a weight; or None.

    float64, with the scalings in L; for a weight stored as inputs by outputs, L comes from A.
    """
    pairs = []
    for change in source.changes.get(weight, ()):
        if isinstance(change, LowRank):
            left, right = (factor.double() for factor in change.factors(_read))
            pairs.append((change.scale * left, right))
    if not pairs:
        return None
    ups, downs = zip(*pairs, strict=True)
    return torch.cat(ups, dim=1), torch.cat(downs)


def _read(entry: TensorEntry) -> Tensor:
    return view_entry(entry, map_file(entry.file))


def _squared_norm(source: Source) -> float:
    """The sum of squares of all weights of a source."""
    total = 0.0
    for name in source.tensors:
        total += float(torch.linalg.vector_norm(source.read(name), dtype=torch.float64)) ** 2
        source.release(name)
    return total
