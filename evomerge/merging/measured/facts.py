"""What merge methods may ask of the weights before they merge: computed once for a set of sources, then looked up.

A search merges the same tensors thousands of times. What does not depend on a candidate's numbers is computed from the
weights once and kept as ``evidence``: inner products, distributions of magnitudes, ranks, and what a method computes.
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

# Scans that take any number of tensors, as one tuple.
_TOGETHER = (
    scans.inner_products,
    scans.delta_signs,
    scans.count_variances,
    scans.count_variances_in,
    scans.energies,
)

_LOST = 1e-6  # of a squared norm: smaller ones have fewer than ten correct digits as a sum of differences

_SORTED = 1 << 16  # elements up to which all magnitudes of a task vector are kept, sorted: a quarter of a megabyte

_PIECE = 1 << 21  # elements; larger than in a merge, because each piece has its own totals


class FittedTo(Protocol):
    """The numbers fitted to right answers; ``coefficients.Coefficients``."""

    def of(self, base: str, sources: Sequence[str], tensor: str) -> list[float]:
        """The fitted coefficient of each source's change to a tensor of the base."""
        ...


class IdentifiedFit(FittedTo, Protocol):
    """The same with the identity of the fit, which a recipe names."""

    @property
    def digest(self) -> str:
        """The digest of the items and of the settings of the fit."""
        ...


class Weights:
    """The tensors of all sources, and compiled scans over them.

    Args:
        read: returns a tensor: contiguous, on the CPU, always the same.
        threads: the threads to compute with.
        names: returns the names of all tensors of a source, for facts about whole models; None without such facts.
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
        """The results of ``work`` for each item, in order; the items are distributed over threads."""
        made: list[Any] = [None] * len(items)

        def place(number: int) -> None:
            made[number] = work(items[number])

        self._threads.each(place, range(len(items)))
        return made

    def scan(self, refs: Sequence[Ref], zeros: NDArray[Any], scan: Callable[..., None], *more: Any) -> NDArray[Any]:
        """Run a compiled scan over all pieces; totals are added in order, so results do not depend on threads."""
        return self.scan_tensors([self.read(ref) for ref in refs], zeros, scan, *more)

    def scan_tensors(
        self, tensors: Sequence[Tensor], zeros: NDArray[Any], scan: Callable[..., None], *more: Any
    ) -> NDArray[Any]:
        """``scan`` for given tensors: contiguous, on the CPU, with equal numbers of elements."""
        flat = [tensor.view(-1) for tensor in tensors]
        count = len(flat[0])
        starts = range(0, count, _PIECE)
        totals = [zeros.copy() for _ in starts]

        def work(number: int) -> None:
            parts = [tensor[starts[number] : starts[number] + _PIECE] for tensor in flat]
            if len(parts[0]) % 2:  # a zero completes the last pair
                parts = [torch.cat([part, part.new_zeros(1)]) for part in parts]
            arrays = as_pairs(parts)
            together = scan in _TOGETHER
            scan(*(arrays,) if together else arrays, *more, totals[number])

        if len(totals) == 1:  # for a single piece, starting threads takes longer
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
        """As ``count``, for the magnitudes |x - b| over all tensors that both models have in equal shapes."""
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
    """What a method may ask about the tensor that it plans for. Sources are named as in the blend.

    Attributes:
        site: the tensor.
        weights: of all sources.
        evidence: keeps what was computed from them.
        seed: of the recipe.
        inputs: of the sources' layers, if there are calibration texts.
        merged_inputs: the same behind the merged layers before, if layers are made in order.
        fitted: coefficients fitted to right answers, if there are items to fit to.
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
        """The key of the random bits for this tensor of a source."""
        return stream_key(self.seed, source, self.site.name)

    def tensors(self, names: Sequence[str]) -> list[Tensor]:
        """The sources' tensors, whole, as they are stored."""
        return [self.weights.read(self.site.refs[name]) for name in names]

    def input_of(self, source: str) -> LayerInput:
        """The input statistics of the source's layer with this weight; for a method that ``needs`` calibration.

        Raises:
            InputError: there are no calibration texts, or the layer cannot be observed.
        """
        if self.inputs is None:
            raise InputError("calibration", f"is needed for {self.site.name}, and there is none")
        return self.inputs.of(self.site.refs[source])

    def channels_of(self, source: str) -> Tensor | None:
        """The mean magnitude of each input channel of the source's layer with this weight.

        Returns:
            float32 [width]; None if the layer cannot be observed, as for experts that are computed as one.

        Raises:
            InputError: there are no calibration texts.
        """
        if self.inputs is None:
            raise InputError("calibration", f"is needed for {self.site.name}, and there is none")
        return self.inputs.channels(self.site.refs[source])

    def merged_input_of(self, source: str) -> LayerInput:
        """The same input statistics behind the merged layers before; for a method that ``needs`` them.

        Raises:
            InputError: the layer cannot be observed.
        """
        if self.merged_inputs is None:
            raise InputError("recipe", f"{self.site.name} is not made after the layers before it")
        return self.merged_inputs.of(self.site.refs[source])

    def coefficients_of(self, base: str, sources: Sequence[str]) -> list[float]:
        """The fitted coefficient of each source's change to this tensor; for a method that ``needs`` a fit.

        Raises:
            InputError: there are no items to fit to.
        """
        if self.fitted is None:
            raise InputError("fit", f"is needed for {self.site.name}, and there is none")
        return self.fitted.of(base, sources, self.site.refs[base][1])

    def once(
        self, kind: str, names: Sequence[str], compute: Callable[[], Tensors], **settings: str | float | bool
    ) -> Tensors:
        """Something computed from the sources' tensors, or looked up if any process has computed it before.

        Args:
            kind: what it is; a different computation needs a different name.
            names: the sources whose tensors it depends on; the order matters.
            compute: returns it, as tensors by name.
            settings: what else it depends on. They must take few values over a search.
        """
        return self.evidence.get(kind, self._followed(names, settings), compute)

    def recurring(
        self, kind: str, names: Sequence[str], compute: Callable[[], Tensors], **settings: str | float | bool
    ) -> Tensors:
        """As ``once``, but ``settings`` may differ with every candidate: kept if the same is asked for again next.

        The result is the same to the last bit whether it was kept or not.
        """
        key = self._followed(names, settings)
        known = self.evidence.recurs(kind, self.site.refs[names[0]], key)
        return self.evidence.get(kind, key, compute) if known else compute()

    def _followed(self, names: Sequence[str], settings: Mapping[str, str | float | bool]) -> tuple[Any, ...]:
        """Everything that a result depends on."""
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

        They are computed from differences to one of the tensors, so that angles between close tensors are exact. A
        tensor that is far smaller would lose its digits, and is then used as the reference itself.
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
        """[n, n] inner products of tensors, from differences to the first."""
        onto = np.eye(len(names))  # x_i = x_0 + (x_i - x_0)
        onto[:, 0] = 1
        return np.asarray(onto @ self.products(names) @ onto.T)

    def size_of(self, name: str) -> float:
        """The root mean square of a tensor's elements."""
        return math.sqrt(float(self.products([name])[0, 0]) / max(self.size, 1))

    def deltas(self, base: str, names: Sequence[str]) -> NDArray[np.float64]:
        """[n, n] inner products of task vectors."""
        return self.products([base, *names])[1:, 1:]

    def signs(self, names: Sequence[str]) -> NDArray[np.float64]:
        """[3, n, n] how the signs of x_1 - x_0, x_2 - x_0, ... agree; see ``scans.delta_signs``."""
        zeros = np.zeros((3, len(names) - 1, len(names) - 1))
        return self._once("signs", names, lambda: self.weights.scan(self._refs(names), zeros, scans.delta_signs))

    def total(
        self,
        kind: str,
        names: Sequence[str],
        function: Callable[[Sequence[Tensor]], Tensor],
        **settings: str | float | bool,
    ) -> NDArray[np.float64]:
        """The sum of a function over blocks of rows: float64 [n].

        Args:
            kind, settings: as for ``once``.
        """

        def compute() -> Tensors:
            zero = torch.zeros((), dtype=torch.float64)
            return {"array": sum((function(rows).double() for rows in self.weights.rows(self._refs(names))), zero)}

        return np.asarray(self.once(kind, names, compute, **settings)["array"].numpy())

    # ---- magnitudes of task vectors ----------------------------------------------------------------------------------

    def threshold(self, base: str, source: str, k: int) -> float:
        """The k-th largest magnitude |x - b|, k from 1.

        Exact if a tensor is stored as float32. If both are stored in 16 bits, magnitudes are ranked by their upper 16
        bits (about half a percent apart), and this is the smallest magnitude with the upper bits of the k-th, so that a
        candidate only needs a lookup in a table of counts.
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
        """The magnitude |x - b| that a share of the whole model's elements reach, at least one of them.

        All tensors that both the base and the source have count, wherever they are in the merged model. Magnitudes are
        ranked by their upper 16 bits whatever the dtype, and this is the smallest with the upper bits of the last one.
        Only a table of counts is kept for a pair of models; an exact result would need to read both models for every
        share.
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
        # The highest bin is that of the largest magnitude; a bin covers 16 values of the upper bits, an eighth octave.
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
        """All |x - b| in float32, in descending order."""

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

        # Over all elements they are the same for every candidate; above a threshold they hardly ever are.
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
    """Facts for a tensor that is planned repeatedly with the same masks: each threshold is computed once.

    With float32 weights, computing a threshold means reading them.
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
    """[2, m]: the nonempty bins from the highest down, and how many values are in each or above it."""
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
