"""The commands that the driver receives: from the store, from signals, or from code that holds the object."""

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
"""How long an orderly end may take after a second Ctrl-C."""


class Control:
    """The commands given to a running search.

    ``pause`` starts nothing new until ``resume``; ``stop`` lets running attempts finish and ends; ``cancel`` ends now.
    The last two are final. ``reread`` takes the budget from the search file again.

    Attributes:
        budget: the budget that was given last; None if it never changed.

    Args:
        read: returns the commands that arrived since the last call, oldest first (the store's command table).
        interval_s: the shortest time between two calls of ``read``.
        clock: in seconds, to measure pauses.
        reread: returns the budget of the search file; None if it has no usable one.
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
        """Process the commands that have arrived."""
        now = time.monotonic()
        if now - self._asked_at < self._interval_s:
            return
        self._asked_at = now
        for verb in self._read():
            self.hear(verb)

    def hear(self, verb: Verb) -> None:
        """Process one command."""
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
            say: shows the user what the first one does.
            end_now: ends the process; called from a thread if the second one could not end the work within GRACE_S,
                as during a long computation that does not return to Python.
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
