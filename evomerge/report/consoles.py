"""A console that shows names of others as they are and does nothing that they say."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from evomerge.printable import printable

_LONGEST_ESCAPE = len("\\U0001d173")


class PrintableConsole(Console):
    """Writes what cannot be seen as an escape, but for what the console itself says to the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of something printed; one that holds a control character is longer than it was.

        Without a terminal lines end with what they say: tables pad them with blanks.
        """
        segments = map(_shown, super().render(renderable, options))
        return segments if self.is_terminal else _unpadded(segments)


def make_console() -> Console:
    """The console of every command: wide enough for tables when it is no terminal, and names are never markup."""
    return PrintableConsole(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)


def _shown(segment: Segment) -> Segment:
    if segment.control or segment.text.isprintable():
        return segment
    lines = segment.text.split("\n")
    return Segment("\n".join(printable(line, _LONGEST_ESCAPE * len(line)) for line in lines), segment.style)


def _unpadded(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The same without blanks at the end of lines."""
    blanks: list[Segment] = []  # that something may follow on the line
    for segment in segments:
        if not segment.control and not segment.text.strip(" "):
            blanks.append(segment)
            continue
        if not segment.text.startswith("\n"):
            yield from blanks
        text = re.sub(" +\n", "\n", segment.text)
        said = text.rstrip(" ")
        yield Segment(said, segment.style, segment.control)
        blanks = [Segment(text[len(said) :], segment.style)] if said != text else []
    yield from blanks
