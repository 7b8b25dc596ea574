"""Passes of steps: they transform the change that another pass makes to the base.

* ``Rescale``: the change multiplied by one factor, or by one for each row or column.
* ``ChangeFunction``: any function of the whole change.

``scaled`` and ``rescaled`` avoid a second pass where the first one can be planned with other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from evomerge.merging.arithmetic.passes import (
    Agreed,
    Combine,
    Compute,
    Differentiable,
    Grain,
    Kernel,
    MaskedMean,
    Pass,
    Span,
    Sparsify,
    call,
)

if TYPE_CHECKING:
    from torch import Tensor

_LARGE = 16.0
"""From this factor on, (1 - f) b + f m computed as one combination loses digits of small changes to cancellation."""


def scaled(base: str, made: Pass, factor: float) -> Pass:
    """A pass for b + f (m - b), where m is the result of ``made``.

    A combination, or a sum of masked task vectors of this base, remains one with other numbers; anything else becomes a
    ``Rescale``.

    Args:
        base: name of b.
        factor: f, not negative.
    """
    if factor == 1:
        return made
    if isinstance(made, Combine):
        coefficients = {name: factor * c for name, c in made.coefficients.items()}
        coefficients[base] = coefficients.get(base, 0.0) + (1 - factor)
        if max(map(abs, coefficients.values())) < _LARGE:
            return Combine(coefficients)
    if isinstance(made, Agreed | MaskedMean) and made.base == base:
        return replace(made, scale=factor * made.scale)
    if isinstance(made, Sparsify) and made.base == base:
        if made.divide:
            return replace(made, scale=factor * made.scale)
        return replace(made, parts=tuple(replace(part, weight=factor * part.weight) for part in made.parts))
    return rescaled(base, made, factor)


def rescaled(base: str, made: Pass, factor: float | Tensor) -> Pass:
    """A pass for b + f (m - b) with any factor that ``Rescale`` takes; successive factors are multiplied, if possible.

    Args:
        base: name of b.
        made: gives m.
        factor: f: a number, or float32 [columns] or [rows, 1].
    """
    if isinstance(made, Rescale) and made.base == base and _multiply(made.factor, factor):
        return replace(made, factor=made.factor * factor)
    return Rescale(base, made, factor)


def _multiply(one: float | Tensor, other: float | Tensor) -> bool:
    """Whether the product of two factors is a factor again, which it is not for one of rows and one of columns."""
    return isinstance(one, float) or isinstance(other, float) or one.ndim == other.ndim


@dataclass(frozen=True)
class Rescale:
    """b + f (m - b), where m is the result of another pass of any kind; as fast as that pass.

    Attributes:
        base: b.
        made: gives m.
        factor: f: one number for the tensor, or float32 [columns] (for its last dimension), or float32 [rows, 1].
    """

    base: str
    made: Pass
    factor: float | Tensor = field(compare=False)

    @property
    def inputs(self) -> tuple[str, ...]:
        return with_base(self.base, self.made)

    @property
    def grain(self) -> Grain:
        if isinstance(self.factor, float):
            return self.made.grain
        return "tensor" if self.made.grain == "tensor" else "row"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        from evomerge.merging.arithmetic.definitions import rescale

        base = tensors[self.inputs.index(self.base)]
        given = tensors[: len(self.made.inputs)]
        if self.made.grain == "element":
            given = [tensor.reshape(-1) for tensor in given]
        factor = self._factor(base, first)
        if self.made.kernel() is None:  # it does not use ``compute``
            made = self.made.run(given, first, call)
            return rescale(base, factor, lambda: made)
        return self.made.run(given, first, lambda function, *given: compute(rescale, base, factor, function, *given))

    def _factor(self, base: Tensor, first: int) -> Tensor:
        """The factors of a piece of the base: float32 of a shape that broadcasts to the piece."""
        import torch

        if isinstance(self.factor, float):
            return torch.tensor(self.factor, dtype=torch.float32).to(base.device)
        if self.factor.ndim == 1:
            return self.factor.to(base.device)
        shape = base.shape[:-1]
        begin = first // max(base.shape[-1], 1)
        return self.factor[begin : begin + math.prod(shape)].view(*shape, 1).to(base.device)

    def kernel(self) -> Kernel | None:
        """The kernel of ``made``, whose result for a piece is rescaled while it is still in the processor's cache."""
        made = self.made.kernel()
        if made is None or self.grain == "tensor":
            return None
        from evomerge.merging.arithmetic import kernels

        base, count = self.inputs.index(self.base), len(self.made.inputs)
        factors = np.asarray(self.factor, dtype=np.float32)
        by_row, by_column = factors.ndim == 2 or None, factors.ndim == 1 or None
        flat = factors.reshape(-1)

        def run(arrays: tuple[Any, ...], out: Any, span: Span) -> None:
            between = np.empty(2 * len(out) if out.dtype == np.uint32 else len(out), np.float32)
            made(arrays[:count], between, Span(span.first, span.row, stream=False))
            first, row = np.uint64(span.first // 2), np.uint64(max(span.row // 2, 1))
            kernels.rescale(arrays[base], between, flat, by_row, by_column, first, row, out, span.stream)

        return run

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The numbers of ``made``, and the factor if it is a number. Raises TypeError: ``made`` has no derivatives."""
        own = [self.factor] if isinstance(self.factor, float) else []
        return np.array([*differentiable(self.made).numbers, *own])

    def derivatives(self, tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
        from torch import cat

        made, base = differentiable(self.made), tensors[self.inputs.index(self.base)]
        given = tensors[: len(made.inputs)]
        if made.grain == "element":
            given = [tensor.reshape(-1) for tensor in given]
        passed = (gradient * self._factor(base, first)).reshape(given[0].shape)
        found = made.derivatives(given, first, passed)
        if not isinstance(self.factor, float):
            return found
        change = made.run(given, first, call).view(base.shape) - base.float()
        return cat([found, (gradient * change).sum().double()[None]])


@dataclass(frozen=True)
class ChangeFunction:
    """b + g(m - b), where m is the result of another pass and g is any function of the whole change.

    Attributes:
        base: b.
        made: gives m.
        function: g: (change, task vector of each of ``sources``), all float32 in the tensor's own shape -> float32 of
            that shape. It may overwrite its arguments, and use all threads of torch.
        sources: names of the sources whose task vectors the function receives.
    """

    base: str
    made: Pass
    function: Callable[..., Tensor] = field(compare=False)
    sources: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*with_base(self.base, self.made), *self.sources)))

    @property
    def grain(self) -> Grain:
        return "tensor"

    def run(self, tensors: Sequence[Tensor], first: int, compute: Compute = call) -> Tensor:
        from evomerge.merging.arithmetic.nested import made_whole

        base = tensors[self.inputs.index(self.base)]
        change = made_whole(self.made, tensors[: len(self.made.inputs)]).sub_(base)
        vectors = (tensors[self.inputs.index(name)].float() - base for name in self.sources)
        return self.function(change, *vectors).add(base)

    def kernel(self) -> None:
        return None


def differentiable(made: Pass) -> Differentiable:
    """The same pass, typed as differentiable. Raises TypeError: it has no derivatives."""
    if not hasattr(made, "derivatives"):  # isinstance with a protocol takes as long as planning a tensor
        raise TypeError(f"{type(made).__name__} has no derivative by its numbers")
    return cast(Differentiable, made)


def with_base(base: str, made: Pass) -> tuple[str, ...]:
    """The inputs of a pass that transforms the change made by another one: the inputs of that one, and the base."""
    return made.inputs if base in made.inputs else (*made.inputs, base)
