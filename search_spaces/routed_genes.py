"""The numbers of one layer group of routed experts: which are present, how many a token uses, and how strongly.

Temperature and gains are searched on a log scale, so that half and twice the papers' value of 1 are equally far away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from evomerge.genome import Parameter
from evomerge.recipes.routed import LayerGroup, Where

Presence = Literal["each", "allocation"]
ALL = "all"

BOUNDS: Mapping[str, tuple[float, float]] = {"temperature": (0.1, 10.0), "gain": (0.5, 2.0), "bias": (-2.0, 2.0)}
"""The ranges that are searched by default; biases only if a range is given."""


@dataclass(frozen=True)
class GroupGenes:
    """What is searched in every layer group.

    Attributes:
        experts: all experts, in order.
        presence: with "each", every expert has a bit; otherwise one number says how many experts are present, and those
            with the highest priority are.
        where: the blocks that are routed.
        bounds: the ranges of what is searched: temperature, gain, bias.
        top_k: how many experts a token uses, if that is not searched; None for all.
        searches_top_k: whether it is searched.
        temperature, gain: their values if they are not searched.
    """

    experts: tuple[str, ...]
    presence: Presence
    where: Where
    bounds: Mapping[str, tuple[float, float]]
    top_k: int | None
    searches_top_k: bool
    temperature: float
    gain: float

    def parameters(self, name: str, group: str) -> Iterator[Parameter]:
        """The parameters of a group with this name, displayed among others of ``group``."""
        if self.presence == "each":
            for expert in self.experts:
                yield Parameter(f"{name}.present.{expert}", 0, 1, 1, "choice", group, ("absent", "present"))
        else:
            yield Parameter(f"{name}.experts", 1, len(self.experts), len(self.experts), "int", group)
        if self.searches_top_k:
            choices = (*map(str, range(1, len(self.experts))), ALL)
            yield Parameter(f"{name}.top_k", 0, len(choices) - 1, len(choices) - 1, "choice", group, choices)
        if "temperature" in self.bounds:
            low, high = map(math.log10, self.bounds["temperature"])
            yield Parameter(f"{name}.log10_temperature", low, high, min(max(0.0, low), high), "real", group)
        if "gain" in self.bounds:
            low, high = map(math.log2, self.bounds["gain"])
            for block in self.blocks:
                yield Parameter(f"{name}.log2_gain.{block}", low, high, min(max(0.0, low), high), "real", group)
        if "bias" in self.bounds:
            low, high = self.bounds["bias"]
            for expert in self.experts:
                yield Parameter(f"{name}.bias.{expert}", low, high, min(max(0.0, low), high), "real", group)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that have their own gain."""
        return ("attention", "mlp") if self.where == "all" else (self.where,)

    def read(self, numbers: Iterator[float], layers: int, ranked: Sequence[str]) -> LayerGroup:
        """The group of this many layers that the next numbers stand for.

        Args:
            ranked: the experts by priority, highest first.
        """
        if self.presence == "each":
            present = tuple(expert for expert in self.experts if next(numbers) == 1)
        else:
            living = set(ranked[: int(next(numbers))])
            present = tuple(expert for expert in self.experts if expert in living)
        top_k = self.top_k
        if self.searches_top_k:
            top_k = int(next(numbers)) + 1
        temperature = 10.0 ** next(numbers) if "temperature" in self.bounds else self.temperature
        gains = {block: 2.0 ** next(numbers) if "gain" in self.bounds else self.gain for block in self.blocks}
        bias = {expert: next(numbers) for expert in self.experts} if "bias" in self.bounds else {}
        return group_of(
            layers,
            present,
            top_k,
            temperature=temperature,
            attention_gain=gains.get("attention", 1.0),
            mlp_gain=gains.get("mlp", 1.0),
            bias={expert: number for expert, number in bias.items() if expert in present},
        )

    def nearest(self, groups: Sequence[LayerGroup]) -> list[float]:
        """The numbers of a group closest to those of its layers, given one group per layer."""
        shares = [float(np.mean([expert in group.experts for group in groups])) for expert in self.experts]
        count = len(self.experts)
        if self.presence == "each":
            numbers = [float(share >= 0.5) for share in shares]
        else:
            numbers = [float(min(max(round(sum(shares)), 1), count))]
        if self.searches_top_k:
            kept = float(np.mean([count if group.top_k is None else group.top_k for group in groups]))
            numbers.append(float(min(max(round(kept), 1), count) - 1))
        if "temperature" in self.bounds:
            numbers.append(_inside([math.log10(group.temperature) for group in groups], self._range("temperature")))
        if "gain" in self.bounds:
            for block in self.blocks:
                gains = [group.attention_gain if block == "attention" else group.mlp_gain for group in groups]
                least = 2.0 ** self._range("gain")[0]
                numbers.append(_inside([math.log2(max(gain, least)) for gain in gains], self._range("gain")))
        if "bias" in self.bounds:
            for expert in self.experts:
                numbers.append(_inside([group.bias.get(expert, 0.0) for group in groups], self._range("bias")))
        return numbers

    def _range(self, name: str) -> tuple[float, float]:
        low, high = self.bounds[name]
        log = {"temperature": math.log10, "gain": math.log2}.get(name, float)
        return log(low), log(high)


def _inside(values: Sequence[float], bounds: tuple[float, float]) -> float:
    return float(np.clip(np.mean(values), *bounds))


def group_of(layers: int, experts: Sequence[str], top_k: int | None, **numbers: object) -> LayerGroup:
    """A group of layers; a ``top_k`` that is not below the number of experts is written as all."""
    kept = None if top_k is None or top_k >= len(experts) else top_k
    return LayerGroup.model_validate({"layers": layers, "experts": tuple(experts), "top_k": kept, **numbers})


def spans(layers: int, groups: int) -> list[range]:
    """Layers divided into this many consecutive groups, as evenly as possible."""
    ends = [layers * number // groups for number in range(groups + 1)]
    return [range(first, last) for first, last in pairwise(ends)]
