"""Reports an engine's progress to code that waits for it in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[int], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def progress_listener(listener: Listener) -> Iterator[None]:
    """Within the context, call ``listener`` after every step of an engine in this thread, with the number of prompts
    answered in that step, usually 0. It must not raise: its exceptions would be attributed to the model.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report_answered(count: int) -> None:
    """Report that a step has finished, in which this many prompts were answered."""
    if (listener := _listener.get()) is not None:
        listener(count)
