"""Two candidates side by side, item by item: what `evomerge compare` shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from evomerge.report.confirmed import better, combined_of
from evomerge.report.search_status import scale_of
from evomerge.report.status import status_of
from evomerge.search.estimation.preference import Preference
from evomerge.search.estimation.statistics import Matrix, paired_difference, sign_test
from evomerge.store import SearchRow, Store
from evomerge.store.record import Measure
from evomerge.store.rows import NullableFloat

Split = Literal["search", "held_out"]

_SPLITS: tuple[Split, ...] = ("search", "held_out")


class Comparison(BaseModel):
    """Two candidates in one objective on one split; positive differences mean that the first is better.

    The interval is that of a single comparison: it is not corrected for any others. A single item has no interval and
    no p. ``p`` is that of the two-sided sign test on the items where they differ: for right-or-wrong scores, McNemar's
    exact test. ``n`` is the number of items that both were scored on, of ``wanted``; it can be smaller after a race.

    A scalarisation is compared too, over the items of all objectives. It is not scored item by item, so ``better_a``,
    ``better_b`` and ``p`` are None.
    """

    objective: str
    split: str
    n: int
    wanted: int
    a: float
    b: float
    difference: float
    confidence: float
    low: NullableFloat
    high: NullableFloat
    better_a: int | None
    better_b: int | None
    p: NullableFloat


def compared(store: Store, a: int, b: int) -> list[Comparison]:
    """Compare two candidates in the scalarisation, if there is one, and then in every objective and constraint, on the
    items of each split that both were scored on.
    """
    search = store.search()
    confidence = search.record.confirm.confidence
    comparisons = []
    for split in _SPLITS:
        pairs: dict[str, Matrix] = {}
        own = []
        scores_a, scores_b = ({s.evaluator: s for s in store.scores(number, split)} for number in (a, b))
        for measure in search.record.judging:
            if measure.version in scores_a and measure.version in scores_b:
                one, other = (scores[measure.version] for scores in (scores_a, scores_b))
                wanted = measure.items if split == "search" else max(len(one.items), len(other.items))
                items, at_one, at_other = np.intersect1d(one.items, other.items, return_indices=True)
                at_one, at_other = (at[items < wanted] for at in (at_one, at_other))
                if len(at_one):
                    pair = one.metrics[measure.metric][at_one], other.metrics[measure.metric][at_other]
                    own.append(_compare(measure, split, wanted, *pair, confidence))
                    pairs[measure.name] = np.stack([better(measure, values) for values in pair], axis=1)
        comparisons += [*_combined(store, search, split, pairs, own), *own]
    return comparisons


def _combined(
    store: Store, search: SearchRow, split: Split, pairs: Mapping[str, Matrix], own: Sequence[Comparison]
) -> Iterator[Comparison]:
    """The comparison in the scalarisation, if both were scored in every objective.

    Args:
        pairs: by objective and constraint, float64 [items, 2], higher is better.
        own: the comparisons in the objectives and constraints.
    """
    preference = Preference.of_search(search)
    if not preference.scalar or any(name not in pairs for name in preference.objectives):
        return
    status = status_of(store)
    scores = [pairs[name] for name in preference.objectives]
    combined = combined_of(store, search, preference, scores, split, scale_of(status, split))
    gap = combined.difference(0, 1, search.record.confirm.confidence)
    objectives = [comparison for comparison in own if comparison.objective in preference.objectives]
    a, b = (-preference.sign * combined.means).tolist()
    yield Comparison(
        objective=preference.scalar,
        split=split,
        n=sum(comparison.n for comparison in objectives),
        wanted=sum(comparison.wanted for comparison in objectives),
        a=a,
        b=b,
        difference=gap.mean,
        confidence=objectives[0].confidence,
        low=gap.low,
        high=gap.high,
        better_a=None,
        better_b=None,
        p=None,
    )


def _compare(
    measure: Measure,
    split: str,
    wanted: int,
    one: NDArray[np.float32],
    other: NDArray[np.float32],
    confidence: float,
) -> Comparison:
    sign = measure.sign
    gap = paired_difference(sign * one, sign * other, confidence)
    better_a, better_b = int((sign * one > sign * other).sum()), int((sign * one < sign * other).sum())
    return Comparison(
        objective=measure.name,
        split=split,
        n=len(one),
        wanted=wanted,
        a=float(one.mean(dtype=np.float64)),
        b=float(other.mean(dtype=np.float64)),
        difference=gap.mean,
        confidence=confidence,
        low=gap.low,
        high=gap.high,
        better_a=better_a,
        better_b=better_b,
        p=sign_test(better_a, better_b) if len(one) > 1 else math.nan,
    )
