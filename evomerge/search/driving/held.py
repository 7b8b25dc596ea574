"""How long the workers of a search, and their GPUs, have been held, working or waiting: this time is paid for."""

from __future__ import annotations

from evomerge.prices import WorkerTime
from evomerge.search.pools.base import Pool


class WorkerMeter:
    """Adds up a pool's workers over its own clock; pauses count, because workers are held during them.

    Args:
        before: what earlier drivers of the search have recorded.
    """

    def __init__(self, pool: Pool, before: WorkerTime) -> None:
        self._pool = pool
        self._total = before
        self._at = pool.now()
        self._state = pool.state()

    def read(self) -> WorkerTime:
        """The time so far, including earlier drivers'. Workers that came or went count from the next reading."""
        now = self._pool.now()
        self._total = self._total.plus(self._state.workers, self._state.gpus, now - self._at)
        self._at, self._state = now, self._pool.state()
        return self._total
