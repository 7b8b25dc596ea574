"""Verifies, item by item, that an exported model scores as recorded for its candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel
from evomerge.errors import InputError
from evomerge.search.estimation.statistics import Values, mean_and_error, paired_difference, sign_test
from evomerge.search.preparing.prepare import Prepared
from evomerge.store import CandidateRow, Store
from evomerge.store.events import Rung

_ONE_IN = 20
"""One in this many items may exceed the tolerance, because two tokens may be almost equally likely."""

_CONFIDENCE = 0.95

_SURE = 4.0
"""A shift of the mean by this many standard errors is not chance."""


@dataclass(frozen=True)
class Tolerance:
    """How far rounding may move scores.

    Attributes:
        item: the tolerance of an item, relative to one plus the magnitude of its score.
        mean: the tolerance of the mean, relative to one plus the mean magnitude of the scores.
    """

    item: float
    mean: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Tolerance:
        """The tolerance for a model of this dtype; in bfloat16, 3% of an item and 0.4% of the mean."""
        item = max(1e-3, 4 * torch.finfo(dtype).eps)
        return cls(item, item / 8)

    @property
    def text(self) -> str:
        return (
            f"tolerance where sums round otherwise: {self.item:.2g} (1 + |score|) an item, which one in {_ONE_IN} may "
            f"miss, and {self.mean:.2g} (1 + |score|) in the mean"
        )


@dataclass(frozen=True)
class ScoreChange:
    """How a metric's scores differ from the recorded ones.

    Attributes:
        items: the number of scores that are not bit-identical.
        beyond: the number of scores that differ by more than the tolerance.
        largest: the largest difference.
        shift: the shift of the mean.
        is_rounding: whether rounding explains the differences.
    """

    items: int
    beyond: int
    largest: float
    shift: float
    is_rounding: bool


def difference(now: Values, before: Values, tolerance: Tolerance) -> ScoreChange:
    """The change of the scores of some items; both are float [items]."""
    moved = now.astype(np.float64) - before
    size = np.abs(before)
    beyond = np.abs(moved) > tolerance.item * (1 + size)
    better = int((moved[beyond] > 0).sum())
    shift, error = float(moved.mean()), float(moved.std() / np.sqrt(len(moved)))
    has_shifted = abs(shift) > max(tolerance.mean * (1 + float(size.mean())), _SURE * error)
    is_one_sided = sign_test(better, int(beyond.sum()) - better) < 0.001
    return ScoreChange(
        items=int((moved != 0).sum()),
        beyond=int(beyond.sum()),
        largest=float(np.abs(moved).max()),
        shift=shift,
        is_rounding=beyond.sum() * _ONE_IN <= len(before) and not is_one_sided and not has_shifted,
    )


def reproduce(
    live: LiveModel, store: Store, row: CandidateRow, prepared: Prepared, *, rounds: bool, say: Callable[[str], None]
) -> list[str]:
    """Score an exported model again, loaded as its users load it. Returns a line per evaluator.

    Each item must score as recorded, up to rounding: scales that were folded into the weights and adapters that were
    not (``rounds``), and items that a race scored in several batches, because sums are then added in another order. A
    tolerance applies to these, and is given in the last line.

    Args:
        rounds: whether the written model rounds differently from the scored one.
        say: is called with what is being done.

    Raises:
        InputError: the model does not score as recorded.
    """
    tolerance = Tolerance.of(live.model.dtype)
    raced = _raced(store, row) if prepared.setup.racing is not None else {}
    lines, all_exact = [], True
    for split in ("search", "held_out"):
        recorded = {scores.evaluator: scores for scores in store.scores(row.number, split)}
        for number, (info, evaluator) in enumerate(zip(prepared.setup.evaluators, prepared.evaluators, strict=True)):
            if info.version not in recorded:
                continue
            name = measures_of(prepared, number)
            before = recorded[info.version]
            what = f"{len(before.items)} {split} items"
            say(f"verifying: {name}, {what}")
            now = score(evaluator, live, split, before.items.tolist()).scores
            parts = split == "search" and len(raced.get(info.version, set()) | {len(before.items)}) > 1
            exact = not (rounds or parts)
            differences = {
                metric: difference(now[metric], values, tolerance)
                for metric, values in before.metrics.items()
                if metric not in evaluator.measured
            }
            for metric, moved in differences.items():
                if moved.items and (exact or not moved.is_rounding):
                    place = f"{name} ({split}): {metric}"
                    raise _mismatch(row.id, place, moved, len(before.items))
            result = f"{what} score exactly as recorded"
            if any(moved.items for moved in differences.values()):
                all_exact = False
                why = "of what was folded in" if rounds else "in other batches than those of its race"
                result = f"{what} score as recorded but for rounding {why} ({_differences_text(differences)})"
            lines.append(f"verified: {name}, {result}")
    return lines if all_exact else [*lines, tolerance.text]


def compare(
    live: LiveModel, store: Store, row: CandidateRow, prepared: Prepared, *, say: Callable[[str], None]
) -> list[str]:
    """Score an exported model that differs from its candidate. Returns a line per evaluator, metric and split.

    Each line has the model's own score, the recorded one, and the difference, paired item by item.
    """
    lines = []
    for split in ("search", "held_out"):
        recorded = {scores.evaluator: scores for scores in store.scores(row.number, split)}
        for number, (info, evaluator) in enumerate(zip(prepared.setup.evaluators, prepared.evaluators, strict=True)):
            if info.version not in recorded:
                continue
            name, before = measures_of(prepared, number), recorded[info.version]
            say(f"scoring: {name}, {len(before.items)} {split} items")
            now = score(evaluator, live, split, before.items.tolist()).scores
            for metric in sorted(before.metrics.keys() - set(evaluator.measured)):
                ours, theirs = mean_and_error(now[metric]), mean_and_error(before.metrics[metric])
                gap = paired_difference(now[metric], before.metrics[metric], _CONFIDENCE)
                lines.append(
                    f"{name}, {metric} of {len(before.items)} {split} items: {ours.mean:.3f} ± {ours.stderr:.3f}; "
                    f"recorded of the candidate {theirs.mean:.3f} ± {theirs.stderr:.3f}; "
                    f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
                )
    return lines


def measures_of(prepared: Prepared, number: int) -> str:
    """The objectives and constraints that an evaluator measures, and its own name if it differs."""
    names = [measure.name for measure in prepared.setup.measures if measure.evaluator == number]
    own = prepared.evaluators[number].name
    if not names or own in names:
        return ", ".join([own, *(name for name in names if name != own)])
    return f"{', '.join(names)} ({own})"


def _differences_text(differences: dict[str, ScoreChange]) -> str:
    return "; ".join(
        f"{metric}: {moved.items} items differ, by up to {moved.largest:.2g}, the mean by {moved.shift:+.2g}"
        for metric, moved in differences.items()
        if moved.items
    )


def _mismatch(candidate: str, place: str, moved: ScoreChange, count: int) -> InputError:
    return InputError(
        candidate,
        f"the exported model scores {moved.items} of {count} items of {place} differently than was recorded, by up to "
        f"{moved.largest:.2g}, the mean by {moved.shift:+.2g}",
        "It is not what was scored, or it was scored with other libraries, threads or another device: then export "
        "where the search ran. Without verification (`--no-verify`) it is written as it is.",
    )


def _raced(store: Store, row: CandidateRow) -> dict[str, set[int]]:
    """For each evaluator version, the numbers of items at which the scoring of this recipe was interrupted."""
    same = {other.number for other in store.candidates() if other.recipe_hash == row.recipe_hash}
    counts: dict[str, set[int]] = {}
    for event in store.events(kinds=("rung",)):
        if event.candidate in same:
            for version, count in event.read(Rung).items.items():
                counts.setdefault(version, set()).add(count)
    return counts
