"""From coarse to fine: numbers of a model's layers are tied at first, and come apart as candidates allow.

A search over layers has too many numbers for its candidates, and most of what there is to gain lies in a few sums of
them. So it begins with one number of each kind (``weight.maths``) for the whole model. A part of the model that comes
apart into children adds, for each kind, how far these are from each other: a direction that raises all numbers of one
child and lowers those of the others, so that their mean stays. The numbers before keep their meaning, their mean and
their steps; the new ones begin at 0 with a step of their own. Children are thus perfectly correlated at first, but for
a little variance between them.

These directions are a Haar basis (Haar, 1910) over a tree of places. They are orthogonal, so that the closest tied
point of any other is one inner product for each, which gives every part the mean of its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.genome import Parameter
from evomerge.optimizers.base import Refinement

CANDIDATES_A_NUMBER = 3
GENERATIONS = 2
"""Parts come apart when so many candidates for each number, the new ones counted, and at least so many generations were
told since they last did. To wait until scores of a generation stop getting better was measured too, and came too late:
with 1,000 candidates, of which 83 are a generation, most of the budget was spent by then."""

FIRST_STEP = 0.5
"""The first step between children is this times the search's first step, times the root of the part's share of all
numbers of its kind. Steps that are equal on all levels cost more by their noise where layers are alike."""

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Part:
    """Numbers of one kind that are tied: those at a place, by their positions in a genome.

    Attributes:
        depth: of the place in the paths of all of them.
    """

    what: str
    depth: int
    numbers: tuple[int, ...]


def are_tied(parameters: Sequence[Parameter]) -> bool:
    """Whether numbers of these can be tied: they have places."""
    return any(p.places for p in parameters)


class Parts:
    """The tied numbers of a search, and the points that they span in the unit box.

    A point is one number for each direction, float64 [directions]: first of every kind the number of the whole model,
    in [0, 1], then how far children are apart, in [-1, 1].

    Attributes:
        kinds: of each direction, a number of its kind, by its position in a genome.
        refined: what came apart so far.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._places = [p.places or (p.name,) for p in parameters]
        whole: dict[tuple[str, str], list[int]] = {}
        for position, p in enumerate(parameters):
            whole.setdefault((p.what, self._places[position][0]), []).append(position)
        self._parts = [_Part(what, 0, tuple(numbers)) for (what, _), numbers in whole.items()]
        self._of_kind = {what: sum(p.what == what for p in parameters) for what, _ in whole}
        self._directions = [self._indicator(part.numbers) for part in self._parts]
        self.kinds = [part.numbers[0] for part in self._parts]
        self._kinds = len(self._parts)
        self.refined: list[Refinement] = []
        self._since = self._told = 0  # candidates, since parts last came apart and in all

    @property
    def count(self) -> int:
        """How many numbers are free: the length of a point."""
        return len(self._directions)

    @property
    def finest(self) -> int:
        """How many there are when all have come apart."""
        return len(self._places)

    def unit(self, point: Vector) -> Vector:
        """The point of the unit box, float64 [parameters], that a point stands for; it may be an earlier one."""
        unit = np.zeros(self.finest)
        for value, direction in zip(point, self._directions, strict=False):  # no product, whose sums BLAS may reorder
            unit += value * direction
        return np.clip(unit, 0.0, 1.0)

    def point(self, unit: Vector) -> Vector:
        """The point closest to one of the unit box: every part has the mean of its numbers."""
        return np.array([float((d * unit).sum() / (d * d).sum()) for d in self._directions])

    def low(self, count: int) -> Vector:
        """The lower bounds of a point's first so many numbers; the upper ones are 1."""
        return np.where(np.arange(count) < self._kinds, 0.0, -1.0)

    def padded(self, point: Vector) -> Vector:
        """A point from before parts came apart, among those of now: their children are alike in it."""
        return np.append(point, np.zeros(self.count - len(point)))

    def learn(self, candidates: int, population: int, *, converged: bool) -> Vector | None:
        """Take that so many more candidates were learnt from; if it is time, parts come apart.

        Args:
            converged: nothing is left to learn of the numbers as they are tied.

        Returns:
            The first step in each new direction, as a share of the search's first step; None where none is new.
        """
        self._told += candidates
        self._since += candidates
        largest = self._largest()
        pairs = [pair for part in largest for pair in self._pairs(part)]
        wanted = max(GENERATIONS * population, CANDIDATES_A_NUMBER * (self.count + len(pairs)))
        if not largest or (self._since < wanted and not converged):
            return None
        self._since = 0
        shares = [self._share(part) for part in largest for _ in self._pairs(part)]
        places = dict.fromkeys(self._places[part.numbers[0]][part.depth] for part in largest)
        self._directions += [self._contrast(one, others) for one, others in pairs]
        self.kinds += [one[0] for one, _ in pairs]
        children = [child for part in largest for child in self._children(part)]
        self._parts = [part for part in self._parts if part not in largest] + children
        self.refined.append(Refinement(self._told, self.count, self.finest, tuple(places)))
        return np.asarray(FIRST_STEP * np.sqrt(np.array(shares)))

    def expected(self, candidates: int, population: int) -> int:
        """How many numbers are free after so many more candidates, told by generations."""
        for _ in range(candidates // population):
            self.learn(population, population, converged=False)
        return self.count

    def _largest(self) -> list[_Part]:
        """The parts that come apart next: of those that can, the ones with more than half the share of the largest."""
        can = [part for part in self._parts if self._children(part)]
        most = max(map(self._share, can), default=0.0)
        return [part for part in can if self._share(part) > most / 2]

    def _share(self, part: _Part) -> float:
        """The share that a part has of all numbers of its kind."""
        return len(part.numbers) / self._of_kind[part.what]

    def _children(self, part: _Part) -> list[_Part]:
        """The parts of a part at the first place further down where its numbers differ; none where they never do."""
        paths = [self._places[number] for number in part.numbers]
        for depth in range(part.depth + 1, min(map(len, paths))):
            places = dict.fromkeys(path[depth] for path in paths)
            if len(places) > 1:
                of_place = {
                    place: tuple(n for n, path in zip(part.numbers, paths, strict=True) if path[depth] == place)
                    for place in places
                }
                return [_Part(part.what, depth, numbers) for numbers in of_place.values()]
        return []

    def _pairs(self, part: _Part) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Each child but the last, against those after it."""
        numbers = [child.numbers for child in self._children(part)]
        for k, one in enumerate(numbers[:-1]):
            yield one, tuple(number for others in numbers[k + 1 :] for number in others)

    def _indicator(self, numbers: Sequence[int]) -> Vector:
        direction = np.zeros(len(self._places))
        direction[list(numbers)] = 1.0
        return direction

    def _contrast(self, one: Sequence[int], others: Sequence[int]) -> Vector:
        """The direction in which one child goes up and the others down: their mean stays, the further goes by 1."""
        direction = len(others) * self._indicator(one) - len(one) * self._indicator(others)
        return np.asarray(direction / max(len(one), len(others)))
