"""The verbs, as the driver hears them: from the store, from signals, from whoever holds the object."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from evomerge.search.settings.sections import Budget
from evomerge.store import Verb

GRACE_S = 3.0
"""How long a second Ctrl-C may take to end the work in an orderly way."""


class Control:
    """What was asked of a running search.

    ``pause`` starts nothing new until ``resume``; ``stop`` lets what runs finish and ends; ``cancel`` ends now. The
    last two stick. ``reread`` takes up the budget that the search file has by now.

    Attributes:
        budget: what the search may spend, since that was last changed; None as long as it never was.

    Args:
        read: gives the verbs that arrived since the last call, oldest first (the store's command table).
        interval_s: how often ``read`` is asked at the most.
        clock: seconds, to tell how long pauses last.
        reread: gives the budget that the search file has; None when it has none that can be used.
    """

    def __init__(
        self,
        read: Callable[[], Sequence[Verb]],
        interval_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        reread: Callable[[], Budget | None] = lambda: None,
    ) -> None:
        self._read = read
        self._interval_s = interval_s
        self._asked_at = float("-inf")
        self._clock = clock
        self._reread = reread
        self._paused_at = 0.0
        self._paused_before_s = 0.0
        self.paused = False
        self.stopping = False
        self.cancelled = False
        self.budget: Budget | None = None

    def poll(self) -> None:
        """Take in what has arrived."""
        now = time.monotonic()
        if now - self._asked_at < self._interval_s:
            return
        self._asked_at = now
        for verb in self._read():
            self.hear(verb)

    def hear(self, verb: Verb) -> None:
        """Act on one verb."""
        if verb == "pause" and not self.paused:
            self.paused, self._paused_at = True, self._clock()
        elif verb == "resume" and self.paused:
            self._paused_before_s = self.paused_s()
            self.paused = False
        elif verb == "stop":
            self.stopping = True
        elif verb == "cancel":
            self.stopping = self.cancelled = True
        elif verb == "reread":
            self.budget = self._reread() or self.budget

    def paused_s(self) -> float:
        """Seconds spent in pauses so far."""
        return self._paused_before_s + (self._clock() - self._paused_at if self.paused else 0.0)

    @contextmanager
    def signals(self, say: Callable[[str], None], end_now: Callable[[], None] = lambda: None) -> Iterator[None]:
        """While open, the first Ctrl-C or SIGTERM means stop and the second cancel.

        Args:
            say: tells the person what the first one does.
            end_now: ends the process; called from a thread where the second one could not end the work within GRACE_S,
                as in the middle of a long computation that does not come back to Python.
        """

        def heard(number: int, frame: FrameType | None) -> None:
            if self.stopping:
                self.hear("cancel")
                raise KeyboardInterrupt
            self.hear("stop")
            say("stopping when running jobs have finished; again to stop now")

        # Python runs its handlers between two of its own steps, and two signals within one step as one. The bytes of
        # the wakeup descriptor are written at once, one for each.
        counted, written = socket.socketpair()
        written.setblocking(False)
        closed = threading.Event()

        def count() -> None:
            asked = 0
            while asked < 2 and (numbers := counted.recv(16)):
                asked += sum(number in (signal.SIGINT, signal.SIGTERM) for number in numbers)
            if asked >= 2 and not closed.wait(GRACE_S):
                end_now()

        wakeup = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        counting = threading.Thread(target=count, name="signals", daemon=True)
        counting.start()
        before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            closed.set()
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            written.close()
            counting.join()
            counted.close()
