"""PCB-Merging: a mean of the changes of each element, weighted by their importance within and between sources.

Du et al., "Parameter competition balancing for model merging" (arXiv 2410.02396), section 3, applied per tensor; the
paper ranks the elements of a whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Pass, RowFunction
from evomerge.merging.plans import base_of, number, values
from evomerge.method import Method, MethodParameter
from evomerge.methods.parameters import scale, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.facts import Facts

_CLAMP, _RATIO, _TINY = 0.01, 0.05, 1e-12


@dataclass(frozen=True)
class _Scores:
    """The scores of the sources' changes: exp(n c^2) tanh(d sum_j d_j), where c is |d| clamped and mapped to [0, 1].

    Attributes:
        lows, highs: the bounds that each source's magnitudes are clamped to.
    """

    lows: Sequence[float]
    highs: Sequence[float]

    def clamped(self, delta: Tensor, source: int) -> Tensor:
        return delta.abs().clamp(self.lows[source], self.highs[source])

    def of(self, source: int, rows: Sequence[Tensor]) -> Tensor:
        """The scores of one source; zero where it opposes the sum."""
        base, *tensors = rows
        total = sum((tensor - base for tensor in tensors[1:]), tensors[0] - base)
        delta, low, high = tensors[source] - base, self.lows[source], self.highs[source]
        within = (self.clamped(delta, source) - low) / max(high - low, _TINY)
        return ((len(tensors) * within**2).exp() * (delta * total).tanh()).clamp(min=0)


def pcb(facts: Facts, blend: Blend) -> Pass:
    """b + lambda sum_i w_i s_i d_i / sum_i s_i, over the fraction ``ratio`` of each source's highest scores.

    s_i is the score minus the lowest of these, scaled so that the highest is 1. Magnitudes are clamped at the quantile
    ``clamp`` from both ends.
    """
    names, ratio, clamp = (
        (base_of(blend), *blend.sources),
        number(blend, "ratio", _RATIO),
        number(blend, "clamp", _CLAMP),
    )
    lowest = int(facts.size * clamp)
    highest = max(lowest, int(facts.size * (1 - clamp) - 1))
    low, high = (
        [facts.threshold(names[0], source, facts.size - place) for source in blend.sources]
        for place in (lowest, highest)
    )
    scores, count = _Scores(low, high), max(1, facts.size - int(facts.size * (1 - ratio)))
    least, most = (
        [
            facts.value_threshold(f"balance {i} {clamp}", names, partial(scores.of, i), k)
            for i in range(len(blend.sources))
        ]
        for k in (count, 1)
    )
    weights = [number(blend, "lambda", 1.0) * w for w in values(blend, "weight")]

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        base, *sources = tensors
        total, shares = base * 0, base * 0
        for i, source in enumerate(sources):
            share = (scores.of(i, tensors) - least[i]).clamp(min=0) / max(most[i] - least[i], _TINY)
            delta = source - base
            total += weights[i] * share * delta.sign() * scores.clamped(delta, i)
            shares += share
        return base + total / shares.clamp(min=_TINY)

    return RowFunction(names, rows)


PCB = Method(
    "pcb",
    pcb,
    (
        weight(1.2, high=2.0),
        MethodParameter("ratio", "blend", low=0.01, high=0.3, default=_RATIO, limits=(0.0, 1.0)),
        MethodParameter("clamp", "blend", low=0.0, high=0.05, default=_CLAMP, searched=False, limits=(0.0, 0.49)),
        scale(),
    ),
    needs_base=True,
    title="PCB-Merging",
    reference="arXiv 2410.02396",
)
