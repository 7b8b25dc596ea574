"""Shared by steps that treat the weights of linear layers as matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from evomerge.merging.arithmetic.changes import ChangeFunction
from evomerge.merging.arithmetic.passes import Pass
from evomerge.merging.plans import base_of
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.arithmetic.spectra import Spectrum
    from evomerge.merging.measured.evidence import Tensors
    from evomerge.merging.measured.facts import Facts


@dataclass(frozen=True)
class Matrix:
    """The change of one layer's matrix.

    Attributes:
        change: float32 [out, in].
        vectors: the task vectors of the blend's sources, of the same shape; empty unless the step asks for them.
        noise: an upper bound on singular values that are due to rounding.
        decompose: returns the SVD, from the cache if the change was computed before.
    """

    change: Tensor
    vectors: Sequence[Tensor]
    noise: float
    decompose: Callable[[], Spectrum]


OfMatrix: TypeAlias = "Callable[[Matrix], Tensor]"
"""(a matrix's change) -> the new change, float32 [out, in]."""


def matrix_by_matrix(
    facts: Facts, blend: Blend, step: str, made: Pass, function: OfMatrix, *, with_sources: bool = False
) -> Pass:
    """What the method computed, with the change of each matrix of a layer replaced; other tensors are unchanged.

    Args:
        step: the name of the step.
        function: computes the new change.
        with_sources: whether it also uses the task vectors of the blend's sources.
    """
    if not facts.site.matrices:
        return made
    from evomerge.merging.arithmetic.spectra import Spectrum, rounding, spectrum

    base = base_of(blend)
    noise, origin = rounding(facts.site.shape, facts.size_of(base)), _origin(facts, blend, step)

    def decomposed(number: int, change: Tensor) -> Spectrum:
        def compute() -> Tensors:
            found = spectrum(change, noise, name=facts.site.name)
            return {"vectors": found.vectors.float().contiguous(), "sizes": found.sizes}

        kind, names = f"spectrum of a change 1, matrix {number}", (base, *blend.sources)
        found = facts.recurring(kind, names, compute, origin=origin) if origin else compute()
        return Spectrum(found["vectors"].double(), found["sizes"])

    def of_tensor(change: Tensor, *vectors: Tensor) -> Tensor:
        own, *others = (_matrices(tensor, facts.site.input_axis) for tensor in (change, *vectors))
        for number, matrix in enumerate(own):
            of_sources = [of_source[number] for of_source in others]
            matrix.copy_(function(Matrix(matrix, of_sources, noise, partial(decomposed, number, matrix))))
        return change

    return ChangeFunction(base, made, of_tensor, blend.sources if with_sources else ())


def _origin(facts: Facts, blend: Blend, step: str) -> str:
    """A digest of all numbers that determine a change before the step; empty if they are not known."""
    names = [given.name for given in blend.steps]
    if names.count(step) != 1 or facts.inputs is not None:
        return ""
    before = blend.model_copy(update={"steps": blend.steps[: names.index(step)]})
    return hashlib.sha256(f"{facts.seed} {before.model_dump_json()}".encode()).hexdigest()


def _matrices(tensor: Tensor, input_axis: int) -> Tensor:
    """View a tensor of a layer as [matrices, out, in], without copying."""
    stacked = tensor.view(-1, *tensor.shape[-2:])
    return stacked if input_axis == 1 else stacked.transpose(1, 2)
