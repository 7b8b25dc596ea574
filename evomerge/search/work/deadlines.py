"""How long an attempt may take before it is ended: by how long others like it took.

A worker that hangs says nothing, so only time tells it from one that is slow. What is slow depends on models, machines
and tasks, which this search's own finished attempts know and nobody else: five times what 19 of 20 took is beyond any
difference between candidates or machines of one cluster, and costs little when nothing hangs, for nothing is ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from evomerge.search.work.jobs import Task
from evomerge.store import EventRow

FACTOR = 5.0
"""Times the quantile: a merge that answers at full length, or a card of an older kind, is slower by less than this."""

QUANTILE = 0.95
"""Not the longest: one straggler that came back would make every later bound its own."""

MIN_S = 60.0
"""No bound is shorter: to start again costs a worker that long, and short attempts vary most."""

ENOUGH = 10
"""Finished attempts of which a quantile is taken; of fewer it says nothing."""

HISTORY = 200
"""The newest finished attempts that count, so that the bound follows a cluster that changes."""

MAX_S = 24 * 3600.0
"""Until enough have finished, and at most, unless the search file says otherwise (``attempt_hours``): a search in which
everything hangs from the start goes on all the same."""

ATTEMPT_EVENTS = ("dispatch", "rung", "result")
"""The events that tell how long attempts took which gave scores."""

EVENTS_READ = 10 * HISTORY
"""The newest of them that a new driver looks at: enough for HISTORY attempts, also where races make many of each."""


class Deadlines:
    """The longest that attempts may take, learned from those that gave scores.

    Args:
        most_s: the longest bound, in seconds, and the only one until enough attempts have finished.
    """

    def __init__(self, most_s: float = MAX_S) -> None:
        self._most_s = most_s
        self._finished: deque[tuple[Mapping[int, int], float]] = deque(maxlen=HISTORY)

    def learn(self, tasks: Sequence[Task], seconds: float) -> None:
        """An attempt gave scores after so many seconds on its worker."""
        self.remember(_items(tasks), seconds)

    def remember(self, items: Mapping[int, int], seconds: float) -> None:
        """The same of an attempt at so many items of each evaluator, by the evaluator's position."""
        self._finished.append((items, seconds))

    def is_over(self, tasks: Sequence[Task], seconds: float) -> bool:
        """Whether an attempt at these tasks that still runs after so many seconds is to be ended."""
        return seconds > min(MIN_S, self._most_s) and seconds > self.bound_s(tasks)

    def bound_s(self, tasks: Sequence[Task]) -> float:
        """The most seconds that an attempt at these tasks may take.

        Taken of the attempts that had as many items or more of each evaluator. Where there are too few of those, also
        of smaller ones, with their seconds in proportion to the items; that is too long rather than too short, for to
        merge takes as long whatever is scored afterwards. Of a job without tasks, such as a descent, nothing is known.
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
    """Attempts that gave scores, oldest first: items by evaluator, and seconds.

    The seconds are those from dispatch to record. They hold the wait for a worker that was still starting, so they are
    too long rather than too short. Candidates whose first attempt came before these events are left out: what they had
    been scored on by then is not known.

    Args:
        events: of the kinds in ATTEMPT_EVENTS, oldest first.
        scored: how many items of each evaluator a candidate has been scored on in all, by the event that says so.
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
            if (seconds := event.time - begun[event.candidate]) >= 0.0:  # else the clock was set back meanwhile
                yield {e: n - before.get(e, 0) for e, n in after.items() if n > before.get(e, 0)}, seconds


def _items(tasks: Sequence[Task]) -> dict[int, int]:
    """Number of items by evaluator."""
    counts: dict[int, int] = {}
    for task in tasks:
        counts[task.evaluator] = counts.get(task.evaluator, 0) + len(task.indices)
    return counts


def _share(ours: Mapping[int, int], theirs: Mapping[int, int]) -> float:
    """How many times as many items of an evaluator we have, where that is most; inf where they have none of it."""
    return max((n / theirs[e] if theirs.get(e) else float("inf") for e, n in ours.items() if n), default=0.0)
