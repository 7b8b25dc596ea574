"""Coarse-to-fine search: parameters of a model's layers are tied at first and split as the number of candidates allows.

A search over layers has too many parameters for its candidates, and most of the possible gain lies in a few sums of
them. So the search begins with one number of each kind (``weight.maths``) for the whole model. When a part of the model
is split into children, each kind gains one difference per split: a direction that raises all parameters of one child
and lowers those of the others so that their mean is unchanged. Existing directions keep their meaning, mean and step
size; new ones start at 0 with a step size of their own. Children are thus perfectly correlated at first, except for a
little variance between them.

These directions form a Haar basis (Haar, 1910) over a tree of places. They are orthogonal, so the closest tied point to
any other point is one inner product per direction, which gives every part the mean of its parameters.
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
"""Parts are split when, since the last split, at least this many candidates per number (counting the new numbers) and
this many generations were told. Waiting until scores stop improving was also measured, and split too late: with 1,000
candidates in generations of 83, most of the budget was spent by then."""

FIRST_STEP = 0.5
"""The first step size between children is this times the search's first step size, times the square root of the part's
share of all parameters of its kind. Equal step sizes on all levels lose more to noise if layers are alike."""

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Part:
    """Parameters of one kind that are tied: those at one place, by their positions in a genome.

    Attributes:
        depth: the depth of the place, in the paths of all its parameters.
    """

    what: str
    depth: int
    numbers: tuple[int, ...]


def are_tied(parameters: Sequence[Parameter]) -> bool:
    """Whether these parameters can be tied: they have places."""
    return any(p.places for p in parameters)


class Parts:
    """The tied parameters of a search, and the subspace of the unit box that they span.

    A point is one number per direction, float64 [directions]: first, for every kind, the value for the whole model in
    [0, 1], then differences between children in [-1, 1].

    Attributes:
        kinds: for each direction, the position in a genome of one parameter of its kind.
        refined: the splits so far.
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
        self._since = self._told = 0  # candidates since the last split, and in total

    @property
    def count(self) -> int:
        """How many numbers are free, which is the length of a point."""
        return len(self._directions)

    @property
    def finest(self) -> int:
        """How many numbers are free once everything has been split."""
        return len(self._places)

    def unit(self, point: Vector) -> Vector:
        """Map a point, possibly from before a split, to the unit box: float64 [parameters]."""
        unit = np.zeros(self.finest)
        for value, direction in zip(point, self._directions, strict=False):  # not matmul: BLAS may reorder its sums
            unit += value * direction
        return np.clip(unit, 0.0, 1.0)

    def point(self, unit: Vector) -> Vector:
        """The tied point closest to one of the unit box: every part has the mean of its parameters."""
        return np.array([float((d * unit).sum() / (d * d).sum()) for d in self._directions])

    def low(self, count: int) -> Vector:
        """The lower bounds of the first ``count`` numbers of a point; the upper bounds are 1."""
        return np.where(np.arange(count) < self._kinds, 0.0, -1.0)

    def padded(self, point: Vector) -> Vector:
        """Extend a point from before a split to the current directions: the new children are equal in it."""
        return np.append(point, np.zeros(self.count - len(point)))

    def learn(self, candidates: int, population: int, *, converged: bool) -> Vector | None:
        """Record that this many more candidates were learnt from, and split parts if it is time.

        Args:
            converged: nothing is left to learn with the current ties.

        Returns:
            The first step size in each new direction, relative to the search's first step size; None without a split.
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
        """How many numbers will be free after this many more candidates, told one generation at a time."""
        for _ in range(candidates // population):
            self.learn(population, population, converged=False)
        return self.count

    def _largest(self) -> list[_Part]:
        """The parts to split next: of those that can be, the ones with more than half the share of the largest."""
        can = [part for part in self._parts if self._children(part)]
        most = max(map(self._share, can), default=0.0)
        return [part for part in can if self._share(part) > most / 2]

    def _share(self, part: _Part) -> float:
        """A part's share of all parameters of its kind."""
        return len(part.numbers) / self._of_kind[part.what]

    def _children(self, part: _Part) -> list[_Part]:
        """A part's children at the first deeper place where its parameters differ; empty if they never do."""
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
        """Each child except the last, paired with all those after it."""
        numbers = [child.numbers for child in self._children(part)]
        for k, one in enumerate(numbers[:-1]):
            yield one, tuple(number for others in numbers[k + 1 :] for number in others)

    def _indicator(self, numbers: Sequence[int]) -> Vector:
        direction = np.zeros(len(self._places))
        direction[list(numbers)] = 1.0
        return direction

    def _contrast(self, one: Sequence[int], others: Sequence[int]) -> Vector:
        """The direction that raises one child, lowers the others and keeps their mean; the larger change is 1."""
        direction = len(others) * self._indicator(one) - len(one) * self._indicator(others)
        return np.asarray(direction / max(len(one), len(others)))
