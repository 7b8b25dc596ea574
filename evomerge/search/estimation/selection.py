"""Which of many sources to search over: a race between single sources in each objective, then a greedy choice.

A source leaves the race of an objective when it is surely worse there than the base, or than as many others as there
are places; only then is it known to be useless. More than half of public fine-tunes are worse than their base (arXiv
2511.21437). The sources that are left are ordered by what each adds to those before it and to the base: the greedy
cover of ``team``, and not cosines between task vectors, which say little about merges (arXiv 2410.12613). Items are a
random sample, the same for all sources, so a gain has a standard error.
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
"""Scores of one source in one objective, float64 [items]."""


class ObjectiveRace:
    """The race for the places of one objective.

    Args:
        sources: all of them.
        places: how many sources to keep for this objective.
        population: the number of items of the objective, of which the scored ones are a random sample.
        confidence: one-sided, of a single comparison.

    Attributes:
        racing: the sources that need more items, in the given order.
        out: the sources that are surely worse than the base, or have no place left.
    """

    def __init__(self, sources: Sequence[str], places: int, population: int, confidence: float) -> None:
        self.racing, self.out = list(sources), set[str]()
        self._places, self._population, self._confidence = places, population, confidence

    def judge(self, base: Row, scores: Matrix) -> None:
        """Remove the sources for which the race is decided.

        Args:
            base: float64 [k], the base's scores on k items, higher is better.
            scores: float64 [racing, k], those of the sources that are still in the race.
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
    """What a source adds to those chosen before it: the mean over objectives of the gain in coverage, and its error."""

    mean: float
    stderr: float


@dataclass(frozen=True)
class Chosen:
    """A chosen source, and what it adds to those chosen before it."""

    name: str
    gain: Gain


def by_gain(
    base: Sequence[Row], sources: Mapping[str, Sequence[Row]], most: int, confidence: float, least: int = 0
) -> Iterator[Chosen]:
    """Choose sources greedily, each time the one that surely adds most to those chosen before.

    Args:
        base: for each objective the base's scores, float64 [items], higher is better.
        sources: for each source the same, NaN where it has no score.
        most: how many sources to choose at most.
        confidence: one-sided. Sources are ordered by the lower bounds of their gains, so that one that was scored on
            few items does not come first by luck.
        least: how many to choose even if they add nothing.

    Yields:
        The chosen sources, in order.
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
    """The weight of each source at which a search starts: proportional to its gain, and 0 for sources without one.

    The source that adds most starts in the middle of its weight's range. If all started there, the merge would be much
    too strong (docs/select.md).

    Args:
        kept: the chosen sources.
        weights: the parameters of the search; those that are not the share of a source are ignored.

    Returns:
        The weights by source, within their ranges; empty if no source adds anything.
    """
    gains = {chosen.name: chosen.gain.mean for chosen in kept}
    most, start = max(gains.values(), default=0.0), dict[str, float]()
    for weight in weights:
        if most > 0.0 and weight.share_of and weight.kind == "real":
            wanted = (weight.low + weight.high) / 2 * (gains.get(weight.share_of, 0.0) / most)
            start[weight.share_of] = min(max(wanted, weight.low), weight.high)
    return start


def _gain(covered: Sequence[Row], rows: Sequence[Row]) -> Gain:
    """What a source adds to the covered scores, over the items that it is scored on."""
    more = [np.maximum(0.0, scores - reached) for scores, reached in zip(rows, covered, strict=True)]
    estimates = [mean_and_error(values[~np.isnan(values)]) for values in more if not np.isnan(values).all()]
    errors = [estimate.stderr or 0.0 for estimate in estimates]
    return Gain(sum(e.mean for e in estimates) / len(rows), math.sqrt(sum(e**2 for e in errors)) / len(rows))


def pooled_difference(ours: Sequence[Row], theirs: Sequence[Row]) -> Difference:
    """By how much one model is better than another, as the mean over objectives, with a 95% interval.

    Args:
        ours: for each objective the scores of the first model, float64 [items], higher is better.
        theirs: those of the second model on the same items.
    """
    parts = [(one - other) / len(ours) for one, other in zip(ours, theirs, strict=True)]
    return sum_interval(float(sum(part.mean() for part in parts)), parts, 0.95)
