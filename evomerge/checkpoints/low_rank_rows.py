"""Low-rank changes beside the live model of their base, mixed for each row of a batch by its own numbers.

Merged adapters are not written into the weights. A module with stored weight W0 computes, for a weighted sum with the
factors A_k, B_k and the scaling s_k of adapter k,

    y = x W0^T + sum_k c_k s_k (x A_k^T) B_k^T      (Hu et al. 2021, arXiv:2106.09685, section 4.1, for each k)

and for any merge M in core space (``merging/core_space.py``), between the bases Q of outputs and P of inputs,

    y = x W0^T + (x P^T) M^T Q^T

where c or M depends on the row of x. Rows of many merged models thus share one forward pass, and the memory of one
model. The factors of a module are concatenated, so that all of its adapters need two matrix products.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from evomerge.checkpoints.adapter_changes import LowRank
from evomerge.checkpoints.headers import TensorEntry, map_file, view_entry
from evomerge.checkpoints.live import LiveModel, NotFiniteError
from evomerge.checkpoints.source import Source


@dataclass(frozen=True)
class _Pair:
    """All possible changes to one weight.

    Attributes:
        module: the module of the transformers model with the weight.
        down: multiplies the input, [ranks below, inputs].
        up: maps to outputs, [ranks above, outputs].
        numbers: the position of its numbers among those of a candidate.
    """

    module: str
    down: Tensor
    up: Tensor
    numbers: slice


class Rows(ABC):
    """Low-rank changes to a live model's weights, stored once beside them, in its dtype.

    Args:
        live: the live model of the base.
        pairs: one for each weight.
    """

    def __init__(self, live: LiveModel, pairs: Sequence[_Pair]) -> None:
        self._model, self._pairs = live.model, pairs
        self._shares = torch.empty(0)
        self._of: int | list[int] | None = None
        self._reached: set[str] = set()

    @contextlib.contextmanager
    def mixed(self, shares: Sequence[Tensor]) -> Iterator[None]:
        """Within the context, rows belong to the candidates with these shares, as selected by ``choose``."""
        self._shares = torch.stack(list(shares)).to(self._model.device)
        self._of = None
        self._reached.clear()
        hooks = []
        try:
            for pair in self._pairs:
                module = self._model.get_submodule(pair.module)
                if not isinstance(module, nn.Linear | Conv1D):
                    raise ValueError(
                        f"{pair.module} is a {type(module).__name__}, to whose output nothing can be added"
                    )
                hooks.append(module.register_forward_hook(partial(self._add, pair)))
            self.choose(0)
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def choose(self, candidates: int | Sequence[int]) -> None:
        """Select the candidate of the next forward passes: one for all rows, or one for each."""
        chosen = candidates if isinstance(candidates, int) else list(candidates)
        if chosen == self._of:
            return
        self._of = chosen
        self._choose(torch.tensor([chosen] if isinstance(chosen, int) else chosen, device=self._shares.device))

    def check_reached(self) -> None:
        """Reject a model that uses an adapted weight without calling its module, so that nothing was added.

        Raises:
            ValueError: no forward pass since ``mixed`` called the module of one of the weights.
        """
        if missed := [pair.module for pair in self._pairs if pair.module not in self._reached]:
            raise ValueError(f"the model computes without calling {missed[0]}: its adapters cannot be mixed by rows")

    def _add(self, pair: _Pair, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        """Add the low-rank part to a module's output. A batch is [rows, tokens, width], or has rows and tokens as one
        dimension, with each row's tokens consecutive."""
        self._reached.add(pair.module)
        inner = F.linear(given[0], pair.down)
        mixed = self._mix(pair, inner).to(inner.dtype)
        output.view(-1, output.shape[-1]).addmm_(mixed.reshape(-1, mixed.shape[-1]), pair.up)

    @abstractmethod
    def _choose(self, rows: Tensor) -> None:
        """Select the numbers of candidates: int64 [rows], or [1] for all rows."""

    @abstractmethod
    def _mix(self, pair: _Pair, inner: Tensor) -> Tensor:
        """Map [..., ranks below] to [rows, tokens, ranks above] with the numbers of each row's candidate; float32."""


class LowRankRows(Rows):
    """Weighted sums of the adapters of several sources.

    Args:
        live: the live model of the common base of all sources.
        sources: in the order of a candidate's coefficients. Their adapters are all low-rank changes of whole weights,
            without magnitudes.
        weights: the weights that any of them changes, by the sources' names, in the order of a candidate's
            coefficients.
    """

    def __init__(self, live: LiveModel, sources: Sequence[Source], weights: Sequence[str]) -> None:
        self._weights = weights
        pairs: list[_Pair] = []
        where: list[tuple[int, int]] = []  # for each rank, the indices of its weight and of its source
        scales: list[float] = []
        for number, weight in enumerate(weights):
            tensor = sources[0].parts[weight].tensor
            device = live.model.get_parameter(tensor).device
            downs, ups, first = [], [], len(where)
            for owner, source in enumerate(sources):
                for change in source.changes.get(weight, ()):
                    assert isinstance(change, LowRank)
                    down, up = (factor.to(device, live.model.dtype) for factor in change.pair(_read))
                    broken = not (torch.isfinite(down).all() and torch.isfinite(up).all())
                    # A candidate without this adapter is valid, so its zero coefficients must not meet the NaN.
                    downs.append(torch.zeros_like(down) if broken else down)
                    ups.append(torch.zeros_like(up).T if broken else up.T)
                    scales += [math.nan if broken else change.scale] * len(down)
                    where += [(number, owner)] * len(down)
            ranks = slice(first, len(where))
            pairs.append(_Pair(tensor.removesuffix(".weight"), torch.cat(downs), torch.cat(ups), ranks))
        super().__init__(live, pairs)
        self._where = torch.tensor(where).T
        self._scales = torch.tensor(scales, dtype=torch.float32)
        self._chosen = torch.empty(0)

    def shares(self, coefficients: Tensor) -> Tensor:
        """A candidate's factor for every rank of all adapters: float32 [ranks], its coefficients times scalings.

        Args:
            coefficients: float32 [weights, sources].

        Raises:
            NotFiniteError: a coefficient is NaN or Inf, or the adapter's factors are.
        """
        own = coefficients[tuple(self._where)]
        shares = torch.where(own == 0, 0.0, own * self._scales)
        if len(broken := torch.nonzero(~torch.isfinite(shares))):
            raise NotFiniteError(self._weights[int(self._where[0, broken[0]])])
        return shares

    def _choose(self, rows: Tensor) -> None:
        self._chosen = self._shares[rows]

    def _mix(self, pair: _Pair, inner: Tensor) -> Tensor:
        shares = self._chosen[:, pair.numbers].to(inner.device)  # [rows, ranks], or one row for all
        return inner.reshape(len(shares), -1, inner.shape[-1]) * shares[:, None]


class CoreRows(Rows):
    """Changes Q M P of some weights, where the bases Q and P are shared by all candidates.

    Args:
        live: the live model of the base.
        bases: for each weight its name in the transformers model, Q [rows, p] and P [q, columns] for it as stored.
    """

    def __init__(self, live: LiveModel, bases: Sequence[tuple[str, Tensor, Tensor]]) -> None:
        pairs, first = [], 0
        self._weights = [tensor for tensor, _, _ in bases]
        self._turned: list[bool] = []
        for tensor, *both in bases:
            weight, name = live.model.get_parameter(tensor), tensor.removesuffix(".weight")
            left, right = (basis.to(weight.device, weight.dtype) for basis in both)
            self._turned.append(isinstance(live.model.get_submodule(name), Conv1D))
            numbers = slice(first, first + left.shape[1] * right.shape[0])
            pairs.append(
                _Pair(name, left.T, right, numbers) if self._turned[-1] else _Pair(name, right, left.T, numbers)
            )
            first = numbers.stop
        super().__init__(live, pairs)
        self._rows = torch.empty(0, dtype=torch.int64)

    def shares(self, matrices: Sequence[Tensor]) -> Tensor:
        """A candidate's inner matrices for all weights, flattened: float32 [numbers].

        Args:
            matrices: M for each weight, float32 [p, q].

        Raises:
            NotFiniteError: one contains NaN or Inf.
        """
        pairs = zip(matrices, self._turned, strict=True)
        flat = [(matrix if transposed else matrix.T).reshape(-1) for matrix, transposed in pairs]
        shares = torch.cat(flat) if flat else torch.empty(0)  # empty if all adapters are zero
        if not torch.isfinite(shares).all():
            finite = [bool(torch.isfinite(matrix).all()) for matrix in matrices]
            raise NotFiniteError(self._weights[finite.index(False)])
        return shares

    def _choose(self, rows: Tensor) -> None:
        self._rows = rows

    def _mix(self, pair: _Pair, inner: Tensor) -> Tensor:
        own = self._shares[:, pair.numbers][self._rows].to(inner.device)
        return inner.float().reshape(len(own), -1, inner.shape[-1]) @ own.view(len(own), inner.shape[-1], -1)


def _read(entry: TensorEntry) -> Tensor:
    return view_entry(entry, map_file(entry.file))
