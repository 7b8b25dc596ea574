"""How steps change what was planned: passes that go on with what another one makes, and when none is needed.

* ``Rescale``: its change to the base multiplied by a factor, or one for each row or column.
* ``Change``: any function of its whole change.
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
"""Factors from which on a combination of sources loses digits of small changes: (1 - f) b + f m cancels in float32."""


def scaled(base: str, made: Pass, factor: float) -> Pass:
    """b + f (m - b), m being what ``made`` gives; f is not negative.

    What is a combination, or a sum of masked task vectors of this base, stays one with other numbers.
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
    """b + f (m - b) for a factor of ``Rescale``; what is rescaled already by one such factor is so by their product."""
    if isinstance(made, Rescale) and made.base == base and _multiply(made.factor, factor):
        return replace(made, factor=made.factor * factor)
    return Rescale(base, made, factor)


def _multiply(one: float | Tensor, other: float | Tensor) -> bool:
    """Whether the product of two factors is a factor: not of rows and columns."""
    return isinstance(one, float) or isinstance(other, float) or one.ndim == other.ndim


@dataclass(frozen=True)
class Rescale:
    """b + f (m - b), m being what another pass makes: at the speed of that pass, of whatever kind it is.

    Attributes:
        base: b.
        made: gives m.
        factor: f: one for the tensor; float32 [columns] for the last dimension of a matrix, or [rows, 1].
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
        """The factors of a piece of the base, which broadcast to it."""
        import torch

        if isinstance(self.factor, float):
            return torch.tensor(self.factor, dtype=torch.float32).to(base.device)
        if self.factor.ndim == 1:
            return self.factor.to(base.device)
        shape = base.shape[:-1]
        begin = first // max(base.shape[-1], 1)
        return self.factor[begin : begin + math.prod(shape)].view(*shape, 1).to(base.device)

    def kernel(self) -> Kernel | None:
        """That of ``made`` on a piece, which is still in the processor's cache when it is rescaled."""
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
        """Those of ``made``, and the factor where it is one number. Of a pass that is not differentiable TypeError."""
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
class Change:
    """b + g(m - b), m being what another pass makes, and g any function of the whole change.

    Attributes:
        base: b.
        made: gives m.
        function: (float32 change, in the tensor's own shape; of that shape the task vectors of ``sources``) -> float32
            of that shape. It may write to what it is given, and use every thread of torch.
        sources: whose task vectors the function is given.
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
    """A pass as one of which derivatives can be taken. Raises TypeError: it is none."""
    if not hasattr(made, "derivatives"):  # isinstance of a protocol takes as long as a plan
        raise TypeError(f"{type(made).__name__} has no derivative by its numbers")
    return cast(Differentiable, made)


def with_base(base: str, made: Pass) -> tuple[str, ...]:
    """What a pass reads that changes what another one makes of a base: all that this reads, and the base."""
    return made.inputs if base in made.inputs else (*made.inputs, base)
