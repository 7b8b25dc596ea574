"""What merge methods must know of the weights before they merge: computed once for a set of sources, then looked up.

A search merges the same tensors thousands of times. What a candidate's numbers do not change is read from the weights
once and kept: inner products, how magnitudes are distributed, ranks. A statistic is computed when it is first asked
for, and ``save`` writes all of them to a file that the next worker, and a resumed search, begin with.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from evomerge.merging import scans
from evomerge.merging.drops import stream_key
from evomerge.merging.jobs import Crew, as_pairs

Ref = tuple[str, str]
"""A source and the name that the tensor has in its files."""

Values = Callable[[Sequence[Tensor]], Tensor]
"""(float32 rows of some tensors) -> float32 values of that shape."""

log = logging.getLogger(__name__)

# Scans that take all tensors as one tuple, there being any number of them.
_TOGETHER = (
    scans.inner_products,
    scans.delta_signs,
    scans.count_variances,
    scans.count_variances_in,
    scans.energies,
)

_LOST = 1e-6  # of a squared norm: what is smaller has less than ten right digits as a sum of differences

_PIECE = 1 << 21  # elements; larger than that of a merge, since each piece has totals of its own


class Statistics:
    """Statistics of the tensors that ``read`` gives.

    Args:
        read: gives a tensor: contiguous, on the CPU, always the same.
        crew: threads to compute with.
        file: where statistics are kept between processes; None keeps them for this one alone.
    """

    def __init__(self, read: Callable[[Ref], Tensor], crew: Crew, file: Path | None = None) -> None:
        self._read = read
        self._crew = crew
        self._file = file
        self._found: dict[str, NDArray[Any]] = dict(load_file(file)) if file is not None and file.exists() else {}
        self._saved = len(self._found)

    def save(self) -> None:
        """Write what was computed since the last time, whole or not at all.

        A disk that cannot be written to costs the next process a second reading of the weights, and nothing else.
        """
        if self._file is None or len(self._found) == self._saved:
            return
        partial = self._file.with_name(f".{self._file.name}.partial-{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            save_file(self._found, partial)
            partial.replace(self._file)
        except OSError as error:
            log.warning("statistics are not kept: %s cannot be written (%s)", self._file, error.strerror)
            self._file = None
            partial.unlink(missing_ok=True)
        self._saved = len(self._found)

    def shape(self, ref: Ref) -> torch.Size:
        return self._read(ref).shape

    def products(self, refs: Sequence[Ref]) -> NDArray[np.float64]:
        """[n, n] inner products of x_0, x_1 - x_0, x_2 - x_0, ..., in float64 to about 15 digits."""

        def compute() -> NDArray[np.float64]:
            zeros = np.zeros((len(refs), len(refs)))
            lower = self._scan(refs, zeros, scans.inner_products)
            return np.asarray(np.tril(lower) + np.tril(lower, -1).T)

        return self._once("products", refs, compute)

    def signs(self, refs: Sequence[Ref]) -> NDArray[np.float64]:
        """[3, n, n] how the signs of x_1 - x_0, x_2 - x_0, ... lie to each other; see ``scans.delta_signs``."""

        def compute() -> NDArray[np.float64]:
            return self._scan(refs, np.zeros((3, len(refs) - 1, len(refs) - 1)), scans.delta_signs)

        return self._once("signs", refs, compute)

    def threshold(self, base: Ref, source: Ref, k: int) -> float:
        """The k-th largest magnitude |x - b|, k from 1.

        Exact where a tensor is stored as float32. Where both are stored in 16 bits, magnitudes are ranked by their
        upper 16 bits (about half a percent apart), and this is the smallest magnitude with the upper bits of the k-th:
        then a look into a table of counts is all that a candidate costs.
        """
        counts = self._once("deltas", (base, source), lambda: self._count((base, source), scans.count_deltas))
        upper, rank = _kth_largest(counts, k)
        if all(self._read(ref).dtype.itemsize == 2 for ref in (base, source)):
            return _magnitude(upper, 0)
        fine = self._scan((base, source), np.zeros(scans.FINE_BINS, np.int64), scans.count_deltas_in, upper)
        fine[0] -= self._padding((base, source)) if upper == 0 else 0
        return _magnitude(upper, _kth_largest(_from_top(fine), rank)[0])

    def window_sums(self, base: Ref, source: Ref, low: float, high: float) -> tuple[float, float]:
        """The sum of all |x - b|, and of those with low <= |x - b| < high."""
        total = self._scan((base, source), np.zeros(2), scans.window_sums, np.float64(low), np.float64(high))
        return float(total[0]), float(total[1])

    def mean_rank(self, base: Ref, source: Ref) -> float:
        """The mean rank of |x - b| within its row, 0 for the smallest and 1 for the largest, weighted by |x - b|."""
        counts = self._once("deltas", (base, source), lambda: self._count((base, source), scans.count_deltas))
        # The highest bin is that of the largest magnitude: eight bins of ranks an octave are 16 of the upper bits each.
        first_bin = int(counts[0, 0] >> 4) - scans.RANK_BINS + 1
        total, ranked = self._once("mean ranks", (base, source), lambda: self._rank(base, source, first_bin))
        return float(ranked / total) if total else 0.5

    def value_threshold(self, kind: str, refs: Sequence[Ref], values: Values, k: int) -> float:
        """The k-th largest of values computed from tensors, exactly, k from 1.

        Args:
            kind: name of the values, for keeping their counts.
        """
        counts = self._once(kind, refs, lambda: _from_top(self._value_counts(refs, values)))
        upper, rank = _kth_largest(counts, k)
        fine = _from_top(self._value_counts(refs, values, upper))
        return _magnitude(upper, _kth_largest(fine, rank)[0])

    def variance_threshold(self, refs: Sequence[Ref], k: Callable[[int], int]) -> float:
        """The k-th largest variance over x_1 - x_0, x_2 - x_0, ..., exactly; infinity for a k of 0.

        Args:
            k: (number of variances that are not zero) -> k.
        """
        counts = self._once("variances", refs, lambda: self._count(refs, scans.count_variances))
        wanted = k(int(counts[1, -1]) - self._zeros(counts))
        if wanted == 0:
            return math.inf
        upper, rank = _kth_largest(counts, wanted)
        fine = self._scan(refs, np.zeros(scans.FINE_BINS, np.int64), scans.count_variances_in, np.int32(upper))
        fine[0] -= self._padding(refs) if upper == 0 else 0
        return _magnitude(upper, _kth_largest(_from_top(fine), rank)[0])

    def energies(self, refs: Sequence[Ref], least: float) -> NDArray[np.float64]:
        """Squared norms of x_1 - x_0, ..., over the elements whose variance is ``least`` at least."""
        return self._scan(refs, np.zeros(len(refs) - 1), scans.energies, np.float32(least))

    def total(self, refs: Sequence[Ref], function: Callable[[Sequence[Tensor]], Tensor]) -> NDArray[np.float64]:
        """The sum over blocks of rows of what a function gives for them (float64 [n])."""
        return np.asarray(sum(function(rows).numpy() for rows in self._rows(refs)), dtype=np.float64)

    # ---- computing ---------------------------------------------------------------------------------------------------

    def _once(self, kind: str, refs: Sequence[Ref], compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        key = "|".join([kind, *(f"{source}/{tensor}" for source, tensor in refs)])
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]

    def _padding(self, refs: Sequence[Ref]) -> int:
        return self._read(refs[0]).numel() % 2

    def _scan(self, refs: Sequence[Ref], zeros: NDArray[Any], scan: Callable[..., None], *more: Any) -> NDArray[Any]:
        """Run a compiled scan over all pieces; their totals are added in order, so that threads change no digit."""
        flat = [self._read(ref).view(-1) for ref in refs]
        count = len(flat[0])
        starts = range(0, count, _PIECE)
        totals = [zeros.copy() for _ in starts]

        def work(number: int) -> None:
            parts = [tensor[starts[number] : starts[number] + _PIECE] for tensor in flat]
            if len(parts[0]) % 2:  # a zero makes the last pair whole
                parts = [torch.cat([part, part.new_zeros(1)]) for part in parts]
            arrays = as_pairs(parts)
            together = scan in _TOGETHER
            scan(*(arrays,) if together else arrays, *more, totals[number])

        self._crew.each(work, range(len(totals)))
        return np.asarray(sum(totals[1:], totals[0]) if totals else zeros)

    def _count(self, refs: Sequence[Ref], scan: Callable[..., None]) -> NDArray[np.int64]:
        counts = self._scan(refs, np.zeros(scans.BINS, np.int64), scan)
        counts[0] -= self._padding(refs)
        return _from_top(counts)

    def _rank(self, base: Ref, source: Ref, first_bin: int) -> NDArray[np.float64]:
        """The sums of ``scans.rank_sums``."""
        tensors = [_as_rows(self._read(ref)) for ref in (base, source)]
        rows, length = tensors[0].shape
        step = max(1, _PIECE // length)
        starts = range(0, rows, step)
        sums = np.zeros((len(starts), 2))

        def work(number: int) -> None:
            parts = [tensor[starts[number] : starts[number] + step] for tensor in tensors]
            if length % 2:
                parts = [torch.cat([part, part.new_zeros(len(part), 1)], dim=1) for part in parts]
            arrays = as_pairs([part.reshape(-1) for part in parts])
            half = np.uint64((length + 1) // 2)
            scans.rank_sums(*arrays, half, np.int32(first_bin), sums[number])

        self._crew.each(work, range(len(starts)))
        return np.asarray(sums.sum(axis=0))

    def _value_counts(self, refs: Sequence[Ref], values: Values, upper: int | None = None) -> NDArray[np.int64]:
        counts = np.zeros(scans.BINS if upper is None else scans.FINE_BINS, np.int64)
        for rows in self._rows(refs):
            found = values(rows).reshape(-1).numpy()
            if upper is None:
                scans.count_values(found, counts)
            else:
                scans.count_values_in(found, np.int32(upper), counts)
        return counts

    @staticmethod
    def _zeros(counts: NDArray[np.int64]) -> int:
        """How many values are zero, or too small for float32's exponents."""
        if counts[0, -1] != 0:
            return 0
        return int(counts[1, -1]) - (int(counts[1, -2]) if counts.shape[1] > 1 else 0)

    def _rows(self, refs: Sequence[Ref]) -> Any:
        tensors = [_as_rows(self._read(ref)) for ref in refs]
        rows, length = tensors[0].shape
        step = max(1, (_PIECE // 8) // max(length, 1))
        for begin in range(0, rows, step):
            yield [tensor[begin : begin + step].float() for tensor in tensors]


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)


def _from_top(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """[2, m]: the bins that are not empty from the highest down, and how many values lie in each or above it."""
    bins = np.flatnonzero(counts)[::-1]
    return np.stack([bins, np.cumsum(counts[bins])])


def _kth_largest(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin of the k-th largest value, and its rank (from 1, the largest) in that bin."""
    position = int(np.searchsorted(counts[1], k))
    above = int(counts[1, position - 1]) if position else 0
    return int(counts[0, position]), k - above


def _magnitude(upper: int, lower: int) -> float:
    return float(np.array(upper << 16 | lower, np.uint32).view(np.float32))


@dataclass(frozen=True)
class Facts:
    """What a method may ask of the one tensor that it plans for. Sources are named as in the blend.

    Attributes:
        tensor: name of the merged tensor.
        refs: where each source, and the base, has it.
        statistics: of all tensors.
        seed: of the recipe.
    """

    tensor: str
    refs: Mapping[str, Ref]
    statistics: Statistics
    seed: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def shape(self) -> torch.Size:
        return self.statistics.shape(next(iter(self.refs.values())))

    def inner(self, names: Sequence[str]) -> NDArray[np.float64]:
        """[n, n] inner products of tensors.

        They are made of differences from one of the tensors, so that angles between near ones are exact. A tensor that
        is far smaller than that one would be lost in it, and is then itself the one that differences are taken from.
        """
        order = list(range(len(names)))
        onto = np.eye(len(names))  # x_i = x_0 + (x_i - x_0)
        onto[:, 0] = 1
        while True:
            products = onto @ self.statistics.products([self.refs[names[i]] for i in order]) @ onto.T
            squares = np.diag(products)
            smallest = int(np.argmin(squares))
            if squares[smallest] >= _LOST * squares[0]:
                places = np.argsort(order)
                return np.asarray(products[np.ix_(places, places)])
            order.insert(0, order.pop(smallest))

    def deltas(self, base: str, names: Sequence[str]) -> NDArray[np.float64]:
        """[n, n] inner products of task vectors."""
        return self.statistics.products([self.refs[name] for name in (base, *names)])[1:, 1:]

    def threshold(self, base: str, source: str, k: int) -> float:
        """The k-th largest magnitude of a task vector; see ``Statistics.threshold``."""
        return self.statistics.threshold(self.refs[base], self.refs[source], k)

    def window_sums(self, base: str, source: str, low: float, high: float) -> tuple[float, float]:
        """L1 norms of a task vector: whole, and of its magnitudes from low to below high."""
        return self.statistics.window_sums(self.refs[base], self.refs[source], low, high)

    def mean_rank(self, base: str, source: str) -> float:
        """The mean rank of a task vector's magnitudes within their rows; see ``Statistics.mean_rank``."""
        return self.statistics.mean_rank(self.refs[base], self.refs[source])

    def variance_threshold(self, names: Sequence[str], k: Callable[[int], int]) -> float:
        """The k-th largest variance over task vectors, base named first; see ``Statistics.variance_threshold``."""
        return self.statistics.variance_threshold([self.refs[name] for name in names], k)

    def energies(self, names: Sequence[str], least: float) -> NDArray[np.float64]:
        """Squared norms over the elements that vary by ``least``. The base is named first."""
        return self.statistics.energies([self.refs[name] for name in names], least)

    def value_threshold(self, kind: str, names: Sequence[str], values: Values, k: int) -> float:
        """The k-th largest of values computed from tensors; see ``Statistics.value_threshold``."""
        return self.statistics.value_threshold(kind, [self.refs[name] for name in names], values, k)

    def total(self, names: Sequence[str], function: Callable[[Sequence[Tensor]], Tensor]) -> NDArray[np.float64]:
        """A sum over the tensor's rows; see ``Statistics.total``."""
        return self.statistics.total([self.refs[name] for name in names], function)

    def stream(self, source: str) -> tuple[int, int]:
        """Key of the random bits of this tensor of a source."""
        return stream_key(self.seed, source, self.tensor)
