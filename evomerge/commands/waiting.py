"""Progress messages for people while a command does something that takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

_OPENING = "opening models and tasks…"


@contextmanager
def opening(*, quiet: bool = False) -> Iterator[None]:
    """Show on stderr that models and tasks are being opened: as a status on a terminal, as one line elsewhere.

    Args:
        quiet: print nothing unless stderr is a terminal, because a program is reading the output.
    """
    screen = Console(stderr=True)
    if screen.is_terminal:
        with screen.status(_OPENING, spinner_style="dim"):
            yield
        return
    if not quiet:
        screen.print(_OPENING, style="dim")
    yield


class ProgressBar:
    """A progress bar: called with how much is done and of how much, or given the description of a new phase."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=None)

    def __call__(self, done: int, of: int) -> None:
        self._progress.update(self._task, completed=done, total=of)

    def say(self, what: str) -> None:
        """Show a new phase of unknown length."""
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=None)


@contextmanager
def progress_bar(console: Console, what: str) -> Iterator[ProgressBar]:
    """A progress bar that disappears when done; it is not shown without a terminal."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield ProgressBar(progress, what)
