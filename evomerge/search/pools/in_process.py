"""The pool without processes: jobs run one by one in the driver's own, in the order submitted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from evomerge.search.jobs import Finished, Job, PoolNews, PoolState


class JobRunner(Protocol):
    """What runs a job to its end; a ``Worker``, or a fake in tests."""

    def run(self, job: Job) -> Finished: ...


class InProcessPool:
    """Runs one job in each ``wait``. For one machine, for tests, and wherever exact repeatability counts.

    A job that hangs hangs the search: nothing else runs in this process that could end it.
    """

    def __init__(self, make_worker: Callable[[], JobRunner]) -> None:
        self._make_worker = make_worker
        self._worker: JobRunner | None = None
        self._queue: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def wait(self, timeout_s: float) -> list[Finished]:
        if not self._queue:
            return []
        if self._worker is None:
            self._worker = self._make_worker()
        return [self._worker.run(self._queue.popleft())]

    def running(self) -> Mapping[tuple[int, int], float]:
        return {}  # outside ``wait``, where a job runs to its end, none does

    def now(self) -> float:
        return time.monotonic()

    def cancel(self, candidate: int, attempt: int) -> None:
        pass  # none runs that could be ended

    def state(self) -> PoolState:
        return PoolState(workers=1, busy=min(1, len(self._queue)), queued=max(0, len(self._queue) - 1))

    def news(self) -> Sequence[PoolNews]:
        return ()

    def close(self) -> None:
        self._queue.clear()
        self._worker = None
