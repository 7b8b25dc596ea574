"""The screen of a running search: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live

from evomerge.report.screen import finished, line, panel
from evomerge.report.search_status import SearchStatus
from evomerge.report.spending import seconds_affordable
from evomerge.search.driving.progress import Progress
from evomerge.search.work.jobs import PoolState

_LIVE_ROWS = (
    8,
    6,
    4,
    3,
    2,
    1,
)  # of baselines, and of others, in a table: the largest number that fits

_EVERY_LINE_S = 60.0


class LiveScreen:
    """Redraws a status at a limited rate.

    On a terminal it fits the height and disappears when closed; the caller then prints the complete status.

    Args:
        read: returns the current status.
        workers: returns the state of the pool, if this process has one.
        progress: the progress of this process.
    """

    def __init__(
        self,
        console: Console,
        read: Callable[[], SearchStatus],
        workers: Callable[[], PoolState] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._console = console
        self._read = read
        self._workers = workers
        self._progress = progress
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._every_s = 1.0 if self._live else 10.0
        self._drawn_at = self._printed_at = float("-inf")
        self._printed: tuple[object, ...] = ()
        self._first: tuple[float, int] | None = None  # when the first candidates finished, and how many had by then

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def draw(self, *, now: bool = False) -> None:
        """Draw the status if it is time, or at once."""
        moment = time.monotonic()
        if not now and moment - self._drawn_at < self._every_s:
            return
        self._drawn_at = moment
        status = self._read()
        pool = self._workers() if self._workers else None
        eta = self._eta(status)
        if self._live:
            self._live.update(self._fitted(status, pool, eta), refresh=True)
        else:
            self._print(status, eta, moment)

    def _print(self, status: SearchStatus, eta: float | None, moment: float) -> None:
        """Print a line when a candidate has ended or the state has changed, and every minute."""
        ended = 0 if self._progress is None else self._progress.models_done
        news = (status.state, finished(status), ended)
        if news != self._printed or moment - self._printed_at >= _EVERY_LINE_S:
            self._printed, self._printed_at = news, moment
            self._console.print(line(status, eta, self._progress), highlight=False, soft_wrap=True)

    def _fitted(self, status: SearchStatus, pool: PoolState | None, eta: float | None) -> RenderableType:
        """The panel with as many rows in each table as fit on the terminal."""
        for rows in _LIVE_ROWS:
            fitted = panel(status, pool, eta, rows=rows)
            if len(self._console.render_lines(fitted)) < self._console.height:
                break
        return fitted

    def say(self, text: str) -> None:
        """Print a line above the panel."""
        self._console.print(text, highlight=False)

    def _eta(self, status: SearchStatus) -> float | None:
        """Seconds to the end of the budget or of the confirmation, at the pace so far; None while unknown.

        A process that only watches counts candidates, which is meaningless in a race.
        """
        ends = []
        if self._progress is None:
            ends += [] if status.racing is not None else self._by_candidates(status)
        elif (eta := self._progress.eta_s()) is not None:
            ends.append(eta)
        if status.budget.hours and status.state != "confirming":
            ends.append((status.budget.hours - status.budget.hours_spent) * 3600)
        if status.state != "confirming" and (affordable := seconds_affordable(status.cost)) is not None:
            ends.append(affordable)
        return max(0.0, min(ends)) if ends else None

    def _by_candidates(self, status: SearchStatus) -> list[float]:
        over = finished(status)
        moment = time.monotonic()
        if self._first is None or (over and not self._first[1]):
            self._first = (moment, over)
        spent, gained = moment - self._first[0], over - self._first[1]
        if not status.budget.candidates or not gained:
            return []
        return [(status.budget.candidates - over) * spent / gained]
