"""RAM and RAM+: changes by only one source are taken in full, and changes by several sources are averaged.

"Reinforced Agent Merging" (arXiv 2601.13572). "Changed" means |d_i| > epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import LAMBDA, Grammar, for_all
from evomerge.merging.arithmetic.passes import Pass, RowFunction
from evomerge.merging.plans import base_of, number
from evomerge.method import Method, MethodParameter
from evomerge.methods.parameters import scale
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.facts import Facts

_MIN, _RISE, _MAX = 1e-5, 0.1, 0.2  # defaults of epsilon, r and alpha


def ram(facts: Facts, blend: Blend) -> Pass:
    """b + lambda times d_i where only source i changed the element, and the mean of d_i where several sources did."""
    return _ram(blend, [1.0] * len(blend.sources))


def ramplus_tl(facts: Facts, blend: Blend) -> Pass:
    """``ram`` with changes by a single source multiplied by 1 + r min(shared_i / alone_i, alpha).

    RAM+, tensor by tensor ("TL"): shared_i counts the elements that source i changed with others, alone_i those that
    only it changed.
    """
    import torch

    names, epsilon = (base_of(blend), *blend.sources), number(blend, "epsilon", _MIN)

    def counts(rows: Sequence[Tensor]) -> Tensor:
        changed = _deltas(rows).abs() > epsilon
        several = changed.sum(dim=0) > 1
        return torch.stack([(changed & several).sum(dim=(1, 2)), (changed & ~several).sum(dim=(1, 2))]).view(-1)

    shared, alone = facts.total("shared changes", names, counts, epsilon=epsilon).reshape(2, -1)
    r, most = number(blend, "r", _RISE), number(blend, "alpha", _MAX)
    ratios = [s / a if a else math.inf if s else 0.0 for s, a in zip(shared, alone, strict=True)]
    return _ram(blend, [1 + r * min(ratio, most) for ratio in ratios])


def _ram(blend: Blend, factors: Sequence[float]) -> Pass:
    import torch

    epsilon, factor = number(blend, "epsilon", _MIN), number(blend, "lambda", 1.0)
    alone = torch.tensor(factors, dtype=torch.float32)[:, None, None]

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        deltas = _deltas(tensors)
        changed = deltas.abs() > epsilon
        count = changed.sum(dim=0)
        share = torch.where(count > 1, 1 / count.clamp(min=1), alone.to(deltas.device))
        return tensors[0] + factor * (deltas * changed * share).sum(dim=0)

    return RowFunction((base_of(blend), *blend.sources), rows)


def _deltas(rows: Sequence[Tensor]) -> Tensor:
    """[sources, rows, length] task vectors."""
    import torch

    return torch.stack([x - rows[0] for x in rows[1:]])


_EPSILON = MethodParameter("epsilon", "blend", low=0.0, high=1e-3, default=_MIN, searched=False)
_R = MethodParameter("r", "blend", low=0.0, high=1.0, default=_RISE)
_ALPHA = MethodParameter("alpha", "blend", low=0.0, high=2.0, default=_MAX)
_SAID = for_all("epsilon", _MIN)

RAM = Method(
    "ram",
    ram,
    (scale(searched=True), _EPSILON),
    needs_base=True,
    mergekit=Grammar("apart", (_SAID,), copies_base=True, unsaid=(LAMBDA,)),
    title="RAM",
    reference="arXiv 2601.13572",
)

RAMPLUS_TL = Method(
    "ramplus_tl",
    ramplus_tl,
    (_R, _ALPHA, scale(), _EPSILON),
    needs_base=True,
    mergekit=Grammar("apart", (for_all("r", _RISE), for_all("alpha", _MAX), _SAID), copies_base=True, unsaid=(LAMBDA,)),
    title="RAM+",
    reference="arXiv 2601.13572",
)
