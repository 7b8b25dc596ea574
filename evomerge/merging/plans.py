"""How plans read a blend, and the passes that several methods use.

A method plans: it turns a blend's numbers, and facts about the weights, into one of the passes of ``passes``, which do
the work on tensors of any float dtype in float32 and round once. "A tensor" is one named array of weights; norms,
angles, ranks and densities are taken tensor by tensor.

In the equations of ``evomerge.methods`` b is the base, x_i source i, d_i = x_i - b its task vector, w_i its weight, p_i
its density and m_i a mask of zeros and ones.

Weights are not normalised unless a blend says ``normalize: true``: merges that amplify (such as weights that sum to
two) are often the best, and a search could not reach them otherwise. Methods that are means by definition do normalise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Combine, Pass, RowFunction, SparsePart, Sparsify
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.facts import Facts


def number(blend: Blend, name: str, default: float) -> float:
    """One number for all sources; a float with an integer value if the parameter's kind is "int"."""
    return blend.value(name) if name in blend.parameters else default


def choice(blend: Blend, name: str, default: str) -> str:
    """The chosen name, for all sources."""
    return blend.choice(name) if name in blend.parameters else default


def values(blend: Blend, name: str) -> list[float]:
    """One number for each source."""
    return [blend.value(name, source) for source in blend.sources]


def switch(blend: Blend, name: str, default: bool) -> bool:
    """A yes or no."""
    return bool(blend.parameters.get(name, default))


def weights(blend: Blend, *, normalize: bool) -> list[float]:
    """The weights, divided by their sum if the blend (or by default ``normalize``) says so and the sum is not zero."""
    raw = values(blend, "weight")
    total = sum(raw)
    return raw if cancel(raw) or not switch(blend, "normalize", normalize) else [w / total for w in raw]


def cancel(weights: Sequence[float]) -> bool:
    """Whether weights sum to zero up to rounding: 0.1 + 0.2 - 0.3 is not exactly 0."""
    return abs(sum(weights)) <= 1e-8 * sum(abs(w) for w in weights)


def base_of(blend: Blend) -> str:
    """The base of a blend that passed ``check_blend`` for a method that needs one."""
    if blend.base is None:
        raise ValueError(f"{blend.method} needs a base")
    return blend.base


_LARGE = 16.0
"""The factor above which a combination of sources loses digits of small changes: (1 - f) b + f x cancels in float32."""


def along(base: str, sources: Sequence[str], factors: Sequence[float]) -> Pass:
    """b + sum_i f_i d_i for factors of any size, as for task vectors that are much shorter than others."""
    if max(map(abs, factors)) < _LARGE:
        return added(base, sources, factors)
    return Sparsify(base, tuple(SparsePart(name, f) for name, f in zip(sources, factors, strict=True) if f))


def added(base: str, sources: Sequence[str], factors: Sequence[float]) -> Combine:
    """b + sum_i f_i d_i."""
    coefficients = {base: 1 - sum(factors)}
    for source, factor in zip(sources, factors, strict=True):
        coefficients[source] = coefficients.get(source, 0.0) + factor
    return Combine(coefficients)


def added_mean(blend: Blend, factor: float) -> Pass:
    """b + f times the mean of the task vectors."""
    return added(base_of(blend), blend.sources, [factor / len(blend.sources)] * len(blend.sources))


def kept_change(rows: int, columns: int, count: int) -> int:
    """The bytes that ``along_kept`` keeps per matrix [out, in]."""
    return 4 * rows * columns


def along_kept(
    facts: Facts, blend: Blend, kind: str, change: Callable[[Sequence[Tensor]], Tensor], factor: float
) -> Pass:
    """b + f times a change that depends on the sources alone, computed once for each of a tensor's matrices.

    Args:
        kind: of the evidence.
        change: (the task vectors of a matrix, float32 [out, in]) -> the change to it, of that kind.
    """
    from evomerge.merging.normal_equations import changes, input_side

    names, site = (base_of(blend), *blend.sources), facts.site

    def compute() -> dict[str, Tensor]:
        import torch

        made = [change(changes(facts, names, number)) for number in range(site.matrices)]
        return {"change": torch.cat([input_side(matrix, site.input_axis) for matrix in made]).contiguous()}

    kept = facts.once(kind, names, compute)["change"]

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        (origin,) = tensors
        return origin.add(kept[first_row : first_row + len(origin)].to(origin.device), alpha=factor)

    return RowFunction(names[:1], rows)
