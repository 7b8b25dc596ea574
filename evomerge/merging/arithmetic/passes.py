"""What a merge does to one tensor, as data, and how it is done.

A merge method does not touch weights. It plans: from its numbers and from statistics of the sources it decides which
pass makes the tensor, and with which coefficients.

* ``Combine``: a linear combination of tensors. Everything in the span of the sources is one (linear, SLERP, task
  arithmetic, model stock, Karcher mean, ...), since angles and norms are known from inner products beforehand.
* ``Sparsify``: the base and a sum of task vectors, each masked by magnitude or at random, with or without an elected
  sign.
* ``Select``: the base and a mean of task vectors, over the elements that vary most between sources.
* ``Disjoint``: the base and a sum of task vectors, of which each takes the largest elements that are left to it.
* ``Largest``: the base and of every element the largest change.
* ``MaskedMean``: the base and a mean of task vectors, of each element over those that are large there.
* ``Agreed``: the base and a sum of task vectors, over the elements that matter to enough sources.
* ``Elementwise``: any function of the rows of a tensor, for what is neither. It runs in plain torch, several times
  slower than those before, which are compiled for the CPU.
* ``Whole``: any function of whole tensors, such as a decomposition, in plain torch.

Others may be added: whatever has the members of ``Pass``, and of ``Differentiable`` where its numbers are to have
derivatives, as those of all above but the last two have. ``run`` is the plain definition in torch, for any device;
``kernel`` the same compiled for pairs of elements on the CPU, which ``jobs`` prefers where there is one. Both import
what they compute with when they are called: methods, which make passes, are looked up where no tensor is near.
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
"""(function, its arguments) -> its result: how a plain definition is run, as it stands or compiled for a device."""

Grain = Literal["element", "row", "tensor"]
"""What a pass must be given whole: nothing but elements, whole rows (of the last dimension), or whole tensors."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a run of elements lies in its tensor, for a compiled pass.

    Attributes:
        first: number of the first element, even.
        row: elements in a row.
        stream: write past the caches.
    """

    first: int
    row: int
    stream: bool


Kernel = Callable[[tuple[Any, ...], Any, Span], None]
"""(arrays of pairs, one an input; the array to write; where) -> nothing. Arrays are as ``words.pair`` reads them."""


class Pass(Protocol):
    """How one tensor is made from tensors of its shape."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The sources that are read, in the order in which ``run`` takes their tensors."""

    @property
    def grain(self) -> Grain:
        """What ``run`` must be given whole. What it gives for that may hang on nothing else."""

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute) -> Tensor:
        """Make a piece, on the device of ``tensors``, in float32.

        Args:
            tensors: flat [elements] of grain "element", [rows, length] of grain "row", in the shape of the tensor of
                grain "tensor"; of any float dtypes.
            first: number of the piece's first element in the whole.
            compute: runs functions of tensors, as they stand or compiled for the device.
        """

    def kernel(self) -> Kernel | None:
        """The same compiled for the CPU; None where there is nothing but ``run``, and that does not use ``compute``."""


class Differentiable(Pass, Protocol):
    """A pass with numbers that what it makes follows without jumps, while its masks stay as they are."""

    @property
    def numbers(self) -> NDArray[np.float64]:
        """These numbers: float64 [numbers], in an order that the kind of pass and its inputs decide."""

    def derivatives(self, tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
        """The derivative of a loss by each number, as far as it follows from a piece: float64 [numbers].

        Args:
            tensors, first: as of ``run``.
            gradient: float32 of the piece's shape, the derivative of the loss by its elements.
        """


def call(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Run a plain definition as it stands."""
    return function(*arguments)


@dataclass(frozen=True)
class Combine:
    """sum_k c_k x_k, by name of the source; the base may be one."""

    coefficients: Mapping[str, float]

    @property
    def grain(self) -> Grain:
        return "element"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The sources that are read, in order: those whose coefficient is not zero, one of them at least."""
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
        weight: w, with every factor that rescales what is kept.
        low, high: kept are the magnitudes of low <= |x - b| < high.
        key: of the stream of random bits; None where nothing is drawn.
        levels: how many of the 65,536 values of an element's bits keep it, one at least.
        rise: None where the chance does not hang on the magnitude, else how many more keep an element that is larger
            than the one it meets. Each element of a row meets the one so many places further as ``drops.turns``
            says, the row being a ring. What it meets is then any other element of its row with equal chance, so the
            chance to be the larger is its rank in the row, from 0 to 1, and the chance to be kept rises evenly with
            the rank: no element is ever ranked. Magnitudes are compared by their upper 16 bits, about half a percent
            apart; between equals the lowest of the element's bits decides.
        share: what the sum of elected parts is divided by, summed over those that agree; see ``Sparsify``.
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
    """b + scale * sum_k w_k m_k (x_k - b), all parts masked in the same way.

    Attributes:
        elect: keep of each element only the parts whose sign is that of their sum (a sum of zero counts as positive).
        divide: divide by the sum of the shares of the kept parts, where that is not zero.
        scale: used with ``divide``; elsewhere it is in the weights.
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
        """``tensors`` are flat from element ``first`` of the whole, or whole rows where elements of a row meet."""
        from evomerge.merging.arithmetic.definitions import sparsify

        return compute(sparsify, tensors, *self._constants(first, tensors[0].device))

    def _constants(self, first: int, device: torch.device) -> tuple[Any, ...]:
        """What the plain definition takes beside the tensors."""
        import torch

        from evomerge.merging.arithmetic.definitions import constants

        parts, meet = self.parts, self.parts[0].rise is not None
        numbers = [[part.weight, part.low, part.high, part.share, self.scale] for part in parts]
        draws = [
            [*as_signed(part.key), limit(part.levels), limit(part.levels + (part.rise or 0)), first]
            for part in parts
            if part.key is not None
        ]
        drawn = constants(draws, torch.int64, device) if draws else None
        return constants(numbers, torch.float32, device), drawn, self.elect, self.divide, meet

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
        drawn, meeting = parts[0].key is not None, parts[0].rise is not None
        windowed = not drawn and any(part.high < math.inf for part in parts)
        arguments = (
            tuple(np.float32(part.weight) for part in parts),
            tuple(np.float32(part.low) for part in parts),
            tuple(np.float32(part.high) for part in parts) if windowed else None,
            tuple((np.uint32(k), np.uint32(m)) for k, m in (part.key or (0, 0) for part in parts)) if drawn else None,
            tuple(np.int32(limit(part.levels)) for part in parts),
            tuple(np.int32(part.rise or 0) for part in parts) if meeting else None,
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
    """b + sum_k g_k e_k d_k / sum_k g_k e_k where the task vectors vary enough between the sources, else b.

    Attributes:
        shares: g_k, by source.
        least: smallest variance over the sources of an element that is selected.
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
        from evomerge.merging.arithmetic.definitions import by_numbers

        return by_numbers(self.run, tensors, first, gradient)[:-1]


@dataclass(frozen=True)
class MaskedMean:
    """b + scale * sum_i g_i m_i d_i / sum_i g_i m_i, with m_i = 1 where |d_i| is at least ``lows[i]``; b where none is.

    Attributes:
        shares: g_i, by source.
        lows: by source.
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

        from evomerge.merging.arithmetic.definitions import by_numbers

        found = by_numbers(self.run, tensors, first, gradient)
        return cat([found[:, 0], found[:1, 2]])


@dataclass(frozen=True)
class Largest:
    """b + w_i d_i, of each element that whose magnitude is largest; of equally large ones the positive one.

    Attributes:
        weights: w_i, by source.
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
        from evomerge.merging.arithmetic.definitions import by_numbers

        return by_numbers(self.run, tensors, first, gradient)


RANKED = 256
"""Elements of a row among which ``Disjoint`` ranks."""


@dataclass(frozen=True)
class Disjoint:
    """b + sum_i w_i m_i d_i with masks m_i of which no two have an element in common.

    A row is cut into blocks of ``RANKED`` elements, the last one shorter. One source after another takes of each block
    the ``kept[i]`` largest magnitudes among the elements that no source before it took (of a shorter block as large a
    share, rounded up), or all where so many are not left. Magnitudes are ranked by their upper 16 bits, about half a
    percent apart; between equals the first element comes first.

    Attributes:
        weights: w_i, by source, in the order in which they take.
        kept: from 1 to ``RANKED``, by source.
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
        from evomerge.merging.arithmetic.definitions import by_numbers

        return by_numbers(self.run, tensors, first, gradient)


@dataclass(frozen=True)
class Agreed:
    """b + scale * sum_i v_i, v_i = w_i d_i, where |v_i| > r_i |sum_j v_j - v_i| for enough sources i, else b.

    Attributes:
        weights: w_i, by source.
        ratios: r_i, by source.
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

        from evomerge.merging.arithmetic.definitions import by_numbers

        found = by_numbers(self.run, tensors, first, gradient)
        return cat([found[:, 0], found[:1, 3]])


@dataclass(frozen=True)
class Elementwise:
    """Any function of whole rows.

    Attributes:
        inputs: names of the tensors that it takes.
        function: (float32 tensors [rows, length], number of the first row) -> float32 of that shape. What it gives for
            a row may hang on that row alone.
    """

    inputs: tuple[str, ...]
    function: Callable[[Sequence[Tensor], int], Tensor] = field(compare=False)

    @property
    def grain(self) -> Grain:
        return "row"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        """``tensors`` are whole rows [rows, length] from element ``first`` of the whole."""
        made = self.function([tensor.float() for tensor in tensors], first // max(tensors[0].shape[-1], 1))
        return _of_shape(made, tensors[0])

    def kernel(self) -> None:
        return None


@dataclass(frozen=True)
class Whole:
    """Any function of whole tensors.

    Attributes:
        inputs: names of the tensors that it takes.
        function: (float32 tensors, in their own shape) -> float32 of that shape. It may use every thread of torch.
    """

    inputs: tuple[str, ...]
    function: Callable[[Sequence[Tensor]], Tensor] = field(compare=False)

    @property
    def grain(self) -> Grain:
        return "tensor"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        return _of_shape(self.function([tensor.float() for tensor in tensors]), tensors[0])

    def kernel(self) -> None:
        return None


def _of_shape(made: Tensor, given: Tensor) -> Tensor:
    """What a function made, which else would be spread over the elements, or fail far from it."""
    if made.shape != given.shape:
        raise ValueError(f"the function of a pass returned {list(made.shape)} for tensors {list(given.shape)}")
    return made
