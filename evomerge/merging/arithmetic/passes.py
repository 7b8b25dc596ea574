"""Passes: what a merge does to one tensor, as data, and how it is computed.

A merge method does not touch weights. It plans: from its numbers and from statistics of the sources it decides which
pass makes the tensor, and with which coefficients.

* ``Combine``: a linear combination of tensors. Everything in the span of the sources is one (linear, SLERP, task
  arithmetic, model stock, Karcher mean, ...), because angles and norms are known beforehand from inner products.
* ``Sparsify``: the base plus a sum of task vectors, each masked by magnitude or at random, with or without an elected
  sign.
* ``Select``: the base plus a mean of task vectors, for the elements that vary most between sources.
* ``Disjoint``: the base plus a sum of task vectors, each masked to its largest elements that no earlier one took.
* ``Largest``: the base plus the largest change of each element.
* ``MaskedMean``: the base plus a mean of task vectors, for each element over those that are large there.
* ``Agreed``: the base plus a sum of task vectors, for the elements that matter to enough sources.
* ``RowFunction``: any function of the rows of a tensor, in plain torch. It is several times slower than those above,
  which are compiled for the CPU.
* ``TensorFunction``: any function of whole tensors, such as a decomposition, in plain torch.

In formulas, b is the base, x_k a source and d_k = x_k - b its task vector.

A new pass needs the members of ``Pass``, and those of ``Differentiable`` if its numbers have derivatives, as all above
except the last two. ``run`` is the plain definition in torch, for any device; ``kernel`` is the same compiled for pairs
of elements on the CPU, and ``jobs`` prefers it. Both import what they compute with only when they are called, because
methods are also looked up by programs that never load torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evomerge.merging.arithmetic.drops import LEVELS, as_signed, limit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Compute: TypeAlias = "Callable[..., Tensor]"
"""(function, its arguments) -> its result: runs a plain definition, either directly or compiled for a device."""

Grain = Literal["element", "row", "tensor"]
"""The smallest unit that a pass can compute alone: an element, a row (of the last dimension), or the whole tensor."""


@dataclass(frozen=True, slots=True)
class Span:
    """The position of a piece in its tensor, for a compiled pass.

    Attributes:
        first: position of the first element, even.
        row: elements in a row of the tensor.
        stream: write past the caches.
    """

    first: int
    row: int
    stream: bool


Kernel = Callable[[tuple[Any, ...], Any, Span], None]
"""(array of pairs of each input, array of pairs to write, span) -> None. ``words.pair`` reads such arrays."""


class Pass(Protocol):
    """How one tensor is made from tensors of its shape."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The sources that are read, in the order in which ``run`` takes their tensors."""

    @property
    def grain(self) -> Grain:
        """The unit that ``run`` needs whole. Its result for one may depend on nothing outside it."""

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute) -> Tensor:
        """Compute a piece.

        Args:
            tensors: of ``inputs``, of any float dtypes; [elements] for grain "element", [rows, length] for grain "row",
                and the tensor's own shape for grain "tensor".
            first: position in the whole tensor of the piece's first element.
            compute: runs functions of tensors, either directly or compiled for the device.

        Returns:
            float32 of the shape of ``tensors``, on their device; or what ``compute`` returned, in the dtype it wrote.
        """

    def kernel(self) -> Kernel | None:
        """The same compiled for the CPU; None if there is only ``run``, which then does not use ``compute``."""


class Differentiable(Pass, Protocol):
    """A pass whose result is a differentiable function of its numbers as long as its masks do not change."""

    @property
    def numbers(self) -> NDArray[np.float64]:
        """These numbers: float64 [numbers], in an order determined by the kind of pass and its inputs."""

    def derivatives(self, tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
        """What a piece adds to the derivative of a loss with respect to each number: float64 [numbers].

        Args:
            tensors, first: as for ``run``.
            gradient: derivative of the loss with respect to each element of the piece, float32 of its shape.
        """


def call(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Run a plain definition directly: the ``Compute`` that compiles nothing."""
    return function(*arguments)


@dataclass(frozen=True)
class Combine:
    """sum_k c_k x_k, with coefficients by name of the source; the base may be one of them."""

    coefficients: Mapping[str, float]

    @property
    def grain(self) -> Grain:
        return "element"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The sources that are read, in order: those whose coefficient is not zero, or the first if all are."""
        used = tuple(name for name, c in self.coefficients.items() if c != 0)
        return used or tuple(self.coefficients)[:1]

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        import torch

        from evomerge.merging.arithmetic.definitions import combine, constants

        coefficients = [self.coefficients[name] for name in self.inputs]
        return compute(combine, tensors, constants(coefficients, torch.float32, tensors[0].device))

    def kernel(self) -> Kernel:
        from evomerge.merging.arithmetic import kernels

        coefficients = tuple(np.float32(self.coefficients[name]) for name in self.inputs)
        return lambda arrays, out, span: kernels.combine(arrays, coefficients, out, span.stream)

    @property
    def numbers(self) -> NDArray[np.float64]:
        return np.array([self.coefficients[name] for name in self.inputs])

    def derivatives(self, tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
        from evomerge.merging.arithmetic.definitions import inner_products

        return inner_products(gradient, tensors)


@dataclass(frozen=True)
class SparsePart:
    """One task vector of a sparsifying merge: w m (x - b).

    Attributes:
        source: its name.
        weight: w, including every factor that rescales what is kept.
        low, high: elements with low <= |x - b| < high are kept.
        key: of the stream of random bits (``drops.stream_key``); None if nothing is random.
        levels: for how many of the 65,536 values of its bits an element is kept; at least one.
        rise: None if the chance to be kept does not depend on the magnitude. Otherwise an element is kept for this many
            more values if it is larger than its partner. The partner is the element of the same row at the distance
            given by ``drops.partner_offsets``, modulo the length of the row, so it is any other element of the row with
            equal chance. The chance to be larger is therefore the element's rank in the row, from 0 to 1, and the
            chance to be kept rises linearly with the rank, although nothing is sorted. Magnitudes are compared by
            their upper 16 bits, about half a percent apart; between equals, the lowest of the element's bits decides.
        share: its share in the sum by which elected parts are divided; see ``Sparsify.divide``.
    """

    source: str
    weight: float
    low: float = 0.0
    high: float = math.inf
    key: tuple[int, int] | None = None
    levels: int = LEVELS
    rise: int | None = None
    share: float = 0.0


@dataclass(frozen=True)
class Sparsify:
    """b + scale * sum_k w_k m_k (x_k - b), where all parts have the same kind of mask.

    Attributes:
        base: name of b.
        parts: one for each source.
        elect: of each element, keep only the parts that have the sign of their sum (a sum of zero counts as positive).
        divide: divide by the sum of the shares of the kept parts, unless it is zero. Only with ``elect``.
        scale: used with ``divide``; otherwise the weights include it.
    """

    base: str
    parts: tuple[SparsePart, ...]
    elect: bool = False
    divide: bool = False
    scale: float = 1.0

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.base, *(part.source for part in self.parts))

    @property
    def grain(self) -> Grain:
        return "element" if self.parts[0].rise is None else "row"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        from evomerge.merging.arithmetic.definitions import sparsify

        return compute(sparsify, tensors, *self._constants(first, tensors[0].device))

    def _constants(self, first: int, device: torch.device) -> tuple[Any, ...]:
        """What the plain definition takes besides the tensors."""
        import torch

        from evomerge.merging.arithmetic.definitions import constants

        parts, ranked = self.parts, self.parts[0].rise is not None
        numbers = [[part.weight, part.low, part.high, part.share, self.scale] for part in parts]
        draws = [
            [*as_signed(part.key), limit(part.levels), limit(part.levels + (part.rise or 0)), first]
            for part in parts
            if part.key is not None
        ]
        drawn = constants(draws, torch.int64, device) if draws else None
        return constants(numbers, torch.float32, device), drawn, self.elect, self.divide, ranked

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The weights, the shares, and the scale."""
        return np.array([*(part.weight for part in self.parts), *(part.share for part in self.parts), self.scale])

    def derivatives(self, tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
        from evomerge.merging.arithmetic.definitions import sparsify_derivatives

        if gradient.device.type == "cpu" and self.parts[0].key is None and not (self.elect and self.divide):
            return self._compiled_derivatives(tensors, gradient)
        return sparsify_derivatives(gradient, tensors, *self._constants(first, tensors[0].device))

    def _compiled_derivatives(self, tensors: Sequence[Tensor], gradient: Tensor) -> Tensor:
        import torch

        from evomerge.merging.arithmetic import kernels

        base, *sources = (tensor.float().numpy() for tensor in tensors)
        weights, low, high = np.array([(p.weight, p.low, p.high) for p in self.parts], dtype=np.float32).T.copy()
        found = np.zeros(self.numbers.size)
        kernels.sparsify_products(gradient.numpy(), base, tuple(sources), weights, low, high, self.elect, found)
        return torch.from_numpy(found)

    def kernel(self) -> Kernel:
        from evomerge.merging.arithmetic import kernels

        parts = self.parts
        drawn, ranked = parts[0].key is not None, parts[0].rise is not None
        windowed = not drawn and any(part.high < math.inf for part in parts)
        arguments = (
            tuple(np.float32(part.weight) for part in parts),
            tuple(np.float32(part.low) for part in parts),
            tuple(np.float32(part.high) for part in parts) if windowed else None,
            tuple((np.uint32(k), np.uint32(m)) for k, m in (part.key or (0, 0) for part in parts)) if drawn else None,
            tuple(np.int32(limit(part.levels)) for part in parts),
            tuple(np.int32(part.rise or 0) for part in parts) if ranked else None,
            tuple(np.float32(part.share) for part in parts) if self.divide else None,
            True if self.elect else None,
            np.float32(self.scale),
        )

        def run(arrays: tuple[Any, ...], out: Any, span: Span) -> None:
            first, row = np.uint64(span.first // 2), np.uint64(max(span.row // 2, 1))
            kernels.sparsify(arrays[0], arrays[1:], *arguments, first, row, out, span.stream)

        return run


@dataclass(frozen=True)
class Select:
    """b + sum_k g_k e_k d_k / sum_k g_k e_k where the d_k vary enough between the sources, else b.

    e_k is 1 where d_k has the sign of sum_k d_k (a sum of zero counts as positive), else 0.

    Attributes:
        base: name of b.
        shares: g_k, by source.
        least: an element is selected if the variance of its d_k over the sources is at least this.
    """

    base: str
    shares: Mapping[str, float]
    least: float

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.base, *self.shares)

    @property
    def grain(self) -> Grain:
        return "element"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        import torch

        from evomerge.merging.arithmetic.definitions import constants, select

        numbers = constants([*self.shares.values(), self.least], torch.float32, tensors[0].device)
        return compute(select, tensors, numbers)

    def kernel(self) -> Kernel:
        from evomerge.merging.arithmetic import kernels

        shares, least = tuple(np.float32(share) for share in self.shares.values()), np.float32(self.least)
        return lambda arrays, out, span: kernels.select(arrays[0], arrays[1:], shares, least, out, span.stream)

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The shares."""
        return np.array([*self.shares.values()])

    def derivatives(self, tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
        from evomerge.merging.arithmetic.definitions import autograd_derivatives

        return autograd_derivatives(self.run, tensors, first, gradient)[:-1]


@dataclass(frozen=True)
class MaskedMean:
    """b + scale * sum_k g_k m_k d_k / sum_k g_k m_k, where m_k is 1 if |d_k| >= ``lows[k]``, else 0; b where all are 0.

    Attributes:
        base: name of b.
        shares: g_k, by source.
        lows: the smallest magnitude that counts, by source.
    """

    base: str
    shares: Mapping[str, float]
    lows: Mapping[str, float]
    scale: float = 1.0

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.base, *self.shares)

    @property
    def grain(self) -> Grain:
        return "element"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        import torch

        from evomerge.merging.arithmetic.definitions import constants, masked_mean

        numbers = [[self.shares[name], self.lows[name], self.scale] for name in self.shares]
        return compute(masked_mean, tensors, constants(numbers, torch.float32, tensors[0].device))

    def kernel(self) -> Kernel:
        from evomerge.merging.arithmetic import kernels

        shares = tuple(np.float32(share) for share in self.shares.values())
        lows, scale = tuple(np.float32(self.lows[name]) for name in self.shares), np.float32(self.scale)
        return lambda arrays, out, span: kernels.masked_mean(
            arrays[0], arrays[1:], shares, lows, scale, out, span.stream
        )

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The shares, and the scale."""
        return np.array([*self.shares.values(), self.scale])

    def derivatives(self, tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
        from torch import cat

        from evomerge.merging.arithmetic.definitions import autograd_derivatives

        found = autograd_derivatives(self.run, tensors, first, gradient)
        return cat([found[:, 0], found[:1, 2]])


@dataclass(frozen=True)
class Largest:
    """b + the w_k d_k of largest magnitude, for each element; of equally large ones, a positive one.

    Attributes:
        base: name of b.
        weights: w_k, by source.
    """

    base: str
    weights: Mapping[str, float]

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.base, *self.weights)

    @property
    def grain(self) -> Grain:
        return "element"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        import torch

        from evomerge.merging.arithmetic.definitions import constants, largest

        return compute(largest, tensors, constants([*self.weights.values()], torch.float32, tensors[0].device))

    def kernel(self) -> Kernel:
        from evomerge.merging.arithmetic import kernels

        weights = tuple(np.float32(weight) for weight in self.weights.values())
        return lambda arrays, out, span: kernels.largest(arrays[0], arrays[1:], weights, out, span.stream)

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The weights."""
        return np.array([*self.weights.values()])

    def derivatives(self, tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
        from evomerge.merging.arithmetic.definitions import autograd_derivatives

        return autograd_derivatives(self.run, tensors, first, gradient)


RANK_BLOCK = 256
"""Elements in a block of a row, within which ``Disjoint`` ranks them."""


@dataclass(frozen=True)
class Disjoint:
    """b + sum_k w_k m_k d_k with masks m_k of which no two have an element in common.

    A row is cut into blocks of ``RANK_BLOCK`` elements; the last may be shorter. In each block, the sources in order
    take their ``kept[k]`` elements of largest magnitude among those that no earlier source took, or all of these if
    there are fewer. Of a shorter block they take the same share, rounded up. Magnitudes are ranked by their upper 16
    bits, about half a percent apart; of equals, the first element is taken first.

    Attributes:
        base: name of b.
        weights: w_k, by source, in the order in which they take elements.
        kept: elements taken of each block, from 1 to ``RANK_BLOCK``, by source.
    """

    base: str
    weights: Mapping[str, float]
    kept: Mapping[str, int]

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.base, *self.weights)

    @property
    def grain(self) -> Grain:
        return "row"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        import torch

        from evomerge.merging.arithmetic.definitions import constants, disjoint

        device = tensors[0].device
        weights = constants([*self.weights.values()], torch.float32, device)
        return compute(disjoint, tensors, weights, constants([*self.kept.values()], torch.int64, device))

    def kernel(self) -> Kernel:
        from evomerge.merging.arithmetic import kernels

        weights = tuple(np.float32(weight) for weight in self.weights.values())
        kept = tuple(np.int16(self.kept[name]) for name in self.weights)
        return lambda arrays, out, span: kernels.disjoint(
            arrays[0], arrays[1:], weights, kept, np.uint64(max(span.row // 2, 1)), out, span.stream
        )

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The weights."""
        return np.array([*self.weights.values()])

    def derivatives(self, tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
        from evomerge.merging.arithmetic.definitions import autograd_derivatives

        return autograd_derivatives(self.run, tensors, first, gradient)


@dataclass(frozen=True)
class Agreed:
    """b + scale * sum_k v_k where |v_k| > r_k |sum_j v_j - v_k| for enough sources k, else b; v_k = w_k d_k.

    Attributes:
        base: name of b.
        weights: w_k, by source.
        ratios: r_k, by source.
        votes: how many sources are enough.
    """

    base: str
    weights: Mapping[str, float]
    ratios: Mapping[str, float]
    votes: int
    scale: float = 1.0

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.base, *self.weights)

    @property
    def grain(self) -> Grain:
        return "element"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        import torch

        from evomerge.merging.arithmetic.definitions import agreed, constants

        numbers = [[self.weights[name], self.ratios[name], self.votes, self.scale] for name in self.weights]
        return compute(agreed, tensors, constants(numbers, torch.float32, tensors[0].device))

    def kernel(self) -> Kernel:
        from evomerge.merging.arithmetic import kernels

        weights = tuple(np.float32(weight) for weight in self.weights.values())
        ratios = tuple(np.float32(self.ratios[name]) for name in self.weights)
        votes, scale = np.float32(self.votes), np.float32(self.scale)
        return lambda arrays, out, span: kernels.agreed(
            arrays[0], arrays[1:], weights, ratios, votes, scale, out, span.stream
        )

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The weights, and the scale."""
        return np.array([*self.weights.values(), self.scale])

    def derivatives(self, tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
        from torch import cat

        from evomerge.merging.arithmetic.definitions import autograd_derivatives

        found = autograd_derivatives(self.run, tensors, first, gradient)
        return cat([found[:, 0], found[:1, 3]])


@dataclass(frozen=True)
class RowFunction:
    """Any function of whole rows.

    Attributes:
        inputs: names of the tensors that it takes.
        function: (float32 tensors [rows, length], position of the first row in the tensor) -> float32 [rows, length].
            Each row of the result may depend only on the same row of the tensors.
    """

    inputs: tuple[str, ...]
    function: Callable[[Sequence[Tensor], int], Tensor] = field(compare=False)

    @property
    def grain(self) -> Grain:
        return "row"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        """See ``Pass.run``. Raises ValueError: the function returned another shape than that of its tensors."""
        made = self.function([tensor.float() for tensor in tensors], first // max(tensors[0].shape[-1], 1))
        return _of_shape(made, tensors[0])

    def kernel(self) -> None:
        return None


@dataclass(frozen=True)
class TensorFunction:
    """Any function of whole tensors.

    Attributes:
        inputs: names of the tensors that it takes.
        function: (float32 tensors in their own shape) -> float32 of that shape. It may use all threads of torch.
    """

    inputs: tuple[str, ...]
    function: Callable[[Sequence[Tensor]], Tensor] = field(compare=False)

    @property
    def grain(self) -> Grain:
        return "tensor"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        """See ``Pass.run``. Raises ValueError: the function returned another shape than that of its tensors."""
        return _of_shape(self.function([tensor.float() for tensor in tensors]), tensors[0])

    def kernel(self) -> None:
        return None


def _of_shape(made: Tensor, given: Tensor) -> Tensor:
    """The result of a function, after checking its shape: a wrong one would broadcast, or fail far from its cause."""
    if made.shape != given.shape:
        raise ValueError(f"the function of a pass returned {list(made.shape)} for tensors {list(given.shape)}")
    return made
