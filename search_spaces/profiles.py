"""Profiles over depth: how much of the change each layer keeps, by a few numbers in place of some for every layer."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.genome import Parameter
from evomerge.recipes.stack import Blend, BlendStep

_GROUP = "profile"


class Lines:
    """LiNeS (Wang et al., arXiv 2410.17146, equation 2): factors that rise, or fall, evenly from layer to layer.

    Layer l of L gets first + (last - first) l / (L - 1), and what is outside of the stack ``first``: in the paper's
    words alpha = first and beta = last - first. Both are 1 where nothing is scaled.
    """

    parameters = (
        Parameter("profile.first", 0.0, 2.0, 1.0, group=_GROUP),
        Parameter("profile.last", 0.0, 2.0, 1.0, group=_GROUP),
    )
    neutral = (1.0, 1.0)

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def factor(self, numbers: Sequence[float], layer: int | None) -> float:
        """By what the change of a layer is multiplied, or of what is outside of the stack (None)."""
        first, last = numbers
        if layer is None or self._layers == 1:
            return first
        return first + (last - first) * (layer / (self._layers - 1))  # which is 1, and no step, where both are 1


class Tiers:
    """LARV (Wang et al., arXiv 2602.09413): a factor for each third of the layers, by how far changes can be trusted.

    ``merging.tiers`` measures that, from weights alone. What is outside of the stack is not scaled.

    Args:
        tiers: that of each layer, from 0, the least trusted.
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
        """Thirds of the stack, for a space of which no weights have been read."""
        return cls([layer * len(cls.parameters) // layers for layer in range(layers)])

    def factor(self, numbers: Sequence[float], layer: int | None) -> float:
        """By what the change of a layer is multiplied, or of what is outside of the stack (None)."""
        return 1.0 if layer is None else numbers[self._tiers[layer]]


def with_factor(blend: Blend, factor: float) -> Blend:
    """A blend whose change is scaled at last; itself where the factor is 1."""
    if factor == 1:
        return blend
    step = BlendStep(name="scale", parameters={"factor": factor})
    return blend.model_copy(update={"steps": (*blend.steps, step)})
