"""What a driver needs: what to score, where, who controls it, and where it is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from evomerge.search.driving.control import Control
from evomerge.search.driving.dispatch import Dispatcher
from evomerge.search.driving.held import WorkerMeter
from evomerge.search.driving.progress import Progress
from evomerge.search.pools.base import Pool
from evomerge.search.preparing.setup import Setup
from evomerge.search.work.deadlines import MAX_S, Deadlines
from evomerge.store import Store


@dataclass(frozen=True)
class Drive:
    """What a driver and a confirmation work with.

    Attributes:
        setup: what to search.
        store: where everything is recorded; the caller holds its lease.
        pool: what runs the jobs.
        control: the commands.
        logs: folder for the logs of failed attempts.
        idle: called at least once a second while waiting, and after each step.
        clock: seconds, for the budget of hours.
        attempt_s: the longest time that an attempt may take, in seconds.
        check: raises InputError if the sources have changed.
        progress: counts what has been scored and what is left.
    """

    setup: Setup
    store: Store
    pool: Pool
    control: Control
    logs: Path
    idle: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    attempt_s: float = MAX_S
    check: Callable[[], None] = lambda: None
    progress: Progress = field(default_factory=Progress)

    @cached_property
    def meter(self) -> WorkerMeter:
        """How long workers have been held for this search."""
        return WorkerMeter(self.pool, self.store.search().worker_time)

    def _turn(self) -> None:
        self.meter.read()
        self.idle()

    def dispatcher(self, deadlines: Deadlines) -> Dispatcher:
        """Scores candidates on the pool, and records what happens to nodes and workers."""
        return Dispatcher(
            self.pool, self.control, self.setup.attempts, self._turn, deadlines, self.store.record_event, self.check,
            self.progress, self.store.batching,
        )  # fmt: skip
