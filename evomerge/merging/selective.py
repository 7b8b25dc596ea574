"""Methods that choose element by element among few sources: SCE, RAM, Arcee Fusion, NearSwap.

Notation and conventions are those of ``plans``. All but SCE run as plain torch on rows, several times
slower than the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evomerge.merging.facts import Facts
from evomerge.merging.passes import Elementwise, Pass, Select
from evomerge.merging.plans import FRACTION, Method, base_of, number
from evomerge.method_specs import ALPHA, EPSILON, FENCE, SPECS, R, T
from evomerge.recipe import Blend


def sce(facts: Facts, blend: Blend) -> Pass:
    """Select, calculate, erase: b + sum_i g_i e_i d_i / sum_i g_i e_i, over the elements that were selected.

    Wan et al., "FuseChat" (arXiv 2408.07990), section 3.3: select the share ``select_topk`` of elements whose task
    vectors vary most between sources (of those that vary at all); calculate for each source the share g_i of its
    squared norm over what was selected; erase (e_i = 0) where its sign is not that of the sum.
    """
    names, share = (base_of(blend), *blend.sources), number(blend, "select_topk", 1.0)
    least = 0.0
    if share < 1:
        # In float32, as mergekit counts: 5/6 of 2304 are 1920 there, and 1919 in float64.
        least = facts.variance_threshold(names, lambda varying: int(np.float32(varying) * np.float32(share)))
    energies = facts.energies(names, least)
    whole = energies.sum()
    shares = energies / whole if whole >= 1e-6 * facts.size else np.full(len(energies), 1 / len(energies))
    return Select(names[0], dict(zip(blend.sources, shares.tolist(), strict=True)), least)


def _deltas(rows: Sequence[Tensor]) -> Tensor:
    """[sources, rows, length] task vectors."""
    return torch.stack([x - rows[0] for x in rows[1:]])


def ram(facts: Facts, blend: Blend) -> Pass:
    """b + lambda times: d_i where only source i changed the element, the mean of d_i where several did.

    "Reinforced Agent Merging" (arXiv 2601.13572). Changed means |d_i| > epsilon.
    """
    return _ram(facts, blend, [1.0] * len(blend.sources))


def ramplus_tl(facts: Facts, blend: Blend) -> Pass:
    """``ram`` with what a source changed alone multiplied by 1 + r min(shared_i / alone_i, alpha).

    RAM+ of arXiv 2601.13572, tensor by tensor ("TL"): shared_i and alone_i count the elements that source i changed
    with others and alone.
    """
    names, epsilon = (base_of(blend), *blend.sources), number(blend, "epsilon", EPSILON.default)

    def counts(rows: Sequence[Tensor]) -> Tensor:
        changed = _deltas(rows).abs() > epsilon
        several = changed.sum(dim=0) > 1
        return torch.stack([(changed & several).sum(dim=(1, 2)), (changed & ~several).sum(dim=(1, 2))]).view(-1)

    shared, alone = facts.total("shared changes", names, counts, epsilon=epsilon).reshape(2, -1)
    r, most = number(blend, "r", R.default), number(blend, "alpha", ALPHA.default)
    ratios = [s / a if a else math.inf if s else 0.0 for s, a in zip(shared, alone, strict=True)]
    factors = [1 + r * min(ratio, most) for ratio in ratios]
    return _ram(facts, blend, factors)


def _ram(facts: Facts, blend: Blend, factors: Sequence[float]) -> Pass:
    epsilon, factor = number(blend, "epsilon", EPSILON.default), number(blend, "lambda", 1.0)
    alone = torch.tensor(factors, dtype=torch.float32)[:, None, None]

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        deltas = _deltas(tensors)
        changed = deltas.abs() > epsilon
        count = changed.sum(dim=0)
        share = torch.where(count > 1, 1 / count.clamp(min=1), alone.to(deltas.device))
        return tensors[0] + factor * (deltas * changed * share).sum(dim=0)

    return Elementwise((base_of(blend), *blend.sources), rows)


def arcee_fusion(facts: Facts, blend: Blend) -> Pass:
    """x where it differs importantly from b, else b.

    mergekit's Arcee Fusion: the importance of an element is |d| times its row's Kullback-Leibler divergence between
    softmax(x) and softmax(b); important is what is not below median + fence (q3 - q1), ``fence`` being 1.5 there.
    Quartiles are those of the whole tensor, exactly, where mergekit draws a million elements.
    """
    names = (base_of(blend), *blend.sources)

    def quantile(share: float) -> float:
        return facts.value_threshold("importances", names, _importance, facts.size - int(share * (facts.size - 1)))

    low, middle, high = (quantile(share) for share in (0.25, 0.5, 0.75))
    least = middle + number(blend, "fence", FENCE.default) * (high - low)

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        base, source = tensors
        return torch.where(_importance(tensors) >= least, source, base)

    return Elementwise(names, rows)


def _importance(rows: Sequence[Tensor]) -> Tensor:
    base, source = rows
    p, q = source.softmax(dim=-1) + 1e-8, base.softmax(dim=-1) + 1e-8
    return (source - base).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)


def nearswap(facts: Facts, blend: Blend) -> Pass:
    """b + min(1, t / |d|) d: the source where it is near the base, and towards it by t where it is not.

    alchemonaut's NearSwap, as mergekit has it (https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001).
    """
    t = number(blend, "t", T.default)

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        base, source = tensors
        near = (t / (base - source).abs().clamp(min=1e-6)).clamp(0, 1)
        return near * source + (1 - near) * base

    return Elementwise((base_of(blend), *blend.sources), rows)


# ---- all of them -----------------------------------------------------------------------------------------------------

METHODS = (
    Method(SPECS["sce"], sce, limits={"select_topk": FRACTION}),
    Method(SPECS["ram"], ram),
    Method(SPECS["ramplus_tl"], ramplus_tl),
    Method(SPECS["arcee_fusion"], arcee_fusion),
    Method(SPECS["nearswap"], nearswap),
)
