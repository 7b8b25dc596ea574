"""What a search keeps of all that it scored: the Pareto front, or the best of every niche of a grid."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, Self

from evomerge.front import extend_front

Niche = tuple[int, ...]
"""A cell of a grid: the number of its bin, from 0, along each feature. ``()`` where there are no features."""

Bounds = Sequence[tuple[float, float]]
"""Between what values each feature lies: (low, high), equal where it is known."""

UNKNOWN = (-math.inf, math.inf)


class Rated(Protocol):
    """What elites know of a candidate; an ``Observation`` is one."""

    @property
    def losses(self) -> Sequence[float]: ...

    @property
    def features(self) -> Sequence[float]: ...


class Point(NamedTuple):
    """The least that is ``Rated``."""

    losses: Sequence[float]
    features: Sequence[float] = ()


class Elites(Protocol):
    """The candidates that a search keeps, by their numbers. It never changes: ``extend`` makes another."""

    @property
    def niches(self) -> Mapping[int, Niche]:
        """The niche of each elite, by the candidate's number, in the order of the numbers."""
        ...

    def extend(self, points: Mapping[int, Rated]) -> Self:
        """These elites and further candidates, by number, as far as they are the better ones of their niche.

        What comes out depends on the candidates alone, and not on how they were divided or ordered.
        """
        ...


@dataclass(frozen=True, slots=True)
class Feature:
    """A number that sets candidates apart that may be equally good, and how its range is divided into niches.

    A value outside the range belongs to the bin at that end.
    """

    name: str
    low: float
    high: float
    bins: int

    def bin(self, value: float) -> int:
        """The bin of a value, from 0; infinities are in the first and the last."""
        share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return min(math.floor(share * self.bins), self.bins - 1)


@dataclass(frozen=True)
class Grid:
    """Elites by the niches of features: in every cell the Pareto front of the candidates there.

    That is one candidate a cell where there is one objective, and without features the Pareto front of all.

    Attributes:
        axes: the features, in the order of ``Rated.features``.
        cells: of every occupied niche the losses of its elites, by the candidates' numbers.
    """

    axes: tuple[Feature, ...] = ()
    cells: Mapping[Niche, Mapping[int, Sequence[float]]] = field(default_factory=dict)

    @property
    def niches(self) -> dict[int, Niche]:
        return dict(sorted((number, niche) for niche, elites in self.cells.items() for number in elites))

    def niche(self, features: Sequence[float]) -> Niche | None:
        """The niche of a candidate; None where a feature of it is not known (NaN)."""
        if any(math.isnan(value) for value in features):
            return None
        return tuple(axis.bin(value) for axis, value in zip(self.axes, features, strict=True))

    def extend(self, points: Mapping[int, Rated]) -> Self:
        new: defaultdict[Niche, dict[int, Sequence[float]]] = defaultdict(dict)
        for number, point in points.items():
            niche = self.niche(point.features)
            if niche is not None and all(map(math.isfinite, point.losses)):
                new[niche][number] = point.losses
        cells = {niche: extend_front(self.cells.get(niche, {}), added) for niche, added in new.items()}
        return replace(self, cells={**self.cells, **cells}) if cells else self

    def box(self, bounds: Bounds) -> list[range]:
        """The bins that a candidate may be in along each feature."""
        return [range(axis.bin(low), axis.bin(high) + 1) for axis, (low, high) in zip(self.axes, bounds, strict=True)]

    def takes(self, losses: Sequence[float], bounds: Bounds) -> bool:
        """Whether in some niche that a candidate may be in no elite is as good as it in every objective."""
        box = self.box(bounds)
        if math.prod(map(len, box)) > len(self.cells):
            return True  # one of them is empty
        return any(not any(_as_good(elite, losses) for elite in self.cells.get(n, {}).values()) for n in cells_of(box))

    def rivals(self, boxes: Sequence[Sequence[range]]) -> Iterator[tuple[int, Niche]]:
        """The elites, with their niches, of all niches in these boxes."""
        for number, niche in self.niches.items():
            if any(all(at in bins for at, bins in zip(niche, box, strict=True)) for box in boxes):
                yield number, niche


def cells_of(box: Sequence[range]) -> Iterator[Niche]:
    """Every niche of a box."""
    return itertools.product(*box)


def _as_good(elite: Sequence[float], losses: Sequence[float]) -> bool:
    return all(theirs <= ours for theirs, ours in zip(elite, losses, strict=True))
