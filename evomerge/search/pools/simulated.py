"""The pool on a simulated clock: jobs take simulated time and return simulated scores, so that a long search can be
tested in seconds."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from evomerge.search.work.deadlines import MIN_S
from evomerge.search.work.jobs import Failed, Finished, Job, PoolNews, PoolState, Result

Simulation = Callable[[Job], tuple[float, Result]]
"""From a job to how many simulated seconds it takes and how it ends."""


class SimulatedClock:
    """Seconds that pass only when a pool waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedPool:
    """Has ``workers`` workers whose jobs end in the order of the simulated clock.

    While a job runs, ``wait`` jumps to the next end, but over no more than the shortest deadline: nothing else happens
    on this clock. A job that takes ``math.inf`` seconds hangs.
    """

    def __init__(self, workers: int, simulate: Simulation, clock: SimulatedClock, gpus: float = 0.0) -> None:
        self._workers = workers
        self._gpus = gpus
        self._simulate = simulate
        self._clock = clock
        self._queue: deque[Job] = deque()
        self._free = list(range(workers - 1, -1, -1))
        # (end, order of start, worker, result); the order breaks ties so that equal times keep one order.
        self._running: list[tuple[float, int, int, Finished]] = []
        self._began: dict[tuple[int, int], float] = {}
        self._started = 0

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        self._start()

    def wait(self, timeout_s: float) -> list[Finished]:
        if not self._running:
            self._clock.now += timeout_s
            return []
        if self._running[0][0] > self._clock.now + MIN_S:
            self._clock.now += MIN_S
            return []
        finished: list[Finished] = []
        self._clock.now = max(self._clock.now, self._running[0][0])
        while self._running and self._running[0][0] <= self._clock.now:
            _, _, worker, result = heapq.heappop(self._running)
            self._free.append(worker)
            del self._began[result.candidate, result.attempt]
            finished.append(result)
        self._start()
        return finished

    def running(self) -> Mapping[tuple[int, int], float]:
        return dict(self._began)

    def now(self) -> float:
        return self._clock.now

    def cancel(self, candidate: int, attempt: int) -> None:
        for i, (_, order, worker, result) in enumerate(self._running):
            if (result.candidate, result.attempt) == (candidate, attempt):
                seconds = self._clock.now - self._began[candidate, attempt]
                ended = replace(result, result=Failed("timeout", f"ended after {seconds:.0f} s"))
                self._running[i] = (self._clock.now, order, worker, ended)
                heapq.heapify(self._running)
                return

    def state(self) -> PoolState:
        return PoolState(workers=self._workers, busy=len(self._running), queued=len(self._queue), gpus=self._gpus)

    def news(self) -> Sequence[PoolNews]:
        return ()

    def close(self) -> None:
        self._queue.clear()
        self._running.clear()
        self._began.clear()

    def _start(self) -> None:
        while self._free and self._queue:
            job, worker = self._queue.popleft(), self._free.pop()
            seconds, result = self._simulate(job)
            ended = Finished(job.candidate, job.attempt, f"simulated-{worker}", result)
            self._began[job.candidate, job.attempt] = self._clock.now
            heapq.heappush(self._running, (self._clock.now + seconds, self._started, worker, ended))
            self._started += 1
