"""Two candidates side by side, item by item: what `evomerge compare` shows."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from evomerge.report.entries import Known, Measure, measures_of
from evomerge.search.estimation.statistics import paired_difference, sign_test
from evomerge.store import Store


class Comparison(BaseModel):
    """Two candidates in one objective on one split; positive differences mean that the first is better.

    The interval is that of one comparison: it is not corrected for others that were or will be made, and of one
    item there is none, and no p. ``p`` is that of the two-sided sign test on the items where they differ: for
    right-or-wrong scores, McNemar's exact test. ``n`` are the items that both were scored on, of ``wanted``; a race
    may have left fewer of these.
    """

    objective: str
    split: str
    n: int
    wanted: int
    a: float
    b: float
    difference: float
    confidence: float
    low: Known
    high: Known
    better_a: int
    better_b: int
    p: Known


def compared(store: Store, a: int, b: int) -> list[Comparison]:
    """Two candidates in every objective and constraint, on the items of each split that both were scored on."""
    search = store.search()
    confidence = search.settings["confirm"]["confidence"]
    found = []
    for split in ("search", "held_out"):
        scores_a, scores_b = ({s.evaluator: s for s in store.scores(number, split)} for number in (a, b))
        for measure in measures_of(search.fingerprints):
            if measure["version"] in scores_a and measure["version"] in scores_b:
                one, other = (scores[measure["version"]] for scores in (scores_a, scores_b))
                wanted = measure["items"] if split == "search" else max(len(one.items), len(other.items))
                items, at_one, at_other = np.intersect1d(one.items, other.items, return_indices=True)
                at_one, at_other = (at[items < wanted] for at in (at_one, at_other))
                if len(at_one):
                    pair = one.metrics[measure["metric"]][at_one], other.metrics[measure["metric"]][at_other]
                    found.append(_compare(measure, split, wanted, *pair, confidence))
    return found


def _compare(
    measure: Measure,
    split: str,
    wanted: int,
    one: NDArray[np.float32],
    other: NDArray[np.float32],
    confidence: float,
) -> Comparison:
    sign = 1.0 if measure["maximise"] else -1.0
    gap = paired_difference(sign * one, sign * other, confidence)
    better_a, better_b = int((sign * one > sign * other).sum()), int((sign * one < sign * other).sum())
    return Comparison(
        objective=measure["name"],
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
