"""The candidates that a search keeps of all that it scored: the Pareto front, or the best of each niche of a grid."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, Self

from evomerge.front import extend_front

Niche = tuple[int, ...]
"""A cell of a grid: the bin number, from 0, along each feature. ``()`` if there are no features."""

Bounds = Sequence[tuple[float, float]]
"""The range (low, high) within which each feature lies; low equals high if its value is known."""

UNKNOWN = (-math.inf, math.inf)


class Rated(Protocol):
    """What elites need to know about a candidate; an ``Observation`` has it."""

    @property
    def losses(self) -> Sequence[float]: ...

    @property
    def features(self) -> Sequence[float]: ...


class Point(NamedTuple):
    """A minimal ``Rated``."""

    losses: Sequence[float]
    features: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Feature:
    """A number that distinguishes equally good candidates, and how its range is divided into niches.

    A value outside the range belongs to the bin at that end.
    """

    name: str
    low: float
    high: float
    bins: int

    def bin(self, value: float) -> int:
        """The bin of a value, from 0; infinities belong to the first and the last bin."""
        share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return min(math.floor(share * self.bins), self.bins - 1)


@dataclass(frozen=True)
class Grid:
    """The candidates that a search keeps, by niche: the Pareto front of those in each cell of the grid. Immutable.

    With one objective this is one candidate per cell, and without features the Pareto front of all.

    Attributes:
        axes: the features, in the order of ``Rated.features``.
        cells: for every occupied niche, the losses of its elites by candidate number.
    """

    axes: tuple[Feature, ...] = ()
    cells: Mapping[Niche, Mapping[int, Sequence[float]]] = field(default_factory=dict)

    @property
    def niches(self) -> dict[int, Niche]:
        """The niche of each elite by candidate number, in the order of these numbers."""
        return dict(sorted((number, niche) for niche, elites in self.cells.items() for number in elites))

    def niche(self, features: Sequence[float]) -> Niche | None:
        """The niche of a candidate; None if one of its features is unknown (NaN)."""
        if any(math.isnan(value) for value in features):
            return None
        return tuple(axis.bin(value) for axis, value in zip(self.axes, features, strict=True))

    def extend(self, points: Mapping[int, Rated]) -> Self:
        """Add those of the given candidates, by number, that are good enough for their niche; drop those they beat.

        The result depends only on the set of candidates, not on their order or on how they were split between calls.
        """
        new: defaultdict[Niche, dict[int, Sequence[float]]] = defaultdict(dict)
        for number, point in points.items():
            niche = self.niche(point.features)
            if niche is not None and all(map(math.isfinite, point.losses)):
                new[niche][number] = point.losses
        cells = {niche: extend_front(self.cells.get(niche, {}), added) for niche, added in new.items()}
        return replace(self, cells={**self.cells, **cells}) if cells else self

    def box(self, bounds: Bounds) -> list[range]:
        """The bins that a candidate may fall into along each feature."""
        return [range(axis.bin(low), axis.bin(high) + 1) for axis, (low, high) in zip(self.axes, bounds, strict=True)]

    def takes(self, losses: Sequence[float], bounds: Bounds) -> bool:
        """Whether, in some niche that the candidate may fall into, no elite is as good in every objective."""
        box = self.box(bounds)
        if math.prod(map(len, box)) > len(self.cells):
            return True  # one of the niches is empty
        return any(not any(_as_good(elite, losses) for elite in self.cells.get(n, {}).values()) for n in cells_of(box))

    def rivals(self, boxes: Sequence[Sequence[range]]) -> Iterator[tuple[int, Niche]]:
        """The elites of all niches in these boxes, with their niches."""
        for number, niche in self.niches.items():
            if any(all(at in bins for at, bins in zip(niche, box, strict=True)) for box in boxes):
                yield number, niche


def cells_of(box: Sequence[range]) -> Iterator[Niche]:
    """Every niche of a box."""
    return itertools.product(*box)


def _as_good(elite: Sequence[float], losses: Sequence[float]) -> bool:
    return all(theirs <= ours for theirs, ours in zip(elite, losses, strict=True))
