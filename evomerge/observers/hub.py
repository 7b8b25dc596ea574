"""Reads new events from a store and passes them to the observers, in the driver's process or in a separate one."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.errors import described
from evomerge.observers.base import News, Observer, ObserverSettings, PoolCounts, ends
from evomerge.store.events import Winner
from evomerge.store.lease import current_holder
from evomerge.store.reading import ReadStore
from evomerge.store.rows import CandidateRow, EventRow, SearchRow
from evomerge.store.store import Store

EVERY_S = 1.0
"""The minimum interval between calls of observers."""

_PATIENCE_S = 30.0
"""How long the end of a search waits for its observers, for example for one that cannot reach its server."""

_log = logging.getLogger(__name__)


class Observers:
    """The observers of one search, each in its own thread, so that none can stop or delay the search or another one.

    Args:
        store: the store of the search; it is only read.
        folder: the search's folder, where observers keep their state.
        settings: the observers in the search file.
    """

    def __init__(self, store: ReadStore, folder: Path, settings: Sequence[ObserverSettings]) -> None:
        self._listeners = [Listener(store, folder, s) for s in settings]
        self._told_at = -math.inf
        self._left: list[str] = []

    def poll(self, workers: Callable[[], PoolCounts]) -> None:
        """Pass news to the observers if it is time; the caller, a driver, never waits for them."""
        moment = time.monotonic()
        if not self._listeners or moment - self._told_at < EVERY_S:
            return
        self._told_at = moment
        current = workers()
        for listener in self._listeners:
            if not listener.is_busy():
                listener.start(partial(listener.look, current))

    def look(self) -> None:
        """Pass news to every observer, in this thread."""
        for listener in self._listeners:
            listener.look()

    def close(self) -> None:
        """Pass the remaining news to the observers and close them; waits for at most half a minute."""
        end = time.monotonic() + _PATIENCE_S
        for listener in self._listeners:
            listener.finish()
        if left := [
            listener.kind for listener in self._listeners if listener.is_busy(max(0.0, end - time.monotonic()))
        ]:
            _log.warning("observers have not ended and are left behind: %s", ", ".join(left))
        self._left = left

    @property
    def is_done(self) -> bool:
        """Whether every observer has been dropped."""
        return all(listener.is_dropped for listener in self._listeners)

    @property
    def faults(self) -> dict[str, str]:
        """Why observers did not get all news, by kind; complete after ``close``."""
        faults = {listener.kind: listener.fault for listener in self._listeners if listener.fault}
        return dict.fromkeys(self._left, "has not ended") | faults


class Listener:
    """Runs one observer: starts it, passes news to it, and drops it if it fails, which is logged once."""

    def __init__(self, store: ReadStore, folder: Path, settings: ObserverSettings) -> None:
        self.kind = settings.kind
        self.observer: Observer | None = None
        self._store = store
        self._start_it = partial(settings.build, folder)
        self.is_dropped = False
        self.fault = ""
        """Why it has not got all news, as far as is known."""
        self._news: News | None = None
        self._thread: threading.Thread | None = None

    def start(self, target: Callable[[], None]) -> None:
        """Run a function in a thread for this observer."""
        self._thread = threading.Thread(target=target, name=f"observer {self.kind}", daemon=True)
        self._thread.start()

    def is_busy(self, wait_s: float = 0.0) -> bool:
        """Whether the started function is still running after waiting for it."""
        if self._thread is None:
            return False
        self._thread.join(wait_s)
        return self._thread.is_alive()

    def look(self, workers: PoolCounts | None = None) -> None:
        """Read the news and pass them on. The first call also starts the observer, which may have to reach a server."""
        if self.is_dropped:
            return
        try:
            if self.observer is None:
                search = self._store.search()
                self.observer = self._guarded("could not be started", partial(self._start_it, search))
            news = self._read(workers) if self.observer is not None else None
        except Exception as error:  # the driver handles errors of the store; the next poll may succeed
            if not self.fault:
                _log.warning("observer %s cannot read the store: %s", self.kind, error)
            self.fault = f"cannot read the store: {described(error)}"
            return
        if not self.is_dropped:
            self.fault = ""
        if self.observer is not None and news is not None:
            succeeded = self._guarded("failed", partial(_tell, self.observer, news))
            if not succeeded:
                self._end()

    def finish(self) -> None:
        """Poll a last time and close the observer, in its thread, after the poll that is running there."""
        before = self._thread

        def last() -> None:
            if before is not None:
                before.join()
            self.look()
            self._end()

        self.start(last)

    def _end(self) -> None:
        if self.observer is not None:
            self._guarded("failed at its end", self.observer.close)
            self.observer = None

    def _guarded(self, what: str, call: Callable[[], Any]) -> Any:
        """Call a function of the observer; an exception, whatever it is, must not end the search."""
        try:
            return call()
        except Exception as error:
            _log.warning("observer %s %s and is dropped: %s: %s", self.kind, what, type(error).__name__, error)
            self.is_dropped = True
            self.fault = f"{what}: {described(error)}"
            return None

    # Reading

    def _read(self, workers: PoolCounts | None) -> News:
        events = self._store.events(since=self.observer.seq if self.observer is not None else 0)
        if self._news is not None and not events:
            self._news = replace(self._news, events=[], candidates={}, workers=workers)
            return self._news
        search = self._store.search()
        objectives = search.record.objectives
        best = {o.name: self._store.best(o.name, maximise=o.maximise) for o in objectives}
        named = self._store.events(kinds=("shortlist", "winner"), newest=1)
        self._news = News(
            search=search,
            events=events,
            candidates=self._rows({e.candidate for e in events if e.candidate is not None and ends(e)}),
            counts=self._store.counts(),
            front=self._store.front(),
            best={name: rows[0] for name, rows in best.items() if rows},
            held_out=self._held_out(search, events),
            winner=next((event.read(Winner).candidate for event in named if event.kind == "winner"), None),
            workers=workers,
        )
        return self._news

    def _rows(self, numbers: Collection[int]) -> dict[int, CandidateRow]:
        """These candidates, in one query of the newest ones: they were asked for recently, so few others are read."""
        while numbers:
            rows = self._store.candidates(newest=sum(self._store.counts().values()) - min(numbers))
            if rows[0].number <= min(numbers):  # otherwise more have been asked for since the count
                return {row.number: row for row in rows if row.number in numbers}
        return {}

    def _held_out(self, search: SearchRow, events: Sequence[EventRow]) -> dict[int, Mapping[str, float]]:
        """The means of all candidates with held-out scores; only new ones are read."""
        known = {} if self._news is None else dict(self._news.held_out)
        scored = events if self._news is not None else self._store.events(kinds=("scores",))
        for number in {e.candidate for e in scored if e.kind == "scores" and e.candidate is not None}:
            by_version = {scores.evaluator: scores.metrics for scores in self._store.scores(number, "held_out")}
            known[number] = {
                o.name: float(by_version[o.version][o.metric].astype(np.float64).mean())
                for o in search.record.objectives
                if o.version in by_version
            }
        return known


def _tell(observer: Observer, news: News) -> bool:
    observer.tell(news)
    observer.seq = news.events[-1].seq if news.events else observer.seq
    return True


def follow(store: Store, folder: Path, settings: Sequence[ObserverSettings]) -> dict[str, str]:
    """Report a search to observers from a separate process, until no driver is running or no observer is left.

    Returns:
        Why observers did not get all news, by kind.
    """
    observers = Observers(store, folder, settings)
    with closing(observers):
        driven = True
        while driven and not observers.is_done:
            driven = current_holder(store) is not None  # checked first, so that the driver's last events are reported
            observers.look()
            if driven:
                time.sleep(EVERY_S)
    return observers.faults
