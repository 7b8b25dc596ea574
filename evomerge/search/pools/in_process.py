"""The pool without worker processes: jobs run one by one in the driver's process, in the order submitted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from evomerge.search.work.jobs import Finished, Job, PoolNews, PoolState, batch


class JobRunner(Protocol):
    """Runs a job to its end; a ``Worker``, or a fake in tests."""

    def run(self, job: Job) -> Finished: ...

    def run_together(self, jobs: Sequence[Job]) -> list[Finished]:
        """Run several at once, or one; called if and only if the search file has ``together``."""
        ...


class InProcessPool:
    """Runs one job in each ``wait``, or up to ``together`` at once: for one machine, for tests, and where exact
    repeatability matters.

    A job that hangs also hangs the search: nothing else in this process could end it.
    """

    def __init__(self, make_worker: Callable[[], JobRunner], together: int = 1, gpus: float = 0.0) -> None:
        self._make_worker = make_worker
        self._together = together
        self._gpus = gpus
        self._worker: JobRunner | None = None
        self._queue: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def wait(self, timeout_s: float) -> list[Finished]:
        if not self._queue:
            return []
        if self._worker is None:
            self._worker = self._make_worker()
        jobs = batch(self._queue)
        return self._worker.run_together(jobs) if self._together > 1 else [self._worker.run(jobs[0])]

    def running(self) -> Mapping[tuple[int, int], float]:
        return {}  # jobs only run inside ``wait``

    def now(self) -> float:
        return time.monotonic()

    def cancel(self, candidate: int, attempt: int) -> None:
        pass  # no job is running

    def state(self) -> PoolState:
        waiting = len(self._queue)
        return PoolState(1, min(1, waiting), 0, max(0, waiting - 1), self._together, self._gpus)

    def news(self) -> Sequence[PoolNews]:
        return ()

    def close(self) -> None:
        self._queue.clear()
        self._worker = None
