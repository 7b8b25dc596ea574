"""Methods that add up task vectors of which each is masked: by magnitude, at random, or at random by magnitude.

Notation and conventions are those of ``plans``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from evomerge.merging.drops import LEVELS, level
from evomerge.merging.facts import Facts
from evomerge.merging.passes import Combine, Part, Pass, Sparsify
from evomerge.merging.plans import (
    FRACTION,
    Method,
    Plan,
    base_of,
    number,
    switch,
    values,
    weights,
)
from evomerge.method_specs import SPECS
from evomerge.recipe import Blend


def ties(facts: Facts, blend: Blend) -> Pass:
    """b + the disjoint merge of the trimmed task vectors, weighted.

    Yadav et al., "TIES-Merging" (arXiv 2306.01708), algorithm 1: trim to the k = floor(p n) largest magnitudes (all as
    large as the k-th), elect the sign of the weighted sum, keep what agrees. The paper's mean over the sources that
    agree is ``normalize: true``; by default their weighted sum is taken.
    """
    return _sparsified(facts, blend, _trimmed, elect=True)


def breadcrumbs(facts: Facts, blend: Blend) -> Pass:
    """b + sum_i w_i m_i d_i, without the floor(gamma n) largest magnitudes and with the floor(p n) largest of the rest.

    Davari and Belilovsky, "Model Breadcrumbs" (arXiv 2312.06795), section 3: mask outliers and small perturbations.
    """
    return _sparsified(facts, blend, _without_outliers, elect=False)


def breadcrumbs_ties(facts: Facts, blend: Blend) -> Pass:
    """``breadcrumbs`` with the sign election of ``ties``."""
    return _sparsified(facts, blend, _without_outliers, elect=True)


def dare_linear(facts: Facts, blend: Blend) -> Pass:
    """b + sum_i w_i (m_i / p_i) d_i, with random masks that keep an element with chance p_i.

    Yu et al., "Language models are super Mario" (arXiv 2311.03099), section 3: drop at random, rescale by
    1 / (1 - drop rate), then task arithmetic. ``rescale: false`` leaves out the division.
    """
    return _sparsified(facts, blend, _dropped, elect=False)


def dare_ties(facts: Facts, blend: Blend) -> Pass:
    """``dare_linear`` with the sign election of ``ties``, as in the same paper: DARE in the place of trimming."""
    return _sparsified(facts, blend, _dropped, elect=True)


def della_linear(facts: Facts, blend: Blend) -> Pass:
    """b + sum_i w_i m_i d_i / c_i, with random masks that keep large magnitudes more often.

    Deep et al., "DELLA-Merging" (arXiv 2406.11617), section 3: within each row the chance to be kept rises evenly with
    the rank of the magnitude, from p - epsilon to p + epsilon (epsilon at most what leaves that within 0 and 1). One
    c_i a tensor keeps the expected L1 norm, where the paper divides each element by its own chance.
    """
    return _sparsified(facts, blend, _dropped_by_rank, elect=False)


def della(facts: Facts, blend: Blend) -> Pass:
    """``della_linear`` with the sign election of ``ties``, as the paper does."""
    return _sparsified(facts, blend, _dropped_by_rank, elect=True)


def _sparsified(facts: Facts, blend: Blend, mask: Callable[[Facts, Blend, str], Part | None], *, elect: bool) -> Pass:
    base, factor = base_of(blend), number(blend, "lambda", 1.0)
    divide = elect and switch(blend, "normalize", False)
    shares = values(blend, "weight") if elect else weights(blend, normalize=False)
    parts = []
    for source, share in zip(blend.sources, shares, strict=True):
        part = mask(facts, blend, source) if share else None
        if part is not None:
            parts.append(replace(part, weight=part.weight * share * (1.0 if divide else factor), share=share))
    if not parts:
        return Combine({base: 1.0})
    return Sparsify(base, tuple(parts), elect=elect, divide=divide, scale=factor if divide else 1.0)


def _trimmed(facts: Facts, blend: Blend, source: str) -> Part | None:
    kept = blend.value("density", source)
    if kept <= 0:
        return None
    count = min(facts.size, max(1, int(kept * facts.size)))
    low = facts.threshold(base_of(blend), source, count) if count < facts.size else 0.0
    return _windowed(facts, blend, source, low, math.inf)


def _without_outliers(facts: Facts, blend: Blend, source: str) -> Part | None:
    share, size = blend.value("density", source), facts.size
    if share >= 1:
        return _windowed(facts, blend, source, 0.0, math.inf)
    kept, top = int(share * size), int(blend.value("gamma", source) * size)
    small = max(0, size - kept - top)  # as many outliers stay as the density needs
    large = size - small - kept
    if kept == 0:
        return None
    low = facts.threshold(base_of(blend), source, size - small) if small else 0.0
    return _windowed(facts, blend, source, low, facts.threshold(base_of(blend), source, large) if large else math.inf)


def _windowed(facts: Facts, blend: Blend, source: str, low: float, high: float) -> Part:
    factor = 1.0
    if switch(blend, "rescale", False):
        whole, kept = facts.window_sums(base_of(blend), source, low, high)
        factor = whole / kept if min(whole, kept) >= 1e-7 else 1.0
    return Part(source, factor, low, high)


def _dropped(facts: Facts, blend: Blend, source: str) -> Part | None:
    levels = level(blend.value("density", source))
    if levels == 0:
        return None
    factor = LEVELS / levels if switch(blend, "rescale", True) else 1.0
    return Part(source, factor, key=facts.stream(source), levels=levels)


def _dropped_by_rank(facts: Facts, blend: Blend, source: str) -> Part | None:
    chance = blend.value("density", source)
    epsilon = min(blend.value("epsilon", source), chance, 1 - chance)
    if level(chance) == 0:
        return None
    lowest, highest = max(1, level(chance - epsilon)), max(1, level(chance + epsilon))
    kept = (lowest + (highest - lowest) * facts.mean_rank(base_of(blend), source)) / LEVELS
    factor = 1 / kept if switch(blend, "rescale", True) else 1.0
    return Part(source, factor, key=facts.stream(source), levels=lowest, rise=highest - lowest)


# ---- all of them -----------------------------------------------------------------------------------------------------


def _method(name: str, plan: Plan, *limits: str) -> Method:
    return Method(SPECS[name], plan, limits=dict.fromkeys(("density", *limits), FRACTION))


METHODS = (
    _method("ties", ties),
    _method("dare_linear", dare_linear),
    _method("dare_ties", dare_ties),
    _method("della_linear", della_linear, "epsilon"),
    _method("della", della, "epsilon"),
    _method("breadcrumbs", breadcrumbs, "gamma"),
    _method("breadcrumbs_ties", breadcrumbs_ties, "gamma"),
)
