"""Scoring a single model in the objectives of a search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evaluators.base import ItemScores, Split
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel
from evomerge.search.estimation.statistics import Difference, mean_and_error, paired_difference
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.preparing.setup import MeasureInfo, objective_values
from evomerge.store import Estimate

_CONFIDENCE = 0.95


def scored(live: LiveModel, prepared: Prepared, split: Split) -> dict[str, Estimate]:
    """A model's estimates in each objective and constraint, on as many items of a split as a search scores."""
    scores = item_scores(live, prepared, split)
    return {m.name: mean_and_error(objective_values(m, scores, split)) for m in prepared.setup.measures}


def item_scores(live: LiveModel, prepared: Prepared, split: Split) -> list[ItemScores]:
    """A model's scores on as many items of a split as a search scores, one entry per evaluator."""
    setup = prepared.setup
    evaluators = enumerate(zip(setup.evaluators, prepared.evaluators, strict=True))
    wanted = setup.counts()
    return [
        score(evaluator, live, split, range(wanted[e] if split == "search" else info.held_out_items)).scores
        if e in wanted  # the screen is not wanted
        else {}
        for e, (info, evaluator) in evaluators
    ]


@dataclass(frozen=True)
class Gap:
    """A measure of one model, and the paired difference from another model."""

    own: Estimate
    difference: Difference

    @property
    def text(self) -> str:
        """The difference and its interval."""
        return f"{self.difference.mean:+.3f} [{self.difference.low:+.3f}, {self.difference.high:+.3f}]"


def gaps(
    measures: Iterable[MeasureInfo], ours: Sequence[ItemScores], theirs: Sequence[ItemScores], split: Split
) -> list[Gap]:
    """The differences between the scores of two models on the same items, for each measure."""
    values = [(objective_values(m, ours, split), objective_values(m, theirs, split)) for m in measures]
    return [Gap(mean_and_error(own), paired_difference(own, other, _CONFIDENCE)) for own, other in values]
