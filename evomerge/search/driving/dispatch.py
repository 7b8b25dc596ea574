"""Keeping the workers busy: from jobs to be done to the end of each, with retries, until a stop is asked for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from evomerge.errors import InputError
from evomerge.inference.answering import listening
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

_PAUSE_S = 0.1  # how soon a paused search hears that it may go on
_CHECK_S = 1.0  # how often it is looked who has run too long; bounds are a minute and more

DEATHS = 20
"""Workers that may die in a row, whatever they were at, before any has given a score. Until then that is the fault of
the cluster and of no candidate: a search goes on after a pause, and ends where it is hopeless."""

FIRST_REST_S = 5.0
"""The pause after the first of them; each further one doubles it, up to LONGEST_REST_S."""

LONGEST_REST_S = 60.0


@dataclass(frozen=True)
class Pending:
    """A candidate that is yet to be scored on ``tasks``.

    ``attempt`` is the number of the attempt to come, from 1; ``faults`` counts the attempts that workers have failed.
    An attempt that died with its driver, or with a node, is in the first and not in the second.
    """

    number: int
    attempt: int
    recipe: Recipe
    recipe_hash: str
    tasks: Sequence[Task]
    faults: int = 0
    instead: Calibrate | FitNumbers | TextLosses | Descend | None = None


class Recorder(Protocol):
    """What writes down how jobs go. Each method is one transaction."""

    def answer(self, pending: Pending) -> bool:
        """Answer a candidate from what is known already; True when that was possible."""
        ...

    def dispatched(self, pending: Pending) -> None: ...

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None: ...

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None: ...

    def atomically(self) -> AbstractContextManager[None]:
        """What is measured or failed within is one transaction in place of several."""
        ...

    def late(self, finished: Finished) -> None:
        """An attempt that nobody waits for any more has ended; it must not count."""
        ...


class OfNoCandidate:
    """What a ``Recorder`` of jobs has in common that are of no candidate: of their way nothing is written down."""

    def answer(self, pending: Pending) -> bool:
        return False

    def dispatched(self, pending: Pending) -> None: ...

    def atomically(self) -> AbstractContextManager[None]:
        return nullcontext()

    def late(self, finished: Finished) -> None: ...


Feed = Callable[[], Pending | None]
"""Gives the next candidate to score whenever a worker is free; None when there is none, for now."""


def feed_of(candidates: Iterable[Pending]) -> Feed:
    """A feed of these candidates, in order."""
    left = iter(candidates)
    return lambda: next(left, None)


class _Jobs:
    """Candidates that are to be scored: those at workers, by number and with their recipes, and those that wait."""

    def __init__(self) -> None:
        self.waiting: deque[Pending] = deque()
        self.running: dict[int, Pending] = {}
        self.recipes: set[str] = set()

    def add(self, pending: Pending) -> None:
        self.running[pending.number] = pending
        self.recipes.add(pending.recipe_hash)

    def at_work(self) -> tuple[list[int], int]:
        """The numbers of those that run, and how many items they are scored on in all."""
        tasks = (task for pending in self.running.values() for task in pending.tasks)
        return list(self.running), sum(len(task.indices) for task in tasks)

    def remove(self, pending: Pending) -> None:
        del self.running[pending.number]
        self.recipes.remove(pending.recipe_hash)


class Dispatcher:
    """Runs candidates on a pool.

    Args:
        attempts: how often a candidate is tried when workers are at fault; the candidate's own faults are final.
        idle: called whenever the driver waits, at least once a second, with time to renew a lease or draw a screen.
        deadlines: how long an attempt may take; the worker of one that takes longer is at fault.
        report: takes what happens to nodes and workers.
        progress: counts the item scores that come in.
        batching: what is recorded within is one transaction, as far as nothing is read in between.
        check: called before anything is scored and before any result counts; raises InputError where what is scored is
            not what it was.
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
        self._deaths = 0  # of workers, while none has given a score
        self._rests_until = float("-inf")  # by the pool's clock
        self._idled_at = float("-inf")
        self._idle_error: Exception | None = None

    def run(self, feed: Feed, recorder: Recorder) -> bool:
        """Score what the feed gives, until it gives nothing and nothing runs; False when a stop came first.

        Of candidates with one recipe, one is scored at a time: when it is done the others are answered from it.
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
            held_up = self._control.paused or self._control.stopping or rests  # a cancelled one is stopping too
            with self._batching():
                for again in self._end_all(ended, begun, jobs, recorder):
                    if self._deaths and (other := feed()) is not None:
                        jobs.waiting += [other, again]  # whether another one fares better says whose fault it is
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
        """Record how attempts ended; those to come in place of some of them.

        A group ends as one, so that after an interruption the same candidates are scored at once again.
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
        """What has finished; what happened to nodes and workers is reported, also when that ends the search."""
        try:
            with listening(self._hear):
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
        """A model in this process has answered so many prompts; what is done while waiting is done meanwhile, too."""
        self.progress.answers += answers
        moment = time.monotonic()
        if self._idle_error is None and moment - self._idled_at >= _CHECK_S:
            self._idled_at = moment
            try:
                self._idle()
            except Exception as error:  # it is not the candidate's: raised where the pool has ended
                self._idle_error = error

    def _fill(self, feed: Feed, jobs: _Jobs, recorder: Recorder, groups: list[list[Pending]]) -> bool:
        """Record that as many are dispatched as the workers take, and give them as ``groups``; what shares a recipe
        with a running candidate keeps waiting.

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
                if pending.faults:  # what it did to its worker, it would do to those beside it
                    break
            if group:
                groups.append(group)
        jobs.waiting.extendleft(reversed(held))
        return exhausted

    def _submit(self, group: Sequence[Pending]) -> None:
        """Have candidates scored at once. Who is in a group follows from the feed, and not from who is free when."""
        number = group[0].number if len(group) > 1 else None
        for pending in group:
            self._pool.submit(
                Job(pending.number, pending.attempt, pending.recipe, pending.tasks, number, pending.instead)
            )

    def _end_overdue(self, running: Mapping[int, Pending]) -> None:
        """Have the pool end what has run longer than it may; it comes back as failed."""
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
        """How an attempt ended, with its worker's death put down to the cluster while no worker has given a score.

        Not that of a descent, which takes more memory than any score: the search goes on without it.

        Raises:
            InputError: too many have died.
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
        """Record how an attempt ended; the next attempt when there is to be one."""
        if not isinstance(finished.result, Failed):
            recorder.measured(pending, finished, finished.result)
            return None
        reason = finished.result.reason
        faults = pending.faults + (reason not in BLAMELESS)
        again = reason in BLAMELESS or (reason in WORKER_FAULTS and faults < self._attempts)
        recorder.failed(finished, finished.result, final=not again)
        return replace(pending, attempt=pending.attempt + 1, faults=faults) if again else None


def write_log(folder: Path, finished: Finished, failure: Failed, prefix: str) -> str:
    """Keep what a failed attempt left behind; the file's name, relative to the search folder, or "" for nothing."""
    if not failure.log:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}{finished.candidate:04d}.{finished.attempt}.log"
    path.write_text(f"{failure.reason}: {failure.message}\nworker {finished.worker}\n\n{failure.log}", encoding="utf-8")
    return f"{folder.name}/{path.name}"
