"""What one model is worth in the objectives of a search."""

from __future__ import annotations

from evaluators.base import Split
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel
from evomerge.search.estimation.statistics import mean_and_error
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.preparing.setup import objective_values
from evomerge.store import Estimate


def scored(live: LiveModel, prepared: Prepared, split: Split) -> dict[str, Estimate]:
    """What a model is worth in each objective and constraint, on as many items of a split as a search scores."""
    setup = prepared.setup
    evaluators = enumerate(zip(setup.evaluators, prepared.evaluators, strict=True))
    wanted = setup.counts()
    scores = [
        score(evaluator, live, split, range(wanted[e] if split == "search" else info.held_out_items)).scores
        if e in wanted  # the screen's is not
        else {}
        for e, (info, evaluator) in evaluators
    ]
    return {m.name: mean_and_error(objective_values(m, scores, split)) for m in setup.measures}
