"""The merge methods: one equation each, on the tensors of one name.

Written here, b is the base, x_i source i, d_i = x_i - b its task vector, w_i its weight and p_i its density. Every
method takes tensors of any float dtype and one shape, computes in float32 and gives float32; the caller casts, once.

Weights are not normalised unless a blend says ``normalize: true``: merges that amplify (weights that sum to two, say)
are often the best ones, and a search could not reach them. ``linear`` is the exception, being a mean by definition.

The lambda of the papers, one factor on the sum of task vectors, is not a parameter here: without normalising it only
multiplies the weights, so a search over both would walk the same models many times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evomerge.merging.drops import Drops
from evomerge.recipe import Blend, MethodParameter, MethodSpec

Merge = Callable[[Tensor | None, Sequence[Tensor], Blend, Drops], Tensor]
"""(base, sources, blend, drops) -> merged. ``sources`` are in the order of ``blend.sources``, all of one shape;
``base`` is None where the blend has none; ``drops`` gives random masks. A pure function: no argument is written to, and
equal arguments give equal bits."""


@dataclass(frozen=True)
class Method:
    """A merge method: what it needs and takes, and its equation.

    ``limits`` are the values, (lowest, highest), that a parameter may have at all, where there are such: a recipe
    outside them is refused. The ranges in ``spec`` are only what a search walks by default.
    """

    spec: MethodSpec
    merge: Merge
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)


# ---- linear ----------------------------------------------------------------------------------------------------------


def linear(base: Tensor | None, sources: Sequence[Tensor], blend: Blend, drops: Drops) -> Tensor:
    """The weighted mean: sum_i w_i x_i / sum_i w_i.

    Wortsman et al., "Model soups" (arXiv 2203.05482), the uniform soup of section 2, here with weights. Weights that
    sum to zero say nothing of a mean: then all count the same.
    """
    weights = _weights(blend, normalize=True)
    if _normalized(blend, default=True) and sum(weights) == 0:
        weights = [1 / len(weights)] * len(weights)
    merged = _float32(sources[0]) * weights[0]  # not zeros + ...: one source of weight 1 keeps its very bits, -0.0 too
    for source, weight in zip(sources[1:], weights[1:], strict=True):
        merged.add_(_float32(source), alpha=weight)
    return merged


# ---- task arithmetic and DARE-linear ---------------------------------------------------------------------------------


def task_arithmetic(base: Tensor | None, sources: Sequence[Tensor], blend: Blend, drops: Drops) -> Tensor:
    """b + sum_i w_i d_i.

    Ilharco et al., "Editing models with task arithmetic" (arXiv 2212.04089), section 2: learning via addition, with a
    weight for each task vector. With ``normalize`` the sum is divided by sum_i w_i.
    """
    origin = _origin(base)
    weights = _weights(blend, normalize=False)
    return origin + _sum([w * (_float32(x) - origin) for x, w in zip(sources, weights, strict=True)])


def dare_linear(base: Tensor | None, sources: Sequence[Tensor], blend: Blend, drops: Drops) -> Tensor:
    """b + sum_i w_i (m_i / p_i) d_i, with random masks m_i that keep an element with chance p_i.

    Yu et al., "Language models are super Mario" (arXiv 2311.03099), section 3: drop at random, rescale by
    1 / (1 - drop rate), then task arithmetic. See ``_drop_and_rescale`` for where mergekit differs.
    """
    origin = _origin(base)
    weights = _weights(blend, normalize=False)
    return origin + _sum(_drop_and_rescale(origin, sources, weights, blend, drops))


# ---- TIES and DARE-TIES ----------------------------------------------------------------------------------------------


def ties(base: Tensor | None, sources: Sequence[Tensor], blend: Blend, drops: Drops) -> Tensor:
    """b + the disjoint merge of the trimmed task vectors, weighted.

    Yadav et al., "TIES-Merging" (arXiv 2306.01708), algorithm 1: trim, elect sign, disjoint merge. The paper's mean
    over the sources that agree is ``normalize: true``; by default their weighted sum is taken.
    """
    origin = _origin(base)
    weights, densities = _values(blend, "weight"), _values(blend, "density")
    parts = [w * trim(_float32(x) - origin, p) for x, w, p in zip(sources, weights, densities, strict=True)]
    return origin + _disjoint_merge(parts, blend)


def dare_ties(base: Tensor | None, sources: Sequence[Tensor], blend: Blend, drops: Drops) -> Tensor:
    """b + the disjoint merge of the task vectors (m_i / p_i) d_i, weighted.

    Yu et al. (arXiv 2311.03099), section 3: DARE in the place of the trimming of TIES.
    """
    origin = _origin(base)
    return origin + _disjoint_merge(_drop_and_rescale(origin, sources, _values(blend, "weight"), blend, drops), blend)


def trim(delta: Tensor, density: float) -> Tensor:
    """Zero all but the largest magnitudes (TIES, algorithm 1, step 1), counted over the whole tensor.

    Kept are the k = floor(density * n) largest of n elements, and at least one where density is above 0. Elements as
    large as the k-th are all kept, so that the result does not hang on the order of a sort; bfloat16 weights often have
    some.
    """
    count = delta.numel()
    k = min(count, max(1, int(density * count))) if density > 0 else 0
    if k == 0:
        return torch.zeros_like(delta)
    if k == count:
        return delta
    magnitude = delta.abs()
    threshold = magnitude.flatten().kthvalue(count - k + 1).values
    return delta.where(magnitude >= threshold, 0.0)


def _drop_and_rescale(
    origin: Tensor, sources: Sequence[Tensor], weights: Sequence[float], blend: Blend, drops: Drops
) -> list[Tensor]:
    """w_i (m_i / p_i) d_i for each source (arXiv 2311.03099, section 3: m ~ Bernoulli, then division by 1 - drop rate).

    mergekit instead rescales so that the L1 norm of each task vector is as it was before its mask. The two agree as
    tensors grow; the paper's form is taken, since it needs no sum over the tensor and keeps the expectation exactly.
    """
    parts = []
    for name, source, weight in zip(blend.sources, sources, weights, strict=True):
        density = blend.value("density", name)
        if round(density * 2.0**32) == 0:  # below the resolution of the drops nothing is kept, and 1 / density is huge
            parts.append(torch.zeros_like(origin))
            continue
        delta = (_float32(source) - origin).mul_(weight / density)
        parts.append(delta.where(drops.keep(name, density, delta.shape), 0.0))
    return parts


def _disjoint_merge(parts: Sequence[Tensor], blend: Blend) -> Tensor:
    """Elect a sign for each element and merge the sources that agree with it (TIES, algorithm 1, steps 2 and 3).

    The sign is that of the weighted sum, a sum of zero counting as positive. A source whose element is zero agrees with
    neither sign.
    """
    positive = _sum(parts) >= 0
    merged, share = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for part, weight in zip(parts, _values(blend, "weight"), strict=True):
        agrees = torch.where(positive, part > 0, part < 0)
        merged.add_(part.where(agrees, 0.0))
        share.add_(agrees, alpha=weight)
    return merged / share.where(share != 0, 1.0) if _normalized(blend, default=False) else merged


# ---- SLERP -----------------------------------------------------------------------------------------------------------

_COLINEAR = 0.9995  # |cos| above which the arc is taken for its chord; below, the sines are far from 0 / 0


def slerp(base: Tensor | None, sources: Sequence[Tensor], blend: Blend, drops: Drops) -> Tensor:
    """sin((1 - t) a) / sin(a) x_1 + sin(t a) / sin(a) x_2, with the angle a between x_1 and x_2.

    Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985), the formula of Slerp; the two tensors are
    taken whole, as vectors of all their elements, and not brought to unit length. Where they are nearly parallel or
    opposite, or one is zero, the plain (1 - t) x_1 + t x_2.
    """
    first, second = (_float32(source) for source in sources)
    t = blend.value("t")
    norms = [float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (first, second)]
    cosine = 0.0
    if all(norms):
        cosine = float(((first / norms[0]) * (second / norms[1])).sum(dtype=torch.float64))
    if not all(norms) or abs(cosine) > _COLINEAR:
        return (first * (1 - t)).add_(second, alpha=t)
    angle = math.acos(cosine)
    return (first * (math.sin((1 - t) * angle) / math.sin(angle))).add_(
        second, alpha=math.sin(t * angle) / math.sin(angle)
    )


# ---- shared ----------------------------------------------------------------------------------------------------------


def _float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32)


def _origin(base: Tensor | None) -> Tensor:
    if base is None:
        raise ValueError("this method needs a base")  # check_blend has refused such a blend long before
    return _float32(base)


def _values(blend: Blend, name: str) -> list[float]:
    return [blend.value(name, source) for source in blend.sources]


def _normalized(blend: Blend, *, default: bool) -> bool:
    return bool(blend.parameters.get("normalize", default))


def _weights(blend: Blend, *, normalize: bool) -> list[float]:
    """The weights, over their sum where the blend says so (``normalize`` where it is silent) and that is not zero."""
    weights = _values(blend, "weight")
    total = sum(weights)  # in float64: in float32 it may vanish
    return [w / total for w in weights] if total and _normalized(blend, default=normalize) else weights


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total


# ---- what each method takes ------------------------------------------------------------------------------------------


def _weight(default: float, high: float = 1.5) -> MethodParameter:
    # 1.5 leaves room above the optimum of the original work, whose weights sum to about two over three sources.
    return MethodParameter("weight", "source", low=0.0, high=high, default=default)


def _density(default: float) -> MethodParameter:
    return MethodParameter("density", "source", low=0.1, high=1.0, default=default)


_FRACTION = (0.0, 1.0)

LINEAR = Method(
    # Only the ratios of the weights count, so there is nothing to find above 1.
    MethodSpec("linear", (_weight(1.0, high=1.0),), needs_base=False, switches={"normalize": True}),
    linear,
)
TASK_ARITHMETIC = Method(
    # 0.4: the scaling that is used where there is no validation set (see arXiv 2306.01708, experiments).
    MethodSpec("task_arithmetic", (_weight(0.4),), needs_base=True, switches={"normalize": False}),
    task_arithmetic,
)
TIES = Method(
    # The paper's k = 20% and lambda = 1.
    MethodSpec("ties", (_weight(1.0), _density(0.2)), needs_base=True, switches={"normalize": False}),
    ties,
    limits={"density": _FRACTION},
)
DARE_LINEAR = Method(
    MethodSpec("dare_linear", (_weight(0.5), _density(0.5)), needs_base=True, switches={"normalize": False}),
    dare_linear,
    limits={"density": _FRACTION},
)
DARE_TIES = Method(
    MethodSpec("dare_ties", (_weight(0.5), _density(0.5)), needs_base=True, switches={"normalize": False}),
    dare_ties,
    limits={"density": _FRACTION},
)
SLERP = Method(
    MethodSpec(
        "slerp",
        (MethodParameter("t", "blend", low=0.0, high=1.0, default=0.5),),
        needs_base=False,
        min_sources=2,
        max_sources=2,
    ),
    slerp,
    limits={"t": _FRACTION},
)
