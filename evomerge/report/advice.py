"""What published evidence says about merging sources like the inspected ones, and nothing beyond it.

Whether sources point in the same direction is shown, but no advice is based on it: cosines of task vectors alone hardly
predict the quality of a merge (arXiv 2601.22285).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.merging.measured.amplitude import LARGE_DISPERSION, dispersion, kappa
from evomerge.report.entries import percent
from evomerge.report.inspected import SourceDistance

MANY_SOURCES = 8
"""Beyond this number, few sources are worth including: the gain falls as one over their number."""

FAR = 2.0
"""A sum this many times as far from the base as its farthest source is likely to score below the base: the methods that
did so in arXiv 2511.21437 were at two to six times the distance of those that did not."""


def dispersion_of(sources: Sequence[SourceDistance]) -> float | None:
    """The largest of the sources' relative norms divided by the smallest; None if fewer than two are known."""
    norms = _norms(sources)
    return dispersion(list(norms.values())) if len(norms) > 1 else None


def advice_on(sources: Sequence[SourceDistance], products: NDArray[np.float64]) -> Iterator[tuple[str, str]]:
    """Pairs of a sentence and the reference of its evidence.

    Args:
        products: [n + 1, n + 1], inner products of the base and the task vectors of the sources.
    """
    norms = _norms(sources)
    if len(norms) < 2 or not products[0, 0] > 0:
        return
    spread, count = dispersion(list(norms.values())), len(sources)
    factor = kappa(list(norms.values()))
    weight, even = factor / math.sqrt(count), "even" if spread < LARGE_DISPERSION else "uneven"
    whole = math.sqrt(max(float(products[1:, 1:].sum()), 0.0) / float(products[0, 0]))
    yield (
        f"A start without a search: task arithmetic with weights of {weight:.2f}, lambda = {factor:g} sqrt({count}) on "
        f"the mean, for norms are {even} (largest by smallest {spread:.1f}). It changes the base by "
        f"{percent(weight * whole)}.",
        "arXiv 2608.17366",
    )
    if spread >= LARGE_DISPERSION:
        near, far = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
        yield (
            f"{far} is {spread:.1f} times as far from the base as {near}: uneven norms hurt a merge. Give every source "
            "a weight of its own.",
            "arXiv 2508.01148",
        )
    if whole >= FAR * max(norms.values()):
        times = whole / max(norms.values())
        yield (
            f"With weights of 1 their sum changes the base by {percent(whole)}, {times:.1f} times as far as the "
            "farthest source: merges that go so far mostly fall below the base. Search the strength of every method.",
            "arXiv 2511.21437",
        )
    if count > MANY_SOURCES:
        yield (
            f"{count} sources are many: most of the gain comes with the first four or five. Score each alone, and "
            "leave out what is poor.",
            "arXiv 2509.24244, 2511.21437",
        )


def _norms(sources: Sequence[SourceDistance]) -> dict[str, float]:
    """Relative norms of the sources that are not the base itself."""
    return {s.name: s.whole.relative_norm for s in sources if s.whole.relative_norm}
