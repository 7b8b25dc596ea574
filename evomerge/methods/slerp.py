"""SLERP: a point on the arc between two sources.

Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import Grammar, for_all
from evomerge.merging.arithmetic import sphere
from evomerge.merging.arithmetic.passes import Combine, Pass
from evomerge.merging.plans import number
from evomerge.method import FRACTION, Method, MethodParameter
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def slerp(facts: Facts, blend: Blend) -> Pass:
    """sin((1 - t) a) / sin(a) x_1 + sin(t a) / sin(a) x_2, where a is their angle; see ``sphere.slerp``."""
    coefficients = sphere.slerp(facts.inner(blend.sources), number(blend, "t", 0.5), colinear=0.9995)
    return Combine(dict(zip(blend.sources, coefficients.tolist(), strict=True)))


def _shares(blend: Blend) -> Mapping[str, float]:
    """How far the point lies from one source to the other."""
    t = number(blend, "t", 0.5)
    return dict(zip(blend.sources, (1.0 - t, t), strict=True))


SLERP = Method(
    "slerp",
    slerp,
    (MethodParameter("t", "blend", low=0.0, high=1.0, default=0.5, limits=FRACTION, share=True),),
    min_sources=2,
    max_sources=2,
    shares=_shares,
    differentiable=("t",),
    mergekit=Grammar("first", (for_all("t", None, 0.5),), least=2, most=2),
    title="SLERP",
    reference="Shoemake 1985",
)
