"""Checks whether an evaluator that has changed since a search began still scores as recorded.

A user may fix a function that fails on one item, or a held-out file with a bad line, and want to continue. The recorded
scores remain valid only if the same model still gets the same scores, so a recorded candidate is scored again first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from evaluators.base import ItemScores, Split
from evomerge.commands.outside import OutsideJobs
from evomerge.commands.verifying import Tolerance, difference
from evomerge.errors import InputError
from evomerge.search.driving.dispatch import Pending
from evomerge.search.opening.session import accept_changed, changed_evaluators, recipe_of
from evomerge.search.pools.base import Pool
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.work.jobs import Descended, Failed, Finished, Measured, Task
from evomerge.search.workers.building import computing_dtype
from evomerge.store import Scores, Store
from evomerge.store.rows import candidate_id

_SPLITS: tuple[Split, ...] = ("search", "held_out")


def check_changed(folder: Path, prepared: Prepared, store: Store, pool: Pool, console: Console) -> bool:
    """Score a candidate again with every evaluator that has changed, and record that it scores as before.

    The held-out split is scored again only if it was scored before. The caller holds the lease.

    Returns:
        False if the search was stopped first.

    Raises:
        InputError: an item has another score, or cannot be scored; nothing is recorded then.
    """
    changed = changed_evaluators(store, prepared) if store.has_scores() else []
    if not changed:
        return True
    names = ", ".join(prepared.setup.evaluators[e].name for e in changed)
    console.print(f"{names}: changed since the search began; scoring a recorded candidate again", style="dim")
    tasks: dict[int, list[Task]] = {}
    for e in changed:
        for split in _SPLITS:
            if (number := _most_informative(store, prepared.setup.evaluators[e].version, split)) is not None:
                scores = _recorded(store, number, prepared.setup.evaluators[e].version, split)
                tasks.setdefault(number, []).append(Task(e, split, scores.items.tolist()))
    rows = [store.candidate(number) for number in tasks]
    jobs = [
        Pending(row.number, 1, recipe_of(row, prepared.file.sources), row.recipe_hash, tasks[row.number])
        for row in rows
    ]
    if not _Rescoring(folder, prepared, store).run(pool, jobs):
        return False
    shown_by = [candidate_id(number) for number in tasks]
    accept_changed(store, prepared, changed, shown_by)
    if shown_by:
        items = sum(len(task.indices) for own in tasks.values() for task in own)
        console.print(f"{', '.join(shown_by)}: {items} items score as recorded; continuing", style="dim")
    if lost := [row.id for row in store.candidates(statuses=["failed"]) if row.step == 0]:
        are = "was not scored before and is" if len(lost) == 1 else "were not scored before and are"
        console.print(f"{', '.join(lost)} {are} not tried again: a new search scores every baseline", style="yellow")
    return True


def _most_informative(store: Store, version: str, split: Split) -> int | None:
    """The baseline to score again: the one whose scores vary most over the items, because constant scores show little.

    Baselines have all their items scored at once. Without baselines, the first candidate with scores; None without one.
    """
    baselines = [row.number for row in store.candidates(step=0)]
    numbers = store.scored_on(version, split, most=1 + len(baselines))

    def spread(number: int) -> float:
        metrics = _recorded(store, number, version, split).metrics.values()
        return sum(float(values.astype(np.float64).std()) for values in metrics)

    return max([n for n in numbers if n in baselines] or numbers[:1], key=spread, default=None)


def _recorded(store: Store, number: int, version: str, split: Split) -> Scores:
    return next(scores for scores in store.scores(number, split) if scores.evaluator == version)


class _Rescoring(OutsideJobs):
    """Compares the new scores of candidates with the recorded ones."""

    log_prefix = "again-c"

    def __init__(self, folder: Path, prepared: Prepared, store: Store) -> None:
        super().__init__(folder, prepared, store)
        model = prepared.sources[prepared.file.tokenizer_source]
        self._tolerance = Tolerance.of(computing_dtype(prepared.file) or model.dtype)

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None:
        assert isinstance(result, Measured)  # candidates' jobs are not descents
        for task, scores in zip(pending.tasks, result.scores, strict=True):
            before = _recorded(
                self.store, pending.number, self.prepared.setup.evaluators[task.evaluator].version, task.split
            )
            self._compare(pending.number, task, before, scores)

    def _compare(self, number: int, task: Task, before: Scores, now: ItemScores) -> None:
        evaluator = self.prepared.evaluators[task.evaluator]
        for metric, values in before.metrics.items():
            if metric in evaluator.measured:
                continue
            moved = difference(now[metric], values, self._tolerance)
            # Batches are those of the search. On another machine sums round differently, but then almost all of them.
            are_few = 2 * moved.items < len(values)
            if moved.items and (are_few or moved.beyond or not moved.is_rounding):
                size = np.abs(now[metric].astype(np.float64) - values)
                beyond = np.flatnonzero(size > self._tolerance.item * (1 + np.abs(values)))
                first = int((beyond if len(beyond) else np.flatnonzero(size))[0])
                item = evaluator.name_of(task.split, task.indices[first])
                raise InputError(
                    f"objectives: {evaluator.name}",
                    f"scores differently than when the search began: {item} has {metric} {now[metric][first]:.6g}, and "
                    f"had {values[first]:.6g}, of {candidate_id(number)}; {moved.items} of {len(values)} items differ",
                    "Put its data, its files and the libraries back, where the search ran, or start a new search. "
                    "`evomerge export --no-verify` needs none of them.",
                )

    def error(self, finished: Finished, failure: Failed, log: str) -> InputError:
        return InputError(
            candidate_id(finished.candidate),
            f"cannot be scored again: {failure.message}" + (f" (see {log})" if log else ""),
            "It could be scored when the search began: undo what has changed since.",
        )
