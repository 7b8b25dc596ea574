"""Karcher: the point with the least mean squared angle to the sources' directions, as in arXiv 2603.04972."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evomerge.mergekit.grammar import Grammar, per_source
from evomerge.merging.arithmetic import sphere
from evomerge.merging.arithmetic.passes import Combine, Pass
from evomerge.merging.plans import values
from evomerge.method import Method
from evomerge.methods.parameters import one_weight, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def karcher(facts: Facts, blend: Blend) -> Pass:
    """The weighted Karcher mean of the sources' directions; see ``sphere.karcher``."""
    if len(blend.sources) == 1:
        return Combine({blend.sources[0]: 1.0})
    given = np.array(values(blend, "weight"))
    shares = given / given.sum() if given.sum() else np.full(len(given), 1 / len(given))
    coefficients = sphere.karcher(facts.inner(blend.sources), shares)
    return Combine(dict(zip(blend.sources, coefficients.tolist(), strict=True)))


KARCHER = Method(
    "karcher",
    karcher,
    (weight(1.0, high=1.0),),
    alone=one_weight(),
    mergekit=Grammar("source", fixed={"max_iter": 10, "tol": 1e-5}, unsaid=(per_source("weight", 1.0),)),
    title="Karcher mean",
    reference="arXiv 2603.04972",
)
