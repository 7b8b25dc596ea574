"""The pool on a simulated clock: jobs take made-up time and give made-up scores, so that a long search is tested in
seconds."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

from evomerge.search.jobs import Failed, Finished, Job, Measured, PoolState

Simulation = Callable[[Job], tuple[float, Measured | Failed]]
"""From a job to how many simulated seconds it takes and how it ends."""


class SimulatedClock:
    """Seconds that pass only when a pool waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedPool:
    """``workers`` workers whose jobs end in the order of the simulated clock.

    While a job runs, ``wait`` jumps to the next end however far that is: nothing else happens on this clock.
    """

    def __init__(self, workers: int, simulate: Simulation, clock: SimulatedClock) -> None:
        self._workers = workers
        self._simulate = simulate
        self._clock = clock
        self._queue: deque[Job] = deque()
        self._free = list(range(workers - 1, -1, -1))
        # (end, order of start, worker, result); the order breaks ties so that equal times keep one order.
        self._running: list[tuple[float, int, int, Finished]] = []
        self._started = 0

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        self._start()

    def wait(self, timeout_s: float) -> list[Finished]:
        if not self._running:
            self._clock.now += timeout_s
            return []
        finished: list[Finished] = []
        self._clock.now = self._running[0][0]
        while self._running and self._running[0][0] <= self._clock.now:
            _, _, worker, result = heapq.heappop(self._running)
            self._free.append(worker)
            finished.append(result)
        self._start()
        return finished

    def state(self) -> PoolState:
        return PoolState(workers=self._workers, busy=len(self._running), queued=len(self._queue))

    def close(self) -> None:
        self._queue.clear()
        self._running.clear()

    def _start(self) -> None:
        while self._free and self._queue:
            job, worker = self._queue.popleft(), self._free.pop()
            seconds, result = self._simulate(job)
            ended = Finished(job.candidate, job.attempt, f"simulated-{worker}", result)
            heapq.heappush(self._running, (self._clock.now + seconds, self._started, worker, ended))
            self._started += 1
