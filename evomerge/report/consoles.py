"""A console that shows names of others as they are and does nothing that they say."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from evomerge.printable import printable

_LONGEST_ESCAPE = len("\\U0001d173")


class PrintableConsole(Console):
    """Writes what cannot be seen as an escape, but for what the console itself says to the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of something printed; one that holds a control character is longer than it was."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                lines = segment.text.split("\n")
                shown = "\n".join(printable(line, _LONGEST_ESCAPE * len(line)) for line in lines)
                yield Segment(shown, segment.style)
