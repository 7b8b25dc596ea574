"""Passthrough: a single source, optionally scaled, as for layers in layer stacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import Grammar, per_source
from evomerge.merging.arithmetic.passes import Combine, Pass
from evomerge.method import Method, MethodParameter, Point
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def passthrough(facts: Facts, blend: Blend) -> Pass:
    """s x."""
    (source,) = blend.sources
    return Combine({source: blend.value("scale", source)})


def _alone(sources: Sequence[str], source: str | None) -> Point:
    return {"scale": float(source in sources)}


PASSTHROUGH = Method(
    "passthrough",
    passthrough,
    (MethodParameter("scale", "source", low=0.5, high=1.5, default=1.0, share=True),),
    max_sources=1,
    alone=_alone,
    differentiable=("scale",),
    mergekit=Grammar("source", (per_source("scale", 1.0),), most=1),
    title="passthrough",
)
