"""A console that shows foreign names literally and never interprets them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from evomerge.printable import printable

_LONGEST_ESCAPE = len("\\U0001d173")


class PrintableConsole(Console):
    """Escapes invisible characters, except for the console's own control codes."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments to print; segments with control characters become longer.

        Without a terminal, trailing blanks, with which tables pad their lines, are removed.
        """
        segments = map(_shown, super().render(renderable, options))
        return segments if self.is_terminal else _unpadded(segments)


def make_console() -> Console:
    """The console for all commands: wide enough for tables if it is not a terminal; names are never markup."""
    return PrintableConsole(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)


def _shown(segment: Segment) -> Segment:
    if segment.control or segment.text.isprintable():
        return segment
    lines = segment.text.split("\n")
    return Segment("\n".join(printable(line, _LONGEST_ESCAPE * len(line)) for line in lines), segment.style)


def _unpadded(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The segments without blanks at the ends of lines."""
    blanks: list[Segment] = []  # held back, because something may follow on the line
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
