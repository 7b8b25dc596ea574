"""What a person is told while a command works on something that takes seconds before it can say anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

_OPENING = "opening models and tasks…"


@contextmanager
def opening(*, quiet: bool = False) -> Iterator[None]:
    """Say on stderr that models and tasks are opened: for as long on a terminal, once anywhere else.

    Args:
        quiet: for a program that reads what the command prints; a terminal is told all the same.
    """
    screen = Console(stderr=True)
    if screen.is_terminal:
        with screen.status(_OPENING, spinner_style="dim"):
            yield
        return
    if not quiet:
        screen.print(_OPENING, style="dim")
    yield


class Bar:
    """A bar on the screen: called with how much is done, and of how much; or told that something else is done now."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=None)

    def __call__(self, done: int, of: int) -> None:
        self._progress.update(self._task, completed=done, total=of)

    def say(self, what: str) -> None:
        """Name what is done from now on, of which nobody knows how much is left."""
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=None)


@contextmanager
def progress_bar(console: Console, what: str) -> Iterator[Bar]:
    """A bar that goes when it is done; without a terminal there is none."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, what)
