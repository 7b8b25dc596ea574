"""Which of many sources to search over: a race of each alone, objective by objective, then whoever adds most.

In an objective a source leaves the race when it is surely worse there than as many others as have a place, or than the
base: in no other way is it known to be of no use. Of more than half of public fine-tunes that is so (arXiv 2511.21437:
they are below their base). Who is left is put in an order by what it adds to those before it (the greedy cover of
``team``, in place of cosines between task vectors, which say little of merges: arXiv 2410.12613), counted from what the
base solves. Items are a random sample, the same for all, so a gain has a standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evomerge.genome import Parameter
from evomerge.search.estimation.racing import Sample, surely_less
from evomerge.search.estimation.statistics import Difference, mean_and_error, sum_interval

Matrix = NDArray[np.float64]
Row = NDArray[np.float64]


class ObjectiveRace:
    """The race for the places of one objective.

    Args:
        sources: all of them.
        places: how many are wanted for this objective.
        population: how many items the objective has, of which those scored are a random sample.
        confidence: one-sided, of a single comparison.

    Attributes:
        racing: the sources that need more items, in the order given.
        out: those that the base, or as many others as there are places, surely better.
    """

    def __init__(self, sources: Sequence[str], places: int, population: int, confidence: float) -> None:
        self.racing, self.out = list(sources), set[str]()
        self._places, self._population, self._confidence = places, population, confidence

    def judge(self, base: Row, scores: Matrix) -> None:
        """Let those leave whose place is clear.

        Args:
            base: float64 [k], the base's scores of k items, more is better.
            scores: float64 [racing, k], those of the sources that still race.
        """
        sample = Sample(np.zeros(len(base), dtype=np.int64), np.array([self._population]))
        less, _ = surely_less(np.vstack([base, scores]), sample, self._confidence)
        among = less[1:, 1:]
        out = less[1:, 0] | (among.sum(axis=1) >= self._places)
        settled = ~out & (among.sum(axis=0) >= len(among) - self._places)
        self.out |= {self.racing[i] for i in np.flatnonzero(out)}
        self._places -= int(settled.sum())
        self.racing = [name for i, name in enumerate(self.racing) if not out[i] and not settled[i]]
        if self._places == 0:
            self.out |= set(self.racing)
            self.racing = []


@dataclass(frozen=True)
class Gain:
    """What a source adds to those chosen before it: the mean over objectives of what more is solved, and its error."""

    mean: float
    stderr: float


@dataclass(frozen=True)
class Chosen:
    """A source with what it adds to those chosen before it."""

    name: str
    gain: Gain


def by_gain(
    base: Sequence[Row], sources: Mapping[str, Sequence[Row]], most: int, confidence: float, least: int = 0
) -> Iterator[Chosen]:
    """Sources one after the other, whoever surely adds most; beyond the ``least`` no more where nobody adds anything.

    Args:
        base: for each objective the base's scores, float64 [items], more is better.
        sources: of each source the same, NaN where it has no score.
        most: how many at most.
        confidence: one-sided: they are ordered by the bounds that their gains surely exceed, so that who was scored on
            few items does not come first by luck.
    """
    covered, left, reach = [row.copy() for row in base], dict(sources), float(special.ndtri(confidence))
    for number in range(min(most, len(left))):
        gains = {name: _gain(covered, rows) for name, rows in left.items()}
        best = max(gains, key=lambda name: gains[name].mean - reach * gains[name].stderr)
        if gains[best].mean <= 0.0 and number >= least:
            return
        yield Chosen(best, gains[best])
        for reached, scores in zip(covered, left.pop(best), strict=True):
            np.fmax(reached, scores, out=reached)


def start_by_gains(kept: Sequence[Chosen], weights: Sequence[Parameter]) -> dict[str, float]:
    """How much of each source a search begins with: in proportion to what it adds, and nothing of the others.

    Whoever adds most begins in the middle of its weight's range. All of them there would be a merge that is much too
    strong (docs/select.md).

    Args:
        weights: the parameters of the search; those that are no source's share are left out.

    Returns:
        By source; empty where nobody adds anything.
    """
    gains = {chosen.name: chosen.gain.mean for chosen in kept}
    most, start = max(gains.values(), default=0.0), dict[str, float]()
    for weight in weights:
        if most > 0.0 and weight.share_of and weight.kind == "real":
            wanted = (weight.low + weight.high) / 2 * (gains.get(weight.share_of, 0.0) / most)
            start[weight.share_of] = min(max(wanted, weight.low), weight.high)
    return start


def _gain(covered: Sequence[Row], rows: Sequence[Row]) -> Gain:
    """What a source adds to what is covered, over the items that it is scored on."""
    more = [np.maximum(0.0, scores - reached) for scores, reached in zip(rows, covered, strict=True)]
    estimates = [mean_and_error(values[~np.isnan(values)]) for values in more if not np.isnan(values).all()]
    errors = [estimate.stderr or 0.0 for estimate in estimates]
    return Gain(sum(e.mean for e in estimates) / len(rows), math.sqrt(sum(e**2 for e in errors)) / len(rows))


def pooled_difference(ours: Sequence[Row], theirs: Sequence[Row]) -> Difference:
    """How much better one model is than another, the mean over objectives, with the interval of 95%.

    Args:
        ours: for each objective the one's scores, float64 [items], more is better; ``theirs`` of the same items.
    """
    parts = [(one - other) / len(ours) for one, other in zip(ours, theirs, strict=True)]
    return sum_interval(float(sum(part.mean() for part in parts)), parts, 0.95)
