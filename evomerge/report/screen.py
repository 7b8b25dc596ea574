"""The screen of a search: a live panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from evomerge.report.confirmed import Choice
from evomerge.report.entries import ConfirmedEntry, Entry, Value
from evomerge.report.status import ItemResponse, ScreenState, SearchStatus, Slow
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
        finished = _finished(status)
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
        *(Text(told) for told in thrift_lines(status)),
        scores(status),
    ]
    if status.failures:
        causes = ", ".join(f"{count} {reason}" for reason, count in sorted(status.failures.items()))
        parts.append(Text(f"failures: {causes}", style="red"))
    parts += [Text(f"slow: {slow_text(found)}", style="yellow") for found in status.slow]
    if status.confirmed:
        parts += [Text(""), confirmed_table(status), *(Text(told, style="dim") for told in choice_text(status))]
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
    eliminated = f" {c.eliminated} eliminated," if c.eliminated else ""
    text = f"candidates {c.asked}{of}: {c.done} scored,{eliminated} {c.cached} cached, {c.failed} failed, "
    text += f"{c.running} running"
    if status.seconds:
        split = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in status.seconds.items())
        text += f"  |  {sum(status.seconds.values()):.2f} s each ({split})"
    if pool:
        starting = f", {pool.starting} starting" if pool.starting else ""
        text += f"  |  workers {pool.busy} busy of {pool.workers}{starting}"
    return text


def thrift_lines(status: SearchStatus) -> list[str]:
    """What spares items: a line each for racing, the screen and item response where the search uses them."""
    lines = []
    if status.racing is not None:
        rungs = ", ".join(str(rung) for rung in status.racing.rungs)
        lines.append(f"racing: rungs {rungs}; {status.items:,} items scored in all")
    if status.screen is not None:
        lines.append(f"screen: {screen_text(status.screen)}")
    if status.racing is not None and status.racing.estimate == "item_response":
        known = "; ".join(_item_response(name, found) for name, found in status.item_response.items())
        lines.append(f"item response: {known or 'no model of it is fitted yet'}")
    return lines


def screen_text(screen: ScreenState) -> str:
    """Whether the screen is on, and why: m agrees with maths, tau 0.71 over 60 candidates: on, 33 left out."""
    left_out = f", {screen.left_out} left out" if screen.on or screen.left_out else ""
    if screen.tau is None:
        return f"{screen.metric} was not compared with {screen.objective} yet: off{left_out}"
    tau = f"tau {screen.tau:.2f} over {screen.pairs} candidates"
    if screen.tau < screen.least_tau:
        few = f"{screen.metric} does not agree with {screen.objective} well enough"
        return f"{few}, {tau}, {screen.least_tau:g} is asked for: off{left_out}"
    state = "on" if screen.on else "off, too few to trust it yet"
    return f"{screen.metric} agrees with {screen.objective}, {tau}: {state}{left_out}"


def _item_response(name: str, found: ItemResponse) -> str:
    used = "used" if found.used else "not used"
    return f"{used} for {name} (held-out error {found.item_response:.3f}, by the best landmark {found.reference:.3f})"


def slow_text(found: Slow) -> str:
    """Who is slow, and by how much: node gpu07-3fa2c1 takes 0.42 s an item, the others 0.21 s (medians of ...)."""
    medians = f"medians of {found.candidates} and {found.others_candidates} candidates"
    seconds = f"{found.seconds:.3g} s an item, the others {found.others_seconds:.3g} s"
    return f"{found.kind} {found.name} takes {seconds} ({medians})"


def scores(status: SearchStatus) -> Table:
    """Baselines, the best and the front, with standard errors, on the search split."""
    table = Table(title="search split", title_justify="left", box=None, pad_edge=False)
    table.add_column("candidate")
    table.add_column("")
    for name, direction in status.directions.items():
        table.add_column(f"{name} {'↑' if direction == 'maximize' else '↓'}", justify="right")
    for title in constraint_titles(status):
        table.add_column(title)
    best = status.best.id if status.best else ""
    front = {e.id for e in status.front_entries}
    for shown in status.baselines:
        table.add_row(shown.id, _mark(shown, best, front), *cells(shown, status), style="dim")
    found = [e for e in status.front_entries if e.id not in {b.id for b in status.baselines}]
    first = next(iter(status.directions))
    found.sort(key=lambda e: e.objectives[first].mean, reverse=status.directions[first] == "maximize")
    for shown in found[:_FRONT_ROWS]:
        style = "bold green" if shown.id == best else ""
        table.add_row(shown.id, _mark(shown, best, front), *cells(shown, status), style=style)
    if len(found) > _FRONT_ROWS:
        table.add_row("", f"and {len(found) - _FRONT_ROWS} more on the front")
    if status.best is None and status.constraints and status.candidates.done:
        table.add_row("", "none scored on every item keeps all constraints yet")
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
    for title in constraint_titles(status):
        table.add_column(title)
    table.add_column(f"{first}: gain over the best source", justify="right")
    for shown in status.confirmed_baselines:
        won = shown.id == status.winner
        mark, style = (f"{shown.label}, winner", "bold green") if won else (shown.label, "dim")
        table.add_row(shown.id, mark, *cells(shown, status, whole=True), "", style=style)
    for found in sorted(status.confirmed, key=lambda e: e.objectives[first].mean, reverse=up):
        mark, style = ("winner", "bold green") if found.id == status.winner else (found.label, "")
        table.add_row(found.id, mark, *cells(found, status, whole=True), gain_text(found, status), style=style)
    return table


def gain_text(found: ConfirmedEntry, status: SearchStatus) -> str:
    """The paired difference to the best source in the first objective: +0.320 [0.250, 0.390] over japanese."""
    first = next(iter(status.directions))
    up = status.directions[first] == "maximize"
    means = {e.label: e.objectives[first].mean for e in status.confirmed_baselines if e.label in status.sources}
    if not means:
        return ""
    best = (max if up else min)(means, key=lambda label: means[label])
    gap = next(g for g in found.objectives[first].difference if g.to == best)
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] over {best}"


def choice_text(status: SearchStatus) -> list[str]:
    """What the numbers of the held-out split rest on, in sentences: what was corrected, and what the choice adds."""
    choice = status.choice
    if choice is None or not choice.comparisons:
        return []
    told = [f"Intervals hold all at once with {choice.confidence:.0%}: corrected for {_comparisons(choice, status)}."]
    if status.winner is not None:
        told.append(_winner_text(status.winner, choice, status))
    if choice.shortlists > 1:
        told.append(
            f"This is shortlist {choice.shortlists} of the search: held-out scores of earlier ones were known before."
        )
    return told


def _winner_text(winner: str, choice: Choice, status: SearchStatus) -> str:
    """What the winner was chosen by, and how much of its value may be luck."""
    limits = ", ".join(constraint_titles(status))
    if not choice.feasible:
        return f"No model keeps every constraint there ({limits}): the winner is the one that misses them least."
    first = next(iter(status.directions))
    known = status.confirmed_values(winner)[first].mean
    among = sum(shown.feasible for shown in [*status.confirmed, *status.confirmed_baselines])
    who = f"the {among} there that keep {limits}" if limits else f"{among} there"
    luck = f"about {choice.luck:.3f} may be luck of the choice"
    return f"The winner is the best of {who}: of its {first} {known:.3f}, {luck}."


def _comparisons(choice: Choice, status: SearchStatus) -> str:
    """How many comparisons there are: 20 comparisons (5 candidates with 4 landmarks) in each objective."""
    ours = len(status.confirmed)
    who = f"{_count(ours, 'candidate')} with {_count(choice.comparisons // ours, 'landmark')}"
    what = f"{_count(choice.comparisons, 'comparison')} ({who})"
    return f"{what} in each objective" if len(status.directions) > 1 else what


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def line(status: SearchStatus, eta: float | None = None) -> str:
    """The status as one plain line, for logs."""
    if status.state == "confirming":
        done = f"{len(status.confirmed)} of the best and {len(status.confirmed_baselines)} landmarks"
        if status.choice is not None and status.choice.drawn:
            done += f" and {status.choice.drawn} for the picture"
        return f"confirming on the held-out split: {done} scored so far"
    c = status.candidates
    of = f"/{status.budget.candidates}" if status.budget.candidates else ""
    text = f"[{duration(status.budget.hours_spent * 3600)}] {_finished(status)}{of} candidates"
    if c.eliminated:
        text += f", {c.eliminated} eliminated"
    if c.failed:
        text += f", {c.failed} failed"
    if status.best:
        values = ", ".join(f"{name} {cell(v)}" for name, v in status.best.objectives.items())
        text += f"; best {status.best.id}{f' ({status.best.label})' if status.best.label else ''}: {values}"
    if len(status.directions) > 1:
        text += f"; {len(status.front)} on the front"
    if status.slow:
        text += f"; slow: {', '.join(found.name for found in status.slow)}"
    return text + (f"; ETA {duration(eta)}" if eta is not None and status.state == "running" else "")


def cell(value: Value) -> str:
    """A mean with its standard error: 0.620 ± 0.024."""
    return f"{value.mean:.3f} ± {value.stderr:.3f}"


def p_text(p: float) -> str:
    """A p as people read it; one that is drawn says no more below a thousandth."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


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


def _finished(status: SearchStatus) -> int:
    """How many candidates are over and done with."""
    c = status.candidates
    return c.done + c.eliminated + c.failed + c.cached


def constraint_titles(status: SearchStatus) -> list[str]:
    """The columns of the constraints: english ≥ 0.9."""
    return [f"{name} {limit.text}" for name, limit in status.constraints.items()]


def cells(shown: Entry, status: SearchStatus, *, whole: bool = False) -> list[str]:
    """The values of a candidate: its objectives, then its constraints; nothing for what is not known.

    Values from fewer items than the search wants are marked as estimates, unless a split is always scored ``whole``.
    """
    found = []
    for name in [*status.directions, *status.constraints]:
        value = shown.objectives.get(name) or shown.constraints.get(name)
        text = ""
        if value is not None:
            text = cell(value) if whole else estimate_cell(value, status.wanted[name])
            if (limit := status.constraints.get(name)) is not None and not limit.is_kept(value):
                text += " missed"
        found.append(text)
    return found


def estimate_cell(value: Value, wanted: int) -> str:
    """A mean with its standard error; one that is estimated from fewer items than wanted as ~0.620 ± 0.024 (25)."""
    return cell(value) if value.n >= wanted else f"~{cell(value)} ({value.n})"
