"""Profiles over depth: the content of each layer, with a few numbers instead of separate ones for every layer.

Lines and tiers determine how much of the whole change a layer keeps; cosines give each source weight its own curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from evomerge.errors import InputError
from evomerge.genome import Parameter
from evomerge.method import Method
from evomerge.recipes.stack import Blend, BlendStep
from search_spaces.gene import Gene

_GROUP = "profile"


class Lines:
    """LiNeS (Wang et al., arXiv 2410.17146, equation 2): factors that rise or fall linearly over the layers.

    Layer l of L gets first + (last - first) l / (L - 1), and parts outside the stack get ``first``. In the paper's
    notation alpha = first and beta = last - first. With both at 1 nothing is scaled.
    """

    parameters = (
        Parameter("profile.first", 0.0, 2.0, 1.0, group=_GROUP),
        Parameter("profile.last", 0.0, 2.0, 1.0, group=_GROUP),
    )
    neutral = (1.0, 1.0)

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def factor(self, numbers: Sequence[float], layer: int | None) -> float:
        """The factor on the change of a layer, or of the parts outside the stack (None)."""
        first, last = numbers
        if layer is None or self._layers == 1:
            return first
        return first + (last - first) * (layer / (self._layers - 1))  # exactly 1, and thus no step, if both are 1


class Tiers:
    """LARV (Wang et al., arXiv 2602.09413): a factor for each third of the layers, by how far changes can be trusted.

    ``merging.adapters.tiers`` measures this, from weights alone. Parts outside the stack are not scaled.

    Args:
        tiers: the tier of each layer, from 0, the least trusted.
    """

    parameters = (
        Parameter("profile.low", 0.0, 2.0, 1.0, group=_GROUP),
        Parameter("profile.middle", 0.0, 2.0, 1.0, group=_GROUP),
        Parameter("profile.high", 0.0, 2.0, 1.0, group=_GROUP),
    )
    neutral = (1.0, 1.0, 1.0)

    def __init__(self, tiers: Sequence[int]) -> None:
        self._tiers = tiers

    @classmethod
    def by_depth(cls, layers: int) -> Tiers:
        """Thirds of the stack by depth, for a space whose weights have not been read."""
        return cls([layer * len(cls.parameters) // layers for layer in range(layers)])

    def factor(self, numbers: Sequence[float], layer: int | None) -> float:
        """The factor on the change of a layer, or of the parts outside the stack (None)."""
        return 1.0 if layer is None else numbers[self._tiers[layer]]


class Cosines(BaseModel):
    """Each source weight as a smooth curve over depth, with this many numbers; see ``Wave``.

    Args:
        cosines: how many, including the constant one: from 2 to the number of layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cosines: int = Field(ge=2)

    def check(self, methods: Sequence[Method], fixed: Sequence[str], layers: int) -> None:
        """Reject impossible curves: more numbers than layers, or a method without searched weights.

        Raises:
            InputError: naming the key.
        """
        place = "space.profile.cosines"
        if self.cosines > layers:
            raise InputError(place, f"is {self.cosines}, but the sources have {layers} layers")
        for method in methods:
            weights = [p.name for p in method.parameters if p.share and p.scope == "source"]
            if not weights:
                hint = "Take `profile: lines`, or a method with weights, such as task_arithmetic."
                raise InputError(place, f"draws weights over depth, and {method.name} has none for each source", hint)
            for key in (f"{method.name}.{weights[0]}", weights[0]):
                if key in fixed:
                    raise InputError(f"space.fixed.{key}", "fixes the weights whose curves are searched")


@dataclass(frozen=True)
class Wave:
    """One cosine of the curve over depth that a weight follows, in the basis of the DCT-II.

    In layer l of L layers w(l) = c_0 + sum_{j=1}^{k-1} c_j cos(pi j (l + 1/2) / L), clipped to the searched range. c_0
    is the weight without a curve, and the mean over the layers. With as many cosines as layers, any weights can be
    represented. Parts outside the stack get c_0, because a tied embedding and head belong to neither end.

    Attributes:
        gene: the gene of c_0.
        place: the position of c_0 among the method's numbers.
        order: j.
    """

    gene: Gene
    place: int
    order: int

    def described(self, prefix: str, group: str) -> Parameter:
        """c_j. Its range is half the weight's either way: with c_0 in the middle, c_1 spans the whole range."""
        most = (self.gene.high - self.gene.low) / 2
        name = f"{prefix}.{self.gene.name}.cosine{self.order}"
        return Parameter(name, -most, most, 0.0, group=group, differentiable=self.gene.differentiable)

    def at(self, depth: float) -> float:
        """The factor of c_j at a depth from 0 to 1."""
        return math.cos(math.pi * self.order * depth)

    def nearest(self, curve: Sequence[tuple[float, float]]) -> float:
        """c_j of the curve closest to (depth, weight) of all layers by least squares, as cosines are orthogonal."""
        most = (self.gene.high - self.gene.low) / 2
        mean = sum(number * self.at(depth) for depth, number in curve) / len(curve)
        return min(max(round(2 * mean, 12), -most), most)  # rounded, so that a flat curve stays flat


def waves_of(genes: Sequence[Gene], cosines: int) -> Iterator[Wave]:
    """The waves of a method's source weights; none with one cosine, which is the weight itself."""
    for place, gene in enumerate(genes):
        if gene.parameter.share and gene.source is not None:
            yield from (Wave(gene, place, order) for order in range(1, cosines))


def with_factor(blend: Blend, factor: float) -> Blend:
    """A blend with a final scaling of its change; unchanged if the factor is 1."""
    if factor == 1:
        return blend
    step = BlendStep(name="scale", parameters={"factor": factor})
    return blend.model_copy(update={"steps": (*blend.steps, step)})
