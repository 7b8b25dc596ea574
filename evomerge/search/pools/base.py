"""The contract of a pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from evomerge.search.work.jobs import Finished, Job, PoolNews, PoolState


class Pool(Protocol):
    """Runs jobs on workers and returns how each ended.

    Every submitted job comes back from ``wait`` exactly once, as scores or as a failure, whatever happens to its
    worker; a pool never raises for what a candidate did. Retrying is up to the driver: a pool tries a job once.
    """

    def submit(self, job: Job) -> None:
        """Take a job; returns at once. Jobs start in the order submitted as workers are free."""
        ...

    def wait(self, timeout_s: float) -> list[Finished]:
        """Wait until something has finished, at most ``timeout_s`` seconds, and return all that has, oldest first."""
        ...

    def running(self) -> Mapping[tuple[int, int], float]:
        """The start of each running (candidate, attempt), by ``now``; queued ones are not included."""
        ...

    def now(self) -> float:
        """The current time in seconds, on the clock that the jobs run by."""
        ...

    def cancel(self, candidate: int, attempt: int) -> None:
        """End a running attempt, and its worker if there is no other way; returns at once.

        It comes back from ``wait`` as failed with ``timeout``, or with its result if it has just ended.
        """
        ...

    def state(self) -> PoolState:
        """What the workers are doing now."""
        ...

    def news(self) -> Sequence[PoolNews]:
        """News of nodes and workers since the last call, oldest first. A pool of one process has none."""
        ...

    def close(self) -> None:
        """End the workers that this pool started, at once; their unfinished jobs are lost. Safe to call twice."""
        ...
