"""How long an attempt may take before it is ended, derived from how long similar attempts took.

A worker that hangs reports nothing, so only time distinguishes it from a slow one. What is slow depends on models,
machines and tasks, so only this search's own finished attempts can tell: five times what 19 of 20 took is beyond any
difference between candidates or machines of one cluster, and costs nothing if no worker hangs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from evomerge.search.work.jobs import Task
from evomerge.store import EventRow

FACTOR = 5.0
"""The bound as a multiple of the quantile: a merge with full-length answers, or an older GPU, is slower by less."""

QUANTILE = 0.95
"""The quantile used. Not the longest: one straggler would determine every later bound."""

MIN_S = 60.0
"""The shortest bound: restarting a worker takes that long, and short attempts vary most."""

ENOUGH = 10
"""The smallest number of finished attempts whose quantile is used."""

HISTORY = 200
"""How many of the newest finished attempts count, so that the bound follows a changing cluster."""

MAX_S = 24 * 3600.0
"""The bound until enough attempts have finished, and the largest bound, unless the search file says otherwise
(``attempt_hours``): a search in which everything hangs from the start continues nevertheless."""

ATTEMPT_EVENTS = ("dispatch", "rung", "result")
"""The events from which the durations of successful attempts follow."""

EVENTS_READ = 10 * HISTORY
"""How many of the newest ones a new driver reads: enough for HISTORY attempts, even with many rungs each."""


class Deadlines:
    """The longest time that attempts may take, learned from successful ones.

    Args:
        most_s: the largest bound, in seconds, and the only one until enough attempts have finished.
    """

    def __init__(self, most_s: float = MAX_S) -> None:
        self._most_s = most_s
        self._finished: deque[tuple[Mapping[int, int], float]] = deque(maxlen=HISTORY)

    def learn(self, tasks: Sequence[Task], seconds: float) -> None:
        """Learn from an attempt that succeeded after this many seconds on its worker."""
        self.remember(_items(tasks), seconds)

    def remember(self, items: Mapping[int, int], seconds: float) -> None:
        """The same for an attempt at this many items of each evaluator, by the evaluator's position."""
        self._finished.append((items, seconds))

    def is_over(self, tasks: Sequence[Task], seconds: float) -> bool:
        """Whether an attempt at these tasks should be ended after running for this many seconds."""
        return seconds > min(MIN_S, self._most_s) and seconds > self.bound_s(tasks)

    def bound_s(self, tasks: Sequence[Task]) -> float:
        """The longest time in seconds that an attempt at these tasks may take.

        It is derived from attempts with at least as many items of each evaluator. If there are too few of those,
        smaller ones are used too, with their seconds scaled in proportion to the items; that is too long rather than
        too short, because merging takes the same time whatever is scored afterwards. For a job without tasks, such as a
        descent, nothing is known.
        """
        ours = _items(tasks)
        if not ours:
            return self._most_s
        shares = [(_share(ours, theirs), seconds) for theirs, seconds in self._finished]
        alike = [seconds for share, seconds in shares if share <= 1.0]
        if len(alike) < ENOUGH:
            alike = [seconds * max(1.0, share) for share, seconds in shares if share < float("inf")]
        if len(alike) < ENOUGH:
            return self._most_s
        return min(self._most_s, max(MIN_S, FACTOR * float(np.quantile(alike, QUANTILE))))


def recorded_attempts(
    events: Sequence[EventRow], scored: Callable[[EventRow], Mapping[int, int]]
) -> Iterator[tuple[dict[int, int], float]]:
    """Successful attempts, oldest first: items by evaluator, and seconds.

    The seconds are those from dispatch to record. They include the wait for a worker that was still starting, so they
    are too long rather than too short. Candidates whose first attempt came before these events are left out, because
    what they had been scored on by then is not known.

    Args:
        events: of the kinds in ATTEMPT_EVENTS, oldest first.
        scored: how many items of each evaluator a candidate has been scored on in total, given an event.
    """
    known: dict[int | None, Mapping[int, int]] = {}
    begun: dict[int | None, float] = {}
    for event in events:
        if event.kind == "dispatch":
            begun[event.candidate] = event.time
            if event.attempt == 1:
                known[event.candidate] = {}
        elif event.candidate in known:
            before, after = known[event.candidate], scored(event)
            known[event.candidate] = after
            if (seconds := event.time - begun[event.candidate]) >= 0.0:  # otherwise the clock was set back
                yield {e: n - before.get(e, 0) for e, n in after.items() if n > before.get(e, 0)}, seconds


def _items(tasks: Sequence[Task]) -> dict[int, int]:
    """Number of items by evaluator."""
    counts: dict[int, int] = {}
    for task in tasks:
        counts[task.evaluator] = counts.get(task.evaluator, 0) + len(task.indices)
    return counts


def _share(ours: Mapping[int, int], theirs: Mapping[int, int]) -> float:
    """The largest ratio of our items to theirs over all evaluators; inf if they have none of one."""
    return max((n / theirs[e] if theirs.get(e) else float("inf") for e, n in ours.items() if n), default=0.0)
