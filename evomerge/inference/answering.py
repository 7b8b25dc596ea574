"""How far a model is with what it was asked, for whoever waits for it in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[int], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While open, ``listener`` is called after every step of an engine in this thread, with how many prompts it has
    answered in it, mostly none. It must not raise: what it raises is taken for the model's.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def answered(count: int) -> None:
    """Say that a step is over, in which so many prompts were answered."""
    if (listener := _listener.get()) is not None:
        listener(count)
