"""The screen of a search: a live panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from evomerge.report.status import ConfirmedEntry, Entry, SearchStatus, Value
from evomerge.search.jobs import PoolState

_FRONT_ROWS = 8  # more would push the rest off a small terminal


def make_console() -> Console:
    """The console of every command: wide enough for tables when it is no terminal, and names are never markup."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)


class Screen:
    """Draws a status again and again, and never more often than is useful.

    Args:
        read: gives the status of now.
        workers: gives what the pool does, when this process has one.
    """

    def __init__(
        self,
        console: Console,
        read: Callable[[], SearchStatus],
        workers: Callable[[], PoolState] | None = None,
    ) -> None:
        self._console = console
        self._read = read
        self._workers = workers
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._every_s = 1.0 if self._live else 10.0
        self._drawn_at = float("-inf")
        self._first: tuple[float, int] | None = None  # when candidates began to come in, and how many had by then

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
            self._live.update(panel(status, pool, eta), refresh=True)
        else:
            self._console.print(line(status, eta), highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line for the person, above the panel."""
        self._console.print(text, highlight=False)

    def _eta(self, status: SearchStatus) -> float | None:
        """Seconds to the end of the budget, at the rate since workers had started; None while unknown."""
        finished = status.candidates.done + status.candidates.failed + status.candidates.cached
        moment = time.monotonic()
        if self._first is None or (finished and not self._first[1]):
            self._first = (moment, finished)
        spent, gained = moment - self._first[0], finished - self._first[1]
        ends = []
        if status.budget.candidates and gained:
            ends.append((status.budget.candidates - finished) * spent / gained)
        if status.budget.hours:
            ends.append((status.budget.hours - status.budget.hours_spent) * 3600)
        return max(0.0, min(ends)) if ends else None


def panel(status: SearchStatus, pool: PoolState | None = None, eta: float | None = None) -> RenderableType:
    """The whole status as tables."""
    parts: list[RenderableType] = [
        Text(headline(status, eta), style="bold"),
        Text(counts_line(status, pool)),
        scores(status),
    ]
    if status.failures:
        causes = ", ".join(f"{count} {reason}" for reason, count in sorted(status.failures.items()))
        parts.append(Text(f"failures: {causes}", style="red"))
    if status.confirmed:
        parts += [Text(""), confirmed_table(status)]
    return Group(*parts)


def headline(status: SearchStatus, eta: float | None = None) -> str:
    """Name, space, optimizer, state and time in one line."""
    spent = duration(status.budget.hours_spent * 3600)
    ending = f"  {status.why}" if status.why and status.state != "running" else ""
    left = f"  ETA {duration(eta)}" if eta is not None and status.state == "running" else ""
    what = f"{status.space}, {status.parameters} parameters, {status.optimizer}"
    return f"{status.name}  ({what})  {status.state.upper()} {spent}{left}{ending}"


def counts_line(status: SearchStatus, pool: PoolState | None = None) -> str:
    """Candidates by what became of them, the time split, and the workers."""
    c = status.candidates
    of = f" of {status.budget.candidates}" if status.budget.candidates else ""
    text = f"candidates {c.asked}{of}: {c.done} scored, {c.cached} cached, {c.failed} failed, {c.running} running"
    if status.seconds:
        split = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in status.seconds.items())
        text += f"  |  {sum(status.seconds.values()):.2f} s each ({split})"
    if pool:
        starting = f", {pool.starting} starting" if pool.starting else ""
        text += f"  |  workers {pool.busy} busy of {pool.workers}{starting}"
    return text


def scores(status: SearchStatus) -> Table:
    """Baselines, the best and the front, with standard errors, on the search split."""
    table = Table(title="search split", title_justify="left", box=None, pad_edge=False)
    table.add_column("candidate")
    table.add_column("")
    for name, direction in status.directions.items():
        table.add_column(f"{name} {'↑' if direction == 'maximize' else '↓'}", justify="right")
    best = status.best.id if status.best else ""
    front = {e.id for e in status.front_entries}
    for shown in status.baselines:
        table.add_row(shown.id, _mark(shown, best, front), *_cells(shown.objectives, status), style="dim")
    found = [e for e in status.front_entries if e.id not in {b.id for b in status.baselines}]
    first = next(iter(status.directions))
    found.sort(key=lambda e: e.objectives[first].mean, reverse=status.directions[first] == "maximize")
    for shown in found[:_FRONT_ROWS]:
        style = "bold green" if shown.id == best else ""
        table.add_row(shown.id, _mark(shown, best, front), *_cells(shown.objectives, status), style=style)
    if len(found) > _FRONT_ROWS:
        table.add_row("", f"and {len(found) - _FRONT_ROWS} more on the front")
    return table


def confirmed_table(status: SearchStatus) -> Table:
    """What the held-out split says: every confirmed candidate, and how far it is from the best source."""
    first = next(iter(status.directions))
    up = status.directions[first] == "maximize"
    table = Table(title="held-out split (never seen by the search)", title_justify="left", box=None, pad_edge=False)
    table.add_column("candidate")
    table.add_column("")
    for name in status.directions:
        table.add_column(name, justify="right")
    table.add_column(f"{first}: gain over the best source", justify="right")
    for shown in status.confirmed_baselines:
        won = shown.id == status.winner
        mark, style = (f"{shown.label}, winner", "bold green") if won else (shown.label, "dim")
        table.add_row(shown.id, mark, *_cells(shown.objectives, status), "", style=style)
    for found in sorted(status.confirmed, key=lambda e: e.objectives[first].mean, reverse=up):
        mark, style = ("winner", "bold green") if found.id == status.winner else (found.label, "")
        table.add_row(found.id, mark, *_cells(found.objectives, status), gain_text(found, status), style=style)
    return table


def gain_text(found: ConfirmedEntry, status: SearchStatus) -> str:
    """The paired difference to the best source in the first objective: +0.320 [0.270, 0.370] over japanese."""
    first = next(iter(status.directions))
    up = status.directions[first] == "maximize"
    means = {e.label: e.objectives[first].mean for e in status.confirmed_baselines if e.label in status.sources}
    if not means:
        return ""
    best = (max if up else min)(means, key=lambda label: means[label])
    gap = next(g for g in found.objectives[first].difference if g.to == best)
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] over {best}"


def line(status: SearchStatus, eta: float | None = None) -> str:
    """The status as one plain line, for logs."""
    if status.state == "confirming":
        done = f"{len(status.confirmed)} of the best and {len(status.confirmed_baselines)} landmarks"
        return f"confirming on the held-out split: {done} scored so far"
    c = status.candidates
    of = f"/{status.budget.candidates}" if status.budget.candidates else ""
    text = f"[{duration(status.budget.hours_spent * 3600)}] {c.done + c.cached + c.failed}{of} candidates"
    if c.failed:
        text += f", {c.failed} failed"
    if status.best:
        values = ", ".join(f"{name} {cell(v)}" for name, v in status.best.objectives.items())
        text += f"; best {status.best.id}{f' ({status.best.label})' if status.best.label else ''}: {values}"
    if len(status.directions) > 1:
        text += f"; {len(status.front)} on the front"
    return text + (f"; ETA {duration(eta)}" if eta is not None and status.state == "running" else "")


def cell(value: Value) -> str:
    """A mean with its standard error: 0.620 ± 0.024."""
    return f"{value.mean:.3f} ± {value.stderr:.3f}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 3m20s, 2h05m, 1d4h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"


def _mark(shown: Entry, best: str, front: set[str]) -> str:
    marks = [shown.label] if shown.label else []
    if shown.id == best:
        marks.append("best")
    if shown.id in front:
        marks.append("front")
    return ", ".join(marks)


def _cells(objectives: Mapping[str, Value], status: SearchStatus) -> list[str]:
    return [cell(objectives[name]) for name in status.directions]
