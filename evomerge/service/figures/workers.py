"""What workers did, and what failed, over time."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from evomerge.report.svg import COLOURS
from evomerge.service.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, PURPLE, TEAL, figure, safe, texts
from evomerge.store import EventRow, Store, current_holder
from evomerge.store.events import AttemptEnded, ConfirmFailed, Descent, Failure, State
from evomerge.store.rows import candidate_id

MAX_ATTEMPTS = 1500
"""The maximum number of attempts in a timeline, the newest."""

_ENDS = ("rung", "result", "failure")
_STATES = ("state", "lease")
_FOLLOWED = "followed the proxy"
_COLOURS = {"scored": BLUE, "scored up to a rung": TEAL, "running": GREY, _FOLLOWED: ORANGE}
_REASONS = {"error": PINK, "not_finite": PURPLE, "out_of_memory": ORANGE, "worker_died": "#a40e26", "timeout": GREEN}
_PATTERNS = ("/", "\\", "x", "-", "|", "+", ".")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True, slots=True)
class AttemptSpan:
    """One attempt at a candidate: when it ran (seconds since 1970), on which worker, and how it ended.

    A descent of the proxy is an attempt without a candidate.
    """

    candidate: int | None
    number: int
    begun: float
    ended: float
    worker: str
    how: str

    @property
    def seconds(self) -> float:
        return max(0.0, self.ended - self.begun)  # the clock may have been set back


def timeline(store: Store) -> go.Figure:
    """A bar for each attempt at a candidate, from dispatch to recording, in the row of its worker, coloured by outcome.

    Descents of the proxy are shown for as long as they computed. Attempts of the confirmation are not shown, because
    the store does not record where they ran.
    """
    events = store.events(kinds=("dispatch", "descent", *_ENDS, *_STATES), newest=2 * MAX_ATTEMPTS)
    attempts = attempts_of(events, time.time() if current_holder(store) is not None else None)
    if not attempts:
        return figure(notes=["Nothing has been dispatched yet."])
    workers = sorted({attempt.worker for attempt in attempts}, key=_natural)
    hows = dict.fromkeys(attempt.how for attempt in attempts)
    bars = [_bars(how, [attempt for attempt in attempts if attempt.how == how]) for how in hows]
    share = idle_share(attempts, stops_of(events))
    notes = []
    if share is not None:
        notes.append(f"Workers were idle for {share:.1%} of the time from their first to last attempt, without stops.")
    if len(events) == 2 * MAX_ATTEMPTS:
        notes.append(f"The newest {len(attempts):,} attempts.")
    return figure(
        bars,
        notes=notes,
        barmode="overlay",
        bargap=0.25,
        height=max(220, 150 + 26 * len(workers)),
        xaxis={"type": "date"},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": [safe(w) for w in reversed(workers)]},
    )


def attempts_of(events: Iterable[EventRow], now: float | None) -> list[AttemptSpan]:
    """Attempts from their events, oldest first.

    An attempt whose driver died has no recorded end and worker, and is left out. If ``now`` is given because a driver
    is running, attempts in progress last until then.
    """
    begun: dict[int, EventRow] = {}
    attempts = []
    for event in events:
        if event.kind == "descent":
            descent = event.read(Descent)
            began = event.time - descent.seconds
            attempts.append(AttemptSpan(None, 1, began, event.time, descent.worker or "unknown", _FOLLOWED))
        if event.candidate is None:
            continue
        if event.kind == "dispatch":
            begun[event.candidate] = event
            continue
        start = begun.pop(event.candidate, None)
        if start is not None and start.attempt == event.attempt:
            attempts.append(_attempt(start, event.time, event.read(AttemptEnded).worker or "unknown", _how(event)))
    if now is not None:
        attempts += [_attempt(start, now, "not known yet", "running") for start in begun.values()]
    return sorted(attempts, key=lambda attempt: attempt.begun)


def _attempt(start: EventRow, ended: float, worker: str, how: str) -> AttemptSpan:
    return AttemptSpan(start.candidate or 0, start.attempt or 0, start.time, ended, worker, how)


def _candidate_of(event: EventRow) -> int:
    """The candidate of a failure on either split."""
    return event.read(ConfirmFailed).candidate if event.candidate is None else event.candidate


def _how(event: EventRow) -> str:
    if event.kind == "failure":
        return f"failed: {event.read(Failure).reason.replace('_', ' ')}"
    return "scored" if event.kind == "result" else "scored up to a rung"


def stops_of(events: Iterable[EventRow]) -> list[tuple[float, float]]:
    """The intervals in which a search was paused, confirming, stopped or without a driver, oldest first.

    ``events`` are those of attempts, states and leases. A driver that was killed records no end, so its stop begins at
    its last event. Attempts that were running when a driver ended must be repeated, and their time does not count as
    idle: the stop begins when the first of them began.
    """
    stops = []
    stopped_at, last = None, None
    running: dict[int, float] = {}
    for event in events:
        if event.kind == "dispatch" and event.candidate is not None:
            running[event.candidate] = event.time
        elif event.kind in _ENDS and event.candidate is not None:
            running.pop(event.candidate, None)
        if event.kind == "lease":  # from another driver; the previous one may not have recorded its end
            known = [at for at in (last if stopped_at is None else stopped_at, *running.values()) if at is not None]
            stopped_at = min(known, default=None)
            running.clear()
        elif event.kind == "state" and event.read(State).state != "running":
            stopped_at = event.time if stopped_at is None else stopped_at
        elif event.kind == "state" and stopped_at is not None:
            stops.append((stopped_at, event.time))
            stopped_at = None
        last = event.time
    return stops


def idle_share(attempts: Sequence[AttemptSpan], stops: Sequence[tuple[float, float]] = ()) -> float | None:
    """The share of the time between their first and last attempts in which workers were idle, over all workers.

    ``stops`` do not count, except for attempts that ended during them. None if no worker has finished anything.
    """
    ends: dict[str, float] = {}
    busy = idle = 0.0
    for attempt in sorted(attempts, key=lambda attempt: attempt.begun):  # some are queued while others run
        if attempt.how == "running":
            continue
        free = ends.get(attempt.worker, attempt.begun)
        stopped = sum(max(0.0, min(high, attempt.begun) - max(low, free)) for low, high in stops)
        idle += max(0.0, attempt.begun - free - stopped)
        busy += max(0.0, attempt.ended - max(free, attempt.begun))
        ends[attempt.worker] = max(free, attempt.ended)
    return idle / (busy + idle) if busy + idle > 0 else None


def _bars(how: str, attempts: Sequence[AttemptSpan]) -> go.Bar:
    reason = how.removeprefix("failed: ").replace(" ", "_")
    failed = how.startswith("failed")
    colour = _REASONS.get(reason, GREY) if failed else _COLOURS[how]
    pattern = {"shape": _PATTERNS[list(_REASONS).index(reason) % len(_PATTERNS)] if reason in _REASONS else "."}
    return go.Bar(
        base=np.array([_moment(attempt.begun) for attempt in attempts], dtype="datetime64[us]"),
        x=np.array([1000.0 * attempt.seconds for attempt in attempts]),
        y=texts(safe(attempt.worker) for attempt in attempts),
        orientation="h",
        name=how,
        marker={"color": colour, "line": {"width": 0.5, "color": GREY}, "pattern": pattern if failed else {}},
        customdata=np.array(["descent" if attempt.candidate is None else attempt.candidate for attempt in attempts]),
        hovertext=texts(
            f"<b>{_attempt_name(a)}</b><br>{safe(how)}<br>{a.seconds:.1f} s on "
            f"{safe(a.worker)}<br>from {_moment(a.begun):%Y-%m-%d %H:%M:%S}"
            for a in attempts
        ),
        hoverinfo="text",
    )


def _attempt_name(attempt: AttemptSpan) -> str:
    if attempt.candidate is None:
        return "a descent"
    return f"{candidate_id(attempt.candidate)}, attempt {attempt.number}"


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds)


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """A sort key that orders names by the numbers in them: worker 2 before worker 10."""
    words = "".join(f" {c} " if not c.isdigit() else c for c in name).split()
    return tuple((int(word), "") if word.isdecimal() else (-1, word) for word in words)


# ---- failures --------------------------------------------------------------------------------------------------------


def failures(store: Store) -> go.Figure:
    """The number of failed attempts by cause, over the hours of the search."""
    search = store.search()
    events = store.events(kinds=("failure", "confirm failed"))
    if not events:
        return figure(notes=["Nothing has failed."])
    causes: dict[str, list[EventRow]] = {}
    for event in events:
        where = " in confirmation" if event.kind == "confirm failed" else ""
        causes.setdefault(f"{event.read(Failure).reason.replace('_', ' ')}{where}", []).append(event)
    lines = []
    for place, (cause, group) in enumerate(sorted(causes.items(), key=lambda item: -len(item[1]))):
        numbers = [_candidate_of(event) for event in group]
        lines.append(
            go.Scatter(
                x=[(event.time - search.created_at) / 3600 for event in group],
                y=list(range(1, len(group) + 1)),
                mode="lines+markers",
                name=f"{safe(cause)} ({len(group)})",
                line={"shape": "hv", "dash": _DASHES[place % len(_DASHES)], "color": COLOURS[place % len(COLOURS)][0]},
                customdata=numbers,
                hovertext=texts(_failure_words(n, event) for n, event in zip(numbers, group, strict=True)),
                hoverinfo="text",
            )
        )
    final = sum(event.read(Failure).final for event in events)
    again = len(events) - final
    return figure(
        lines,
        notes=[f"{len(events)} attempts failed: {final} for good, {again} to be tried again."],
        xaxis={"title": {"text": "hours since the start, pauses included"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "failed attempts"}, "rangemode": "tozero"},
    )


def _failure_words(number: int, event: EventRow) -> str:
    failure = event.read(Failure)
    message, final = failure.message, "for good" if failure.final else "to be tried again"
    lines = [message[i : i + 80] for i in range(0, min(len(message), 240), 80)]
    return "<br>".join([f"<b>{candidate_id(number)}</b>, {final}", *map(safe, lines)])
