"""The driver: one search from its first landmark to the end of its budget.

It asks the optimizer for a generation of genomes, decodes them, has them scored by a pool, and tells the optimizer. It
alone writes to the store, each step in one transaction, before anything is done on the strength of it. So whatever
kills it, a new driver brings a fresh optimizer to the same point by replaying the recorded asks and tells, and goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from evomerge.errors import InputError
from evomerge.genome import Genome
from evomerge.optimizers import Optimizer
from evomerge.recipe import Recipe, text_hash
from evomerge.search.control import Control
from evomerge.search.dispatch import Dispatcher, Pending
from evomerge.search.jobs import Failed, Finished, Measured
from evomerge.search.pools.base import Pool
from evomerge.search.scores import estimate_objectives, to_scores
from evomerge.search.setup import Setup
from evomerge.store import CandidateRow, Estimate, NewCandidate, Store
from evomerge.store.front import extend_front

Ending = Literal["finished", "stopped", "cancelled"]


@dataclass
class _Known:
    """What the driver keeps of a candidate for the length of a generation."""

    number: int
    genome: Genome | None
    recipe: Recipe
    recipe_hash: str
    text: str = ""
    attempts: int = 0
    faults: int = 0
    losses: list[float] | None = None


class Driver:
    """Runs one search.

    Args:
        setup: what to search.
        store: where everything is recorded; the caller holds its lease.
        pool: what runs the jobs.
        control: the verbs.
        logs: folder for the logs of failed attempts.
        idle: called at least once a second while waiting, and after each step.
        clock: seconds, for the budget of hours.
    """

    def __init__(
        self,
        setup: Setup,
        store: Store,
        pool: Pool,
        control: Control,
        *,
        logs: Path,
        idle: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setup = setup
        self._store = store
        self._control = control
        self._logs = logs
        self._clock = clock
        self._started = clock()
        self._spent_before_s = 0.0
        self._dispatcher = Dispatcher(pool, control, setup.attempts, idle)
        self._optimizer: Optimizer = setup.optimizer.build(setup.space.parameters, len(setup.objectives), setup.seed)
        self._tasks = setup.tasks("search")
        self._step = 0
        self._asked = 0
        self._generation: list[_Known] = []
        self._answers: dict[str, tuple[int, Mapping[str, Estimate]]] = {}
        self._front: dict[int, Sequence[float]] = {}
        self._unchanged = 0
        self.why = ""

    def run(self) -> Ending:
        """Search until the budget is spent or a stop is asked for; ``why`` says in words what ended it."""
        self._replay()
        self._started = self._clock()
        self._store.set_state("running")
        if not self._asked:
            self._ask_landmarks()
        while True:
            if self._generation and not self._score_generation():
                return self._end_early()
            if self._generation:
                self._check_landmarks()
                self._tell()
            if reason := self._spent():
                return self._end("finished", reason)
            self._ask()

    # Asking and telling -------------------------------------------------------------------------------------------

    def _ask_landmarks(self) -> None:
        marks = list(self._setup.space.landmarks())
        self._record_ask(
            [self._next(i, mark.genome, mark.recipe) for i, mark in enumerate(marks)],
            [(mark.kind, mark.label) for mark in marks],
        )

    def _ask(self) -> None:
        genomes = self._optimizer.ask(self._room())
        asked = [self._next(i, genome, self._setup.space.decode(genome)) for i, genome in enumerate(genomes)]
        self._record_ask(asked, [(self._setup.optimizer.name, "")] * len(asked))

    def _room(self) -> int:
        """The size of the next generation: the optimizer's, or what is left of the budget."""
        most = self._setup.budget.candidates
        return self._optimizer.population if most is None else min(self._optimizer.population, most - self._asked)

    def _next(self, i: int, genome: Genome | None, recipe: Recipe) -> _Known:
        text = recipe.canonical()
        return _Known(self._asked + i, genome, recipe, text_hash(text), text)

    def _record_ask(self, asked: list[_Known], origins: Sequence[tuple[str, str]]) -> None:
        new = [
            NewCandidate(k.number, origin, k.text, k.recipe_hash, k.genome, label)
            for k, (origin, label) in zip(asked, origins, strict=True)
        ]
        self._store.record_ask(self._step, new)
        self._generation = asked
        self._asked += len(asked)

    def _tell(self) -> None:
        losses = {known.number: known.losses for known in self._generation if known.losses is not None}
        self._update_front(losses)
        self._store.record_tell(self._step, losses, front=self._front, spent_s=self._spent_s())
        self._tell_optimizer(self._generation)
        self._generation = []
        self._step += 1

    def _check_landmarks(self) -> None:
        """When every landmark fails, what is wrong is not a merge, and a whole budget would be spent on finding out.

        Raises:
            InputError: with the first failure's message.
        """
        if self._step == 0 and all(not np.isfinite(k.losses or math.inf).all() for k in self._generation):
            failure = self._store.candidate(0).failure or {}
            raise InputError(
                "landmarks",
                f"every source and average failed; candidate 0: {failure.get('message')}",
                f"See {failure['log']} in the folder of the search." if failure.get("log") else "",
            )

    def _tell_optimizer(self, generation: Sequence[_Known]) -> None:
        told = [(k.genome, k.losses) for k in generation if k.genome is not None and k.losses is not None]
        if told:
            self._optimizer.tell(told)

    def _update_front(self, losses: dict[int, list[float]]) -> None:
        before = set(self._front)
        scored = {number: values for number, values in losses.items() if np.isfinite(values).all()}
        self._front = extend_front(self._front, scored)
        self._unchanged = 0 if set(self._front) != before else self._unchanged + 1

    # Scoring ------------------------------------------------------------------------------------------------------

    def _score_generation(self) -> bool:
        todo = [
            Pending(k.number, k.attempts + 1, k.recipe, k.recipe_hash, k.faults)
            for k in self._generation
            if k.losses is None
        ]
        return self._dispatcher.run(todo, self._tasks, self)

    def answer(self, pending: Pending) -> bool:
        twin = self._answers.get(pending.recipe_hash)
        if twin is None:
            return False
        number, objectives = twin
        self._store.record_cached(pending.number, number, objectives)
        self._set_losses(pending.number, self._losses(objectives))
        return True

    def dispatched(self, pending: Pending) -> None:
        self._store.record_dispatch(pending.number, pending.attempt, "")

    def measured(self, finished: Finished, result: Measured) -> None:
        scores = to_scores(self._setup, result, self._tasks)
        objectives = estimate_objectives(self._setup, scores)
        if not self._store.record_result(
            finished.candidate, finished.attempt, scores, result.timings, objectives, finished.worker
        ):
            return
        known = self._set_losses(finished.candidate, self._losses(objectives))
        self._answers[known.recipe_hash] = (known.number, objectives)

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        log = write_log(self._logs, finished, failure, "c")
        what = {"reason": failure.reason, "message": failure.message, "log": log, "worker": finished.worker}
        self._store.record_failure(finished.candidate, finished.attempt, what, final=final)
        if final:
            self._set_losses(finished.candidate, [math.inf] * len(self._setup.objectives))

    def late(self, finished: Finished) -> None:
        self._store.record_event("stale", {"candidate": finished.candidate, "attempt": finished.attempt})

    def _set_losses(self, number: int, losses: list[float]) -> _Known:
        known = self._generation[number - self._generation[0].number]
        known.losses = losses
        return known

    def _losses_of(self, row: CandidateRow) -> list[float] | None:
        """What the optimizer was or will be told of a recorded candidate; None while it is unfinished."""
        if row.status == "failed":
            return [math.inf] * len(self._setup.objectives)
        return self._losses(row.objectives) if row.objectives else None

    def _losses(self, objectives: Mapping[str, Estimate]) -> list[float]:
        return [o.loss(objectives[o.name]["mean"]) for o in self._setup.objectives]

    # Budget -------------------------------------------------------------------------------------------------------

    def _spent_s(self) -> float:
        """Seconds in which a driver was at work on this search, earlier ones included and pauses not."""
        return self._spent_before_s + self._clock() - self._started - self._control.paused_s()

    def _spent(self) -> str:
        """Why the search should end now, or nothing."""
        budget = self._setup.budget
        if budget.candidates is not None and self._asked >= budget.candidates:
            return f"{budget.candidates} candidates asked"
        if budget.hours is not None and self._spent_s() >= budget.hours * 3600:
            return f"{budget.hours} hours spent"
        if budget.patience is not None and self._unchanged >= budget.patience:
            return f"the front has not changed for {budget.patience} generations"
        return self._optimizer.stopped or ""

    def _end_early(self) -> Ending:
        if self._control.cancelled:
            return self._end("cancelled", "asked to end at once")
        return self._end("stopped", "asked to stop")

    def _end(self, ending: Ending, why: str) -> Ending:
        self.why = why
        self._store.set_state(ending, why=why, spent_s=self._spent_s())
        return ending

    # Replay -------------------------------------------------------------------------------------------------------

    def _replay(self) -> None:
        """Bring the optimizer to where the store is.

        Raises:
            InputError: a genome or recipe comes out otherwise than it was recorded.
        """
        for step in self._store.steps():
            if step.kind == "ask":
                self._step = step.step
                self._generation = self._replay_ask(step.step)
            else:
                self._tell_optimizer(self._generation)
                self._update_front({k.number: k.losses for k in self._generation if k.losses is not None})
                self._generation = []
                self._step += 1
        self._spent_before_s = self._store.search().spent_s
        unfinished = {k.number: k for k in self._generation if k.losses is None}
        if unfinished:
            for event in self._store.events(kinds=("failure",)):
                if event.candidate in unfinished:
                    unfinished[event.candidate].faults += 1

    def _replay_ask(self, step: int) -> list[_Known]:
        rows = self._store.candidates(step=step)
        if step == 0:
            points = [(mark.genome, mark.recipe) for mark in self._setup.space.landmarks()]
        else:
            asked = self._optimizer.replay([row.genome for row in rows if row.genome is not None])
            points = [(genome, self._setup.space.decode(genome)) for genome in asked]
        if len(points) != len(rows):
            raise _drift(f"step {step}", f"gives {len(points)} candidates where {len(rows)} were recorded")
        generation = []
        for row, (genome, recipe) in zip(rows, points, strict=True):
            if _bits(genome) != _bits(row.genome) or recipe.hash != row.recipe_hash:
                place = f"candidate {row.number} (step {step})"
                raise _drift(place, "gives another genome or recipe than was recorded")
            if row.status == "done":
                self._answers.setdefault(row.recipe_hash, (row.number, row.objectives))
            known = _Known(row.number, genome, recipe, row.recipe_hash, attempts=row.attempts)
            known.losses = self._losses_of(row)
            generation.append(known)
        self._asked += len(rows)
        return generation


def _drift(place: str, problem: str) -> InputError:
    return InputError(
        place,
        f"replaying the search {problem}",
        "A library or Evomerge itself has changed; install the versions that `show` lists, or start a new search.",
    )


def _bits(genome: Genome | None) -> bytes | None:
    return None if genome is None else genome.tobytes()


def write_log(folder: Path, finished: Finished, failure: Failed, prefix: str) -> str:
    """Keep what a failed attempt left behind; the file's name, relative to the search folder, or "" for nothing."""
    if not failure.log:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}{finished.candidate:04d}.{finished.attempt}.log"
    path.write_text(f"{failure.reason}: {failure.message}\nworker {finished.worker}\n\n{failure.log}", encoding="utf-8")
    return f"{folder.name}/{path.name}"
