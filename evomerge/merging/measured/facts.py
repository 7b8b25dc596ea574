"""What merge methods may ask of the weights before they merge: computed once for a set of sources, then looked up.

A search merges the same tensors thousands of times. What a candidate's numbers do not change is read from the weights
once and kept as ``evidence``: inner products, how magnitudes are distributed, ranks, and what a method computes itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.errors import InputError
from evomerge.merging.arithmetic import scans
from evomerge.merging.arithmetic.drops import stream_key
from evomerge.merging.arithmetic.jobs import WorkerThreads, as_pairs
from evomerge.merging.measured.evidence import Evidence, Tensors
from evomerge.merging.measured.inputs import LayerInput, LayerInputs, LinearInputs
from evomerge.merging.site import Ref, Site

Values = Callable[[Sequence[Tensor]], Tensor]
"""(float32 rows of some tensors) -> float32 values of that shape."""

# Scans that take all tensors as one tuple, there being any number of them.
_TOGETHER = (
    scans.inner_products,
    scans.delta_signs,
    scans.count_variances,
    scans.count_variances_in,
    scans.energies,
)

_LOST = 1e-6  # of a squared norm: what is smaller has less than ten right digits as a sum of differences

_SORTED = 1 << 16  # elements up to which all magnitudes of a task vector are kept, sorted: a quarter of a megabyte

_PIECE = 1 << 21  # elements; larger than that of a merge, since each piece has totals of its own


class FittedTo(Protocol):
    """What is fitted to right answers of the sources; ``coefficients.Coefficients``."""

    def of(self, base: str, sources: Sequence[str], tensor: str) -> list[float]:
        """How much of each source's change of a tensor of the base is wanted."""
        ...


class Weights:
    """The tensors of all sources, and compiled readings of them.

    Args:
        read: gives a tensor: contiguous, on the CPU, always the same.
        threads: threads to compute with.
        names: of a source the names of all its tensors, for facts of whole models; None where there are no such.
    """

    def __init__(
        self,
        read: Callable[[Ref], Tensor],
        threads: WorkerThreads,
        names: Callable[[str], Collection[str]] | None = None,
    ) -> None:
        self.read = read
        self._threads = threads
        self._names = names

    def each(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """What ``work`` gives for each item, in their order; the items are shared out among threads."""
        made: list[Any] = [None] * len(items)

        def place(number: int) -> None:
            made[number] = work(items[number])

        self._threads.each(place, range(len(items)))
        return made

    def scan(self, refs: Sequence[Ref], zeros: NDArray[Any], scan: Callable[..., None], *more: Any) -> NDArray[Any]:
        """Run a compiled scan over all pieces; their totals are added in order, so that threads change no digit."""
        return self.scan_tensors([self.read(ref) for ref in refs], zeros, scan, *more)

    def scan_tensors(
        self, tensors: Sequence[Tensor], zeros: NDArray[Any], scan: Callable[..., None], *more: Any
    ) -> NDArray[Any]:
        """``scan``, of tensors that are at hand: contiguous, on the CPU, of one number of elements."""
        flat = [tensor.view(-1) for tensor in tensors]
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

        if len(totals) == 1:  # for little, threads take longer to begin than to end
            work(0)
        else:
            self._threads.each(work, range(len(totals)))
        return np.asarray(sum(totals[1:], totals[0]) if totals else zeros)

    def count(self, refs: Sequence[Ref], scan: Callable[..., None]) -> NDArray[np.int64]:
        """[2, m] the bins of a scan that counts values by their upper bits; see ``_from_top``."""
        counts = self.scan(refs, np.zeros(scans.BINS, np.int64), scan)
        counts[0] -= self.padding(refs)
        return _from_top(counts)

    def padding(self, refs: Sequence[Ref]) -> int:
        """How many zeros a scan sees beyond the tensor's end."""
        return self.read(refs[0]).numel() % 2

    def count_model(self, base: str, source: str) -> NDArray[np.int64]:
        """As ``count``, of the magnitudes |x - b| over all tensors that two models both have, in equal shapes."""
        if self._names is None:
            raise ValueError(f"nothing is known of {source} as a whole")
        counts = np.zeros(scans.BINS, np.int64)
        others = set(self._names(base))
        for name in self._names(source):
            refs = (base, name), (source, name)
            if name in others and self.read(refs[0]).shape == self.read(refs[1]).shape:
                counts += self.scan(refs, np.zeros(scans.BINS, np.int64), scans.count_deltas)
                counts[0] -= self.padding(refs)
        return _from_top(counts)

    def rank(self, base: Ref, source: Ref, first_bin: int) -> NDArray[np.float64]:
        """The sums of ``scans.rank_sums``."""
        tensors = [_as_rows(self.read(ref)) for ref in (base, source)]
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

        self._threads.each(work, range(len(starts)))
        return np.asarray(sums.sum(axis=0))

    def count_values(self, refs: Sequence[Ref], values: Values, upper: int | None = None) -> NDArray[np.int64]:
        """Counts of computed values by their upper 16 bits, or of those with these upper bits by their lower 16."""
        counts = np.zeros(scans.BINS if upper is None else scans.FINE_BINS, np.int64)
        for rows in self.rows(refs):
            computed = values(rows).reshape(-1).numpy()
            if upper is None:
                scans.count_values(computed, counts)
            else:
                scans.count_values_in(computed, np.int32(upper), counts)
        return counts

    def rows(self, refs: Sequence[Ref]) -> Iterator[list[Tensor]]:
        """Blocks of rows of some tensors of one shape: float32 [some, length] each."""
        tensors = [_as_rows(self.read(ref)) for ref in refs]
        rows, length = tensors[0].shape
        step = max(1, (_PIECE // 8) // max(length, 1))
        for begin in range(0, rows, step):
            yield [tensor[begin : begin + step].float() for tensor in tensors]


@dataclass(frozen=True)
class Facts:
    """What a method may ask of the one tensor that it plans for. Sources are named as in the blend.

    Attributes:
        site: the tensor.
        weights: of all sources.
        evidence: what is kept of what was computed from them.
        seed: of the recipe.
        inputs: of the sources' layers, where there are calibration texts.
        merged_inputs: the same behind the merged layers before, where the layer is made in its turn.
        fitted: how much of each source right answers want, where there are items that this is fitted to.
    """

    site: Site
    weights: Weights
    evidence: Evidence
    seed: int
    inputs: LayerInputs | None = None
    merged_inputs: LinearInputs | None = None
    fitted: FittedTo | None = None

    @property
    def size(self) -> int:
        return math.prod(self.site.shape)

    def stream(self, source: str) -> tuple[int, int]:
        """Key of the random bits of this tensor of a source."""
        return stream_key(self.seed, source, self.site.name)

    def tensors(self, names: Sequence[str]) -> list[Tensor]:
        """The sources' own tensors, whole, as they are stored."""
        return [self.weights.read(self.site.refs[name]) for name in names]

    def input_of(self, source: str) -> LayerInput:
        """What the layer of a source is given whose weight stands here; of a method that ``needs`` calibration.

        Raises:
            InputError: there are no calibration texts, or the layer cannot be observed.
        """
        if self.inputs is None:
            raise InputError("calibration", f"is needed for {self.site.name}, and there is none")
        return self.inputs.of(self.site.refs[source])

    def channels_of(self, source: str) -> Tensor | None:
        """How large each channel is, as the mean of its magnitude, of what the layer is given whose weight stands here.

        Returns:
            float32 [width]; None where the layer cannot be observed, as in experts that are computed as one.

        Raises:
            InputError: there are no calibration texts.
        """
        if self.inputs is None:
            raise InputError("calibration", f"is needed for {self.site.name}, and there is none")
        return self.inputs.channels(self.site.refs[source])

    def merged_input_of(self, source: str) -> LayerInput:
        """What the layer of a source is given behind the merged layers before; of a method that ``needs`` it.

        Raises:
            InputError: the layer cannot be observed.
        """
        if self.merged_inputs is None:
            raise InputError("recipe", f"{self.site.name} is not made after the layers before it")
        return self.merged_inputs.of(self.site.refs[source])

    def coefficients_of(self, base: str, sources: Sequence[str]) -> list[float]:
        """How much of each source's change of this tensor right answers want; of a method that ``needs`` a fit.

        Raises:
            InputError: there are no items that this could be fitted to.
        """
        if self.fitted is None:
            raise InputError("fit", f"is needed for {self.site.name}, and there is none")
        return self.fitted.of(base, sources, self.site.refs[base][1])

    def once(
        self, kind: str, names: Sequence[str], compute: Callable[[], Tensors], **settings: str | float | bool
    ) -> Tensors:
        """Something computed from the sources' tensors, or looked up where anybody has computed it before.

        Args:
            kind: what it is; another name for another way of computing it.
            names: the sources whose tensors it follows from, in an order that matters.
            compute: gives it, as tensors by name.
            settings: what else it follows from. Nothing that differs between candidates without end belongs here.
        """
        return self.evidence.get(kind, self._followed(names, settings), compute)

    def recurring(
        self, kind: str, names: Sequence[str], compute: Callable[[], Tensors], **settings: str | float | bool
    ) -> Tensors:
        """As ``once``, where ``settings`` may differ with every candidate: kept when the same is asked for again next.

        What is given is the same to the last bit whether it was kept or not.
        """
        key = self._followed(names, settings)
        known = self.evidence.recurs(kind, self.site.refs[names[0]], key)
        return self.evidence.get(kind, key, compute) if known else compute()

    def _followed(self, names: Sequence[str], settings: Mapping[str, str | float | bool]) -> tuple[Any, ...]:
        """All that something follows from."""
        contents = tuple((self.evidence.content_of(self.site.refs[name][0]), self.site.refs[name][1]) for name in names)
        return contents, tuple(sorted(settings.items()))

    def _once(self, kind: str, names: Sequence[str], compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """``once`` for an array."""
        kept = self.once(kind, names, lambda: {"array": torch.from_numpy(np.ascontiguousarray(compute()))})
        return np.asarray(kept["array"].numpy())

    # ---- inner products ----------------------------------------------------------------------------------------------

    def products(self, names: Sequence[str]) -> NDArray[np.float64]:
        """[n, n] inner products of x_0, x_1 - x_0, x_2 - x_0, ..., in float64 to about 15 digits.

        Raises:
            InputError: one has NaN or Inf.
        """

        def compute() -> NDArray[np.float64]:
            zeros = np.zeros((len(names), len(names)))
            lower = self.weights.scan(self._refs(names), zeros, scans.inner_products)
            whole = np.asarray(np.tril(lower) + np.tril(lower, -1).T)
            for name, square in zip(names, np.diag(whole), strict=True):
                if not math.isfinite(square):
                    raise self._broken(name, None if name == names[0] else names[0])
            return whole

        return self._once("products", names, compute)

    def inner(self, names: Sequence[str]) -> NDArray[np.float64]:
        """[n, n] inner products of tensors.

        They are made of differences from one of the tensors, so that angles between near ones are exact. A tensor that
        is far smaller than that one would be lost in it, and is then itself the one that differences are taken from.
        """
        order = list(range(len(names)))
        products = self._inner_from_first(names)
        for _ in names:
            smallest = int(np.argmin(np.diag(products)))
            if not products[smallest, smallest] < _LOST * products[0, 0]:
                break
            order.insert(0, order.pop(smallest))
            products = self._inner_from_first([names[i] for i in order])
        places = np.argsort(order)
        return np.asarray(products[np.ix_(places, places)])

    def _inner_from_first(self, names: Sequence[str]) -> NDArray[np.float64]:
        """[n, n] inner products of tensors, made of differences from the first."""
        onto = np.eye(len(names))  # x_i = x_0 + (x_i - x_0)
        onto[:, 0] = 1
        return np.asarray(onto @ self.products(names) @ onto.T)

    def size_of(self, name: str) -> float:
        """The root of the mean square of a tensor's elements."""
        return math.sqrt(float(self.products([name])[0, 0]) / max(self.size, 1))

    def deltas(self, base: str, names: Sequence[str]) -> NDArray[np.float64]:
        """[n, n] inner products of task vectors."""
        return self.products([base, *names])[1:, 1:]

    def signs(self, names: Sequence[str]) -> NDArray[np.float64]:
        """[3, n, n] how the signs of x_1 - x_0, x_2 - x_0, ... lie to each other; see ``scans.delta_signs``."""
        zeros = np.zeros((3, len(names) - 1, len(names) - 1))
        return self._once("signs", names, lambda: self.weights.scan(self._refs(names), zeros, scans.delta_signs))

    def total(
        self,
        kind: str,
        names: Sequence[str],
        function: Callable[[Sequence[Tensor]], Tensor],
        **settings: str | float | bool,
    ) -> NDArray[np.float64]:
        """The sum over blocks of rows of what a function gives for them (float64 [n]).

        Args:
            kind, settings: as of ``once``.
        """

        def compute() -> Tensors:
            zero = torch.zeros((), dtype=torch.float64)
            return {"array": sum((function(rows).double() for rows in self.weights.rows(self._refs(names))), zero)}

        return np.asarray(self.once(kind, names, compute, **settings)["array"].numpy())

    # ---- magnitudes of task vectors ----------------------------------------------------------------------------------

    def threshold(self, base: str, source: str, k: int) -> float:
        """The k-th largest magnitude |x - b|, k from 1.

        Exact where a tensor is stored as float32. Where both are stored in 16 bits, magnitudes are ranked by their
        upper 16 bits (about half a percent apart), and this is the smallest magnitude with the upper bits of the k-th:
        then a look into a table of counts is all that a candidate costs.
        """
        refs = self._refs((base, source))
        ranked = all(self.weights.read(ref).dtype.itemsize == 2 for ref in refs)
        if not ranked and self.size <= _SORTED:
            return float(self._sorted_magnitudes(base, source)[k - 1])
        upper, rank = _kth_largest(self._magnitudes(base, source), k)
        if ranked:
            return _magnitude(upper, 0)
        fine = self.weights.scan(refs, np.zeros(scans.FINE_BINS, np.int64), scans.count_deltas_in, upper)
        fine[0] -= self.weights.padding(refs) if upper == 0 else 0
        return _magnitude(upper, _kth_largest(_from_top(fine), rank)[0])

    def model_threshold(self, base: str, source: str, share: float) -> float:
        """The magnitude |x - b| that a share of the elements of the whole model reach, one at least.

        All tensors that the base and the source both have count, wherever they stand in the merged model. Magnitudes
        are ranked by their upper 16 bits whatever the dtype, and this is the smallest with the upper bits of the last
        one: a table of counts for a pair of models is all that is kept, and to be more exact would be to read both
        models for every share.
        """
        followed = tuple(self.evidence.content_of(self.site.refs[name][0]) for name in (base, source))
        models = (self.site.refs[name][0] for name in (base, source))

        def compute() -> Tensors:
            return {"array": torch.from_numpy(self.weights.count_model(*models))}

        counts = np.asarray(self.evidence.get("deltas of models", followed, compute)["array"].numpy())
        wanted = max(1, int(share * counts[1, -1]))
        return _magnitude(_kth_largest(counts, wanted)[0], 0)

    def window_sums(self, base: str, source: str, low: float, high: float) -> tuple[float, float]:
        """The sum of all |x - b|, and of those with low <= |x - b| < high."""
        refs = self._refs((base, source))
        total = self.weights.scan(refs, np.zeros(2), scans.window_sums, np.float64(low), np.float64(high))
        return float(total[0]), float(total[1])

    def mean_rank(self, base: str, source: str) -> float:
        """The mean rank of |x - b| within its row, 0 for the smallest and 1 for the largest, weighted by |x - b|.

        Raises:
            InputError: one has NaN or Inf.
        """
        # The highest bin is that of the largest magnitude: eight bins of ranks an octave are 16 of the upper bits each.
        first_bin = int(self._magnitudes(base, source)[0, 0] >> 4) - scans.RANK_BINS + 1
        first, second = self._refs((base, source))

        def compute() -> NDArray[np.float64]:
            sums = self.weights.rank(first, second, first_bin)
            if not math.isfinite(sums[0]):
                raise self._broken(source, base)
            return sums

        total, ranked = self._once("mean ranks", (base, source), compute)
        return float(ranked / total) if total else 0.5

    def _sorted_magnitudes(self, base: str, source: str) -> NDArray[np.float32]:
        """All |x - b| in float32, from the largest down."""

        def compute() -> NDArray[np.float32]:
            before, after = (tensor.reshape(-1).float() for tensor in self.tensors((base, source)))
            return np.asarray((after - before).abs().sort(descending=True).values.numpy())

        return self._once("sorted deltas", (base, source), compute)

    def _magnitudes(self, base: str, source: str) -> NDArray[np.int64]:
        """Counts of |x - b| by their upper 16 bits."""
        refs = self._refs((base, source))
        return self._once("deltas", (base, source), lambda: self.weights.count(refs, scans.count_deltas))

    # ---- other values ------------------------------------------------------------------------------------------------

    def value_threshold(self, kind: str, names: Sequence[str], values: Values, k: int) -> float:
        """The k-th largest of values computed from tensors, exactly, k from 1.

        Args:
            kind: name of the values, for keeping their counts.
        """
        refs = self._refs(names)
        counts = self._once(kind, names, lambda: _from_top(self.weights.count_values(refs, values)))
        upper, rank = _kth_largest(counts, k)
        fine = _from_top(self.weights.count_values(refs, values, upper))
        return _magnitude(upper, _kth_largest(fine, rank)[0])

    def variance_threshold(self, names: Sequence[str], k: Callable[[int], int]) -> float:
        """The k-th largest variance over x_1 - x_0, x_2 - x_0, ..., exactly; infinity for a k of 0.

        Args:
            k: (number of variances that are not zero) -> k.
        """
        refs = self._refs(names)
        counts = self._once("variances", names, lambda: self.weights.count(refs, scans.count_variances))
        wanted = k(int(counts[1, -1]) - _zeros(counts))
        if wanted == 0:
            return math.inf
        upper, rank = _kth_largest(counts, wanted)
        fine = self.weights.scan(refs, np.zeros(scans.FINE_BINS, np.int64), scans.count_variances_in, np.int32(upper))
        fine[0] -= self.weights.padding(refs) if upper == 0 else 0
        return _magnitude(upper, _kth_largest(_from_top(fine), rank)[0])

    def energies(self, names: Sequence[str], least: float) -> NDArray[np.float64]:
        """Squared norms of x_1 - x_0, ..., over the elements whose variance is ``least`` at least."""

        def compute() -> NDArray[np.float64]:
            zeros = np.zeros(len(names) - 1)
            return self.weights.scan(self._refs(names), zeros, scans.energies, np.float32(least))

        # Over all elements they are the same for every candidate, over those above a threshold hardly ever.
        return self._once("energies", names, compute) if least == 0 else compute()

    def _broken(self, source: str, compared: str | None) -> InputError:
        """The error of a source that is not finite, or whose difference to the source ``compared`` is not."""
        difference = "" if compared is None else f" in its difference to {compared}"
        hint = "See which source is broken with `evomerge inspect`."
        return InputError(f"sources.{source}", f"{self.site.name} has NaN or Inf{difference}", hint)

    def _refs(self, names: Sequence[str]) -> list[Ref]:
        return [self.site.refs[name] for name in names]


@dataclass(frozen=True)
class Remembered(Facts):
    """Facts of a tensor that is planned for again and again with the same masks: each threshold is looked for once.

    Where weights are in float32, to look for one is to read them.
    """

    _known: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, facts: Facts) -> Remembered:
        known = facts.weights, facts.evidence, facts.seed, facts.inputs, facts.merged_inputs, facts.fitted
        return cls(facts.site, *known)

    def threshold(self, base: str, source: str, k: int) -> float:
        key = ("threshold", base, source, k)
        if key not in self._known:
            self._known[key] = super().threshold(base, source, k)
        return float(self._known[key])

    def window_sums(self, base: str, source: str, low: float, high: float) -> tuple[float, float]:
        key = ("window sums", base, source, low, high)
        if key not in self._known:
            self._known[key] = super().window_sums(base, source, low, high)
        whole, kept = self._known[key]
        return whole, kept

    def mean_rank(self, base: str, source: str) -> float:
        key = ("mean rank", base, source)
        if key not in self._known:
            self._known[key] = super().mean_rank(base, source)
        return float(self._known[key])


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


def _zeros(counts: NDArray[np.int64]) -> int:
    """How many values are zero, or too small for float32's exponents."""
    if counts[0, -1] != 0:
        return 0
    return int(counts[1, -1]) - (int(counts[1, -2]) if counts.shape[1] > 1 else 0)


def _magnitude(upper: int, lower: int) -> float:
    return float(np.array(upper << 16 | lower, np.uint32).view(np.float32))
