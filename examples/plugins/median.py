"""Median: the base and the median of the task vectors, element by element.

The median of Yin et al., "Byzantine-robust distributed learning" (arXiv 1803.01498), definition 1, with sources instead
of machines: a single source that is far from the others has little influence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.merging.arithmetic.passes import Pass, RowFunction
from evomerge.merging.measured.facts import Facts
from evomerge.merging.plans import base_of
from evomerge.method import Method, MethodParameter
from evomerge.recipes.stack import Blend


def median(facts: Facts, blend: Blend) -> Pass:
    """b + w * the median of the task vectors, or their mean."""
    weight, mean = blend.value("weight"), blend.choice("middle") == "mean"

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        base, *sources = tensors
        deltas = torch.stack([source - base for source in sources])
        return base + weight * (deltas.mean(dim=0) if mean else deltas.median(dim=0).values)

    return RowFunction((base_of(blend), *blend.sources), rows)


MEDIAN = Method(
    "median",
    median,
    (
        MethodParameter("weight", "blend", 0.0, 2.0, 1.0),
        MethodParameter("middle", "blend", kind="choice", choices=("median", "mean"), default="median"),
    ),
    needs_base=True,
    title="median of task vectors",
    reference="arXiv 1803.01498",
)
