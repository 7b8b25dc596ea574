"""The contract of a pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from evomerge.search.work.jobs import Finished, Job, PoolNews, PoolState


class Pool(Protocol):
    """Runs jobs on workers and gives back how each ended.

    Every submitted job comes back from ``wait`` exactly once, as scores or as a failure, whatever happens to its
    worker; a pool never raises for what a candidate did. Retrying is the driver's business: a pool tries a job once.
    """

    def submit(self, job: Job) -> None:
        """Take a job; returns at once. Jobs start in the order submitted as workers are free."""
        ...

    def wait(self, timeout_s: float) -> list[Finished]:
        """Wait until something has finished, at most ``timeout_s`` seconds, and return all that has, oldest first."""
        ...

    def running(self) -> Mapping[tuple[int, int], float]:
        """When each (candidate, attempt) that a worker is at began, by ``now``; one that is queued has not begun."""
        ...

    def now(self) -> float:
        """Seconds of the clock that the jobs run by."""
        ...

    def cancel(self, candidate: int, attempt: int) -> None:
        """End an attempt that is running, and its worker where there is no other way; returns at once.

        It comes back from ``wait`` as failed by ``timeout``, or as it ended if it has just done so.
        """
        ...

    def state(self) -> PoolState:
        """What the workers are doing now."""
        ...

    def news(self) -> Sequence[PoolNews]:
        """What happened to nodes and workers since the last call, oldest first. A pool of one process has none."""
        ...

    def close(self) -> None:
        """End the workers that this pool started, at once; their unfinished jobs are gone. Safe to call twice."""
        ...
