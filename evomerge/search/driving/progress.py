"""The progress of a search or its confirmation, in item scores, and its estimated end.

Candidates do not measure progress: in a race they all end with their generation, after very different work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class Progress:
    """Counts item scores as they come in.

    Args:
        clock: seconds, pauses not counted.

    Attributes:
        models: how many models are scored in this phase; 0 if that is not known beforehand.
        items: how many item scores that takes in total.
        models_done: how many models of them are scored.
        done: how many item scores have come in, in this phase.
        at_work: returns the numbers of the running candidates, and how many items they are scored on in total.
        answers: how many prompts were answered for them, if this process knows it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin(lambda: None)

    def begin(self, to_come: Callable[[], float | None], *, models: int = 0, items: int = 0) -> None:
        """Begin a phase with this many item scores left; None if that is unknown."""
        self._to_come = to_come
        self.models, self.items = models, items
        self.models_done = self.done = 0
        self._results = 0
        self._first: tuple[float, int] | None = None  # when the first result came, and how many items it had
        self._last = 0.0
        self.work(lambda: ([], 0))

    def work(self, at_work: Callable[[], tuple[Sequence[int], int]]) -> None:
        """Set ``at_work``."""
        self.at_work, self.answers = at_work, 0

    def add(self, items: int) -> None:
        """Add the item scores of an attempt."""
        self.done += items
        self._results += 1
        self._last = self._clock()
        if self._first is None:
            self._first = (self._last, items)

    def eta_s(self) -> float | None:
        """Seconds to the end of the phase; None if unknown.

        It decreases steadily until the next result is due, and stays constant while that is late.
        """
        left = self._to_come()
        if left is None or self._first is None or self._results < 2:
            return None
        began, at_first = self._first
        gap = (self._last - began) / (self._results - 1)
        seconds = left * (self._last - began) / max(1, self.done - at_first)
        return max(0.0, seconds - min(self._clock() - self._last, gap))
