"""The contract of a pool."""

from __future__ import annotations

from typing import Protocol

from evomerge.search.jobs import Finished, Job, PoolState


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

    def state(self) -> PoolState:
        """What the workers are doing now."""
        ...

    def close(self) -> None:
        """End the workers that this pool started, at once; their unfinished jobs are gone. Safe to call twice."""
        ...
