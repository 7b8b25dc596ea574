"""Keeping the workers busy: running jobs to their ends, with retries, until a stop is requested."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from evomerge.errors import InputError
from evomerge.inference.progress import progress_listener
from evomerge.recipes.base import Recipe
from evomerge.search.driving.control import Control
from evomerge.search.driving.progress import Progress
from evomerge.search.pools.base import Pool
from evomerge.search.work.deadlines import Deadlines
from evomerge.search.work.jobs import (
    BLAMELESS,
    WORKER_FAULTS,
    Calibrate,
    Descend,
    Descended,
    Failed,
    Finished,
    FitNumbers,
    Job,
    Measured,
    PoolNews,
    Task,
    TextLosses,
)

_PAUSE_S = 0.1  # how soon a paused search notices that it may continue
_CHECK_S = 1.0  # how often overdue attempts are looked for; bounds are at least a minute

DEATHS = 20
"""How many workers may die in a row before any has returned a score. Until then the cluster is blamed and no
candidate: the search continues after a pause, and ends after this many deaths."""

FIRST_REST_S = 5.0
"""The pause after the first death; each further one doubles it, up to LONGEST_REST_S."""

LONGEST_REST_S = 60.0


@dataclass(frozen=True)
class Pending:
    """A candidate waiting to be scored on ``tasks``.

    ``attempt`` is the number of the next attempt, from 1; ``faults`` counts the attempts in which a worker failed.
    An attempt that died with its driver, or with a node, counts for the first and not for the second.
    """

    number: int
    attempt: int
    recipe: Recipe
    recipe_hash: str
    tasks: Sequence[Task]
    faults: int = 0
    instead: Calibrate | FitNumbers | TextLosses | Descend | None = None


class Recorder(Protocol):
    """Records the progress of jobs. Each method is one transaction."""

    def answer(self, pending: Pending) -> bool:
        """Answer a candidate from existing scores; True if that was possible."""
        ...

    def dispatched(self, pending: Pending) -> None: ...

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None: ...

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None: ...

    def atomically(self) -> AbstractContextManager[None]:
        """Record everything within as one transaction instead of several."""
        ...

    def late(self, finished: Finished) -> None:
        """An attempt that is no longer expected has ended; it must not count."""
        ...


class NonCandidateRecorder:
    """The common part of ``Recorder``s for jobs that belong to no candidate: their progress is not recorded."""

    def answer(self, pending: Pending) -> bool:
        return False

    def dispatched(self, pending: Pending) -> None: ...

    def atomically(self) -> AbstractContextManager[None]:
        return nullcontext()

    def late(self, finished: Finished) -> None: ...


Feed = Callable[[], Pending | None]
"""Returns the next candidate to score when a worker is free; None if there is none for now."""


def feed_of(candidates: Iterable[Pending]) -> Feed:
    """A feed of these candidates, in order."""
    left = iter(candidates)
    return lambda: next(left, None)


class _Jobs:
    """Candidates to score: the running ones, by number and with their recipes, and the waiting ones."""

    def __init__(self) -> None:
        self.waiting: deque[Pending] = deque()
        self.running: dict[int, Pending] = {}
        self.recipes: set[str] = set()

    def add(self, pending: Pending) -> None:
        self.running[pending.number] = pending
        self.recipes.add(pending.recipe_hash)

    def at_work(self) -> tuple[list[int], int]:
        """The numbers of the running candidates, and how many items they are scored on in total."""
        tasks = (task for pending in self.running.values() for task in pending.tasks)
        return list(self.running), sum(len(task.indices) for task in tasks)

    def remove(self, pending: Pending) -> None:
        del self.running[pending.number]
        self.recipes.remove(pending.recipe_hash)


class Dispatcher:
    """Runs candidates on a pool.

    Args:
        attempts: how often a candidate is tried if workers are at fault; the candidate's own faults are final.
        idle: called while the driver waits, at least once a second, for example to redraw a screen.
        deadlines: how long an attempt may take; if it takes longer, its worker is at fault.
        report: receives news of nodes and workers.
        progress: counts the item scores that come in.
        batching: makes everything recorded within one transaction, as long as nothing is read in between.
        check: called before anything is scored and before any result counts; raises InputError if what is
            scored has changed.
    """

    def __init__(
        self,
        pool: Pool,
        control: Control,
        attempts: int,
        idle: Callable[[], None],
        deadlines: Deadlines | None = None,
        report: Callable[[PoolNews], None] = lambda news: None,
        check: Callable[[], None] = lambda: None,
        progress: Progress | None = None,
        batching: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._pool = pool
        self._control = control
        self._attempts = attempts
        self._idle = idle
        self._deadlines = deadlines or Deadlines()
        self._report = report
        self._check = check
        self.progress = progress or Progress()
        self._batching = batching
        self._checked_at = float("-inf")
        self._has_scored = False
        self._deaths = 0  # of workers, while none has returned a score
        self._rests_until = float("-inf")  # by the pool's clock
        self._idled_at = float("-inf")
        self._idle_error: Exception | None = None

    def run(self, feed: Feed, recorder: Recorder) -> bool:
        """Score candidates from the feed until it has none and nothing runs; False if a stop came first.

        Of candidates with equal recipes only one is scored at a time; the others are then answered from its scores.
        """
        jobs = _Jobs()
        ended: list[Finished] = []
        begun: Mapping[tuple[int, int], float] = {}
        exhausted = False
        self.progress.work(jobs.at_work)
        self._check()
        while True:
            self._control.poll()
            rests = self._pool.now() < self._rests_until
            held_up = self._control.paused or self._control.stopping or rests  # cancelling implies stopping
            with self._batching():
                for again in self._end_all(ended, begun, jobs, recorder):
                    if self._deaths and (other := feed()) is not None:
                        jobs.waiting += [other, again]  # if another one succeeds, the candidate is at fault
                    else:
                        # In front, so that a later candidate of the same recipe still waits for this one.
                        jobs.waiting.appendleft(again)
                groups: list[list[Pending]] = []
                if not held_up:
                    exhausted = self._fill(feed, jobs, recorder, groups)
            for group in groups:
                self._submit(group)
            self._idle()
            if self._control.cancelled or (self._control.stopping and not jobs.running):
                return False
            if not jobs.running:
                if exhausted and not jobs.waiting:
                    return True
                time.sleep(_PAUSE_S)  # nothing runs: paused, or no worker is left, for now
            begun = self._pool.running()
            ended = self._wait(1.0 if jobs.running or rests else 0.0)
            self._end_overdue(jobs.running)

    def _end_all(
        self, ended: Sequence[Finished], begun: Mapping[tuple[int, int], float], jobs: _Jobs, recorder: Recorder
    ) -> list[Pending]:
        """Record how attempts ended; returns the retries.

        A group ends as a whole, so that after an interruption the same candidates form a group again.
        """
        if not ended:
            return []
        retried: list[Pending] = []
        with recorder.atomically():
            for finished in ended:
                pending = jobs.running.get(finished.candidate)
                if pending is None or pending.attempt != finished.attempt:
                    recorder.late(finished)
                    continue
                jobs.remove(pending)
                self.progress.answers = 0
                if isinstance(finished.result, Measured):
                    self.progress.add(sum(len(task.indices) for task in pending.tasks))
                    started = begun.get((finished.candidate, finished.attempt))
                    if started is not None:
                        self._deadlines.learn(pending.tasks, self._pool.now() - started)
                if (again := self._end(pending, self._blamed(pending, finished), recorder)) is not None:
                    retried.append(again)
        return retried

    def _wait(self, timeout_s: float) -> list[Finished]:
        """The finished jobs; news of nodes and workers is reported, even if it ends the search."""
        try:
            with progress_listener(self._hear):
                finished = self._pool.wait(timeout_s)
            if self._idle_error is not None:
                raise self._idle_error
            if finished:
                self._check()
            return finished
        finally:
            for news in self._pool.news():
                self._report(news)

    def _hear(self, answers: int) -> None:
        """A model in this process has answered this many prompts; call ``idle`` meanwhile, too."""
        self.progress.answers += answers
        moment = time.monotonic()
        if self._idle_error is None and moment - self._idled_at >= _CHECK_S:
            self._idled_at = moment
            try:
                self._idle()
            except Exception as error:  # not the candidate's fault: raised once the pool returns
                self._idle_error = error

    def _fill(self, feed: Feed, jobs: _Jobs, recorder: Recorder, groups: list[list[Pending]]) -> bool:
        """Record the dispatch of as many candidates as the workers take, and append them to ``groups``. A candidate
        with the same recipe as a running one keeps waiting.

        Returns:
            Whether the feed has nothing more, for now.
        """
        held: list[Pending] = []
        state = self._pool.state()
        room = state.workers * state.together
        exhausted = False
        while len(jobs.running) < room and len(held) <= room and not exhausted:
            group: list[Pending] = []
            while len(group) < state.together and len(held) <= room:
                pending = jobs.waiting.popleft() if jobs.waiting else feed()
                if pending is None:
                    exhausted = True
                    break
                if recorder.answer(pending):
                    continue
                if pending.recipe_hash in jobs.recipes:
                    held.append(pending)
                    continue
                if pending.faults and group:
                    jobs.waiting.appendleft(pending)
                    break
                recorder.dispatched(pending)
                group.append(pending)
                jobs.add(pending)
                if pending.faults:  # if it crashed its worker, it would crash others in its group
                    break
            if group:
                groups.append(group)
        jobs.waiting.extendleft(reversed(held))
        return exhausted

    def _submit(self, group: Sequence[Pending]) -> None:
        """Submit candidates as one group. Groups follow from the feed, not from the time at which workers are free."""
        number = group[0].number if len(group) > 1 else None
        for pending in group:
            self._pool.submit(
                Job(pending.number, pending.attempt, pending.recipe, pending.tasks, number, pending.instead)
            )

    def _end_overdue(self, running: Mapping[int, Pending]) -> None:
        """Have the pool end overdue attempts; they come back as failed."""
        now = self._pool.now()
        if now - self._checked_at < _CHECK_S:
            return
        self._checked_at = now
        for (candidate, attempt), started in self._pool.running().items():
            if (pending := running.get(candidate)) is None or pending.attempt != attempt:
                continue
            if self._deadlines.is_over(pending.tasks, now - started):
                self._pool.cancel(candidate, attempt)

    def _blamed(self, pending: Pending, finished: Finished) -> Finished:
        """How an attempt ended; a worker's death is blamed on the cluster while no worker has returned a score.

        A descent is an exception: it takes more memory than any scoring, and the search continues without it.

        Raises:
            InputError: too many workers have died.
        """
        result = finished.result
        if not isinstance(result, Failed):
            self._has_scored, self._deaths = True, 0
        elif result.reason == "worker_died" and not self._has_scored and not isinstance(pending.instead, Descend):
            self._deaths += 1
            if self._deaths > DEATHS:
                problem = f"{self._deaths} workers died before any had given a score; the last one: {result.message}"
                raise InputError("cluster", problem, "Find out what ends them, then resume.")
            rest_s = min(LONGEST_REST_S, FIRST_REST_S * 2 ** (self._deaths - 1))
            self._rests_until = self._pool.now() + rest_s
            return replace(finished, result=replace(result, reason="cluster_fault"))
        return finished

    def _end(self, pending: Pending, finished: Finished, recorder: Recorder) -> Pending | None:
        """Record how an attempt ended; returns the next attempt if there is one."""
        if not isinstance(finished.result, Failed):
            recorder.measured(pending, finished, finished.result)
            return None
        reason = finished.result.reason
        faults = pending.faults + (reason not in BLAMELESS)
        again = reason in BLAMELESS or (reason in WORKER_FAULTS and faults < self._attempts)
        recorder.failed(finished, finished.result, final=not again)
        return replace(pending, attempt=pending.attempt + 1, faults=faults) if again else None


def write_log(folder: Path, finished: Finished, failure: Failed, prefix: str) -> str:
    """Write the log of a failed attempt; its name relative to the search folder, or "" if there is none."""
    if not failure.log:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}{finished.candidate:04d}.{finished.attempt}.log"
    path.write_text(f"{failure.reason}: {failure.message}\nworker {finished.worker}\n\n{failure.log}", encoding="utf-8")
    return f"{folder.name}/{path.name}"
