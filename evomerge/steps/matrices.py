"""Steps on the weights of linear layers as matrices: what they share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from evomerge.merging.arithmetic.changes import Change
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
        vectors: the task vectors of the blend's sources, of that shape; none where a step does not ask for them.
        noise: the largest singular value that rounding may have.
        decompose: gives its spectrum, looked up where the change before was the same.
    """

    change: Tensor
    vectors: Sequence[Tensor]
    noise: float
    decompose: Callable[[], Spectrum]


OfMatrix: TypeAlias = "Callable[[Matrix], Tensor]"
"""(a matrix's change) -> another change, float32 [out, in]."""


def matrix_by_matrix(
    facts: Facts, blend: Blend, step: str, made: Pass, function: OfMatrix, *, with_sources: bool = False
) -> Pass:
    """What a method made, with the change of each matrix of a layer replaced; of all other tensors as it is.

    Args:
        step: the name of the step that does so.
        function: gives the other change.
        with_sources: it looks at the task vectors of the blend's sources too.
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

    return Change(base, made, of_tensor, blend.sources if with_sources else ())


def _origin(facts: Facts, blend: Blend, step: str) -> str:
    """All numbers that a change follows from which comes to a step, as a digest; empty where that is not known."""
    names = [given.name for given in blend.steps]
    if names.count(step) != 1 or facts.inputs is not None:
        return ""
    before = blend.model_copy(update={"steps": blend.steps[: names.index(step)]})
    return hashlib.sha256(f"{facts.seed} {before.model_dump_json()}".encode()).hexdigest()


def _matrices(tensor: Tensor, input_axis: int) -> Tensor:
    """A tensor of a layer as [matrices, out, in], of the same memory."""
    stacked = tensor.view(-1, *tensor.shape[-2:])
    return stacked if input_axis == 1 else stacked.transpose(1, 2)
