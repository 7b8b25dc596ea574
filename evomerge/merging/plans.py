"""What a merge method is, and how its plans read a blend.

A method plans: it turns a blend's numbers, and facts about the weights, into one of the four passes of ``passes``,
which do the work on tensors of any float dtype in float32 and round once. "A tensor" is one named array of weights;
norms, angles, ranks and densities are taken tensor by tensor.

In the equations b is the base, x_i source i, d_i = x_i - b its task vector, w_i its weight, p_i its density and m_i a
mask of zeros and ones.

Weights are not normalised unless a blend says ``normalize: true``: merges that amplify (weights that sum to two, say)
are often the best ones, and a search could not reach them. Methods that are means by definition do normalise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from evomerge.merging.facts import Facts
from evomerge.merging.passes import Combine, Part, Pass, Sparsify
from evomerge.method_spec import MethodSpec
from evomerge.recipe import Blend

Plan = Callable[[Facts, Blend], Pass]
"""(facts about one tensor, blend) -> how it is made. Equal arguments give equal plans."""


@dataclass(frozen=True)
class Method:
    """A merge method: what it needs and takes, and its equation.

    ``limits`` are the values, (lowest, highest), that a parameter may have at all, where there are such: a recipe
    outside them is refused. The ranges in ``spec`` are only what a search walks by default.
    """

    spec: MethodSpec
    plan: Plan
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def number(blend: Blend, name: str, default: float) -> float:
    """One number for all sources."""
    return blend.value(name) if name in blend.parameters else default


def values(blend: Blend, name: str) -> list[float]:
    """One number for each source."""
    return [blend.value(name, source) for source in blend.sources]


def switch(blend: Blend, name: str, default: bool) -> bool:
    """A yes or no."""
    return bool(blend.parameters.get(name, default))


def weights(blend: Blend, *, normalize: bool) -> list[float]:
    """The weights, over their sum where the blend says so (or, silent, ``normalize``) and that is not nothing."""
    found = values(blend, "weight")
    total = sum(found)
    return found if cancel(found) or not switch(blend, "normalize", normalize) else [w / total for w in found]


def cancel(weights: Sequence[float]) -> bool:
    """Whether weights sum to zero, but for rounding: 0.1 + 0.2 - 0.3 is not quite 0."""
    return abs(sum(weights)) <= 1e-8 * sum(abs(w) for w in weights)


def base_of(blend: Blend) -> str:
    """The base of a blend that ``check_blend`` let through for a method that needs one."""
    if blend.base is None:
        raise ValueError(f"{blend.method} needs a base")
    return blend.base


_LARGE = 16.0
"""Factors from which on a combination of sources loses digits of small changes: (1 - f) b + f x cancels in float32."""


def along(base: str, sources: Sequence[str], factors: Sequence[float]) -> Pass:
    """b + sum_i f_i d_i where factors may be of any size: those of task vectors that are short beside the others."""
    if max(map(abs, factors)) < _LARGE:
        return added(base, sources, factors)
    return Sparsify(base, tuple(Part(name, f) for name, f in zip(sources, factors, strict=True) if f))


def added(base: str, sources: Sequence[str], factors: Sequence[float]) -> Combine:
    """b + sum_i f_i d_i."""
    coefficients = {base: 1 - sum(factors)}
    for source, factor in zip(sources, factors, strict=True):
        coefficients[source] = coefficients.get(source, 0.0) + factor
    return Combine(coefficients)


FRACTION = (0.0, 1.0)
"""Limits of what is a share of a whole."""
