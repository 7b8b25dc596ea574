"""How far a search or its confirmation is, in item scores, and when it will be over at the pace so far.

Candidates are no measure of that: in a race they end all at once with their generation, after very different work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class Progress:
    """Counts item scores as they come in.

    Args:
        clock: seconds, pauses not counted.

    Attributes:
        models: how many models are scored in this phase, where that is known beforehand, and else 0.
        items: how many item scores these are in all.
        models_done: how many models of them are scored.
        done: how many item scores have come in, in this phase.
        at_work: gives the numbers of the candidates that are being scored, and on how many items these are in all.
        answers: how many prompts were answered for them, where this process hears of it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin(lambda: None)

    def begin(self, to_come: Callable[[], float | None], *, models: int = 0, items: int = 0) -> None:
        """A phase begins, in which so many item scores are to come yet; None where nobody knows."""
        self._to_come = to_come
        self.models, self.items = models, items
        self.models_done = self.done = 0
        self._results = 0
        self._first: tuple[float, int] | None = None  # when the first result came, and how many items it had
        self._last = 0.0
        self.work(lambda: ([], 0))

    def work(self, at_work: Callable[[], tuple[Sequence[int], int]]) -> None:
        """Candidates begin to be scored; ``at_work`` says which are, and on how many items in all."""
        self.at_work, self.answers = at_work, 0

    def add(self, items: int) -> None:
        """An attempt has given so many item scores."""
        self.done += items
        self._results += 1
        self._last = self._clock()
        if self._first is None:
            self._first = (self._last, items)

    def eta_s(self) -> float | None:
        """Seconds to the end of the phase; None while nothing tells.

        It falls evenly until the next result is due, and stands while that is late.
        """
        left = self._to_come()
        if left is None or self._first is None or self._results < 2:
            return None
        began, at_first = self._first
        gap = (self._last - began) / (self._results - 1)
        seconds = left * (self._last - began) / max(1, self.done - at_first)
        return max(0.0, seconds - min(self._clock() - self._last, gap))
