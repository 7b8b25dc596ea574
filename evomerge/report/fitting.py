"""Tables that fit the screen: they show as much as its width allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_ANY_WIDTH = 10_000  # wider than any table, to measure the natural width of a table
_MIN_TITLE = 8  # characters; narrower titles would be broken within words
_MAX_NAME = 24  # characters of a candidate's name and roles before they take a second line


@dataclass(frozen=True)
class Column:
    """A column of a table: its title and a text for each row.

    Attributes:
        right: whether texts are right-aligned, like numbers.
        most: the maximum number of characters in a line.
    """

    title: str
    texts: Sequence[str]
    right: bool = False
    most: int | None = None


Columns = Sequence[Column]
Step = Callable[[Columns], Columns]
"""A transformation that makes a table narrower."""


def without(title: str) -> Step:
    """Drop the column with this title."""
    return lambda columns: [column for column in columns if column.title != title]


def named(marks: Sequence[str]) -> Step:
    """Move the roles of candidates into the first column, next to their ids, and drop the second."""

    def joined(columns: Columns) -> Columns:
        first, _, *rest = columns
        texts = [f"{name} {mark}".strip() for name, mark in zip(first.texts, marks, strict=True)]
        return [replace(first, texts=texts, most=_MAX_NAME), *rest]

    return joined


def terse(columns: Columns) -> Columns:
    """Drop standard errors: 0.620 ± 0.024 becomes 0.620."""
    return [replace(column, texts=[re.sub(r" ± [\d.]+", "", text) for text in column.texts]) for column in columns]


class FittedTable:
    """A table that is shortened step by step until it is no wider than the screen.

    First, titles are broken into lines; then the steps are applied in turn. A line below lists the dropped columns.

    Args:
        styles: the style of each row; empty for no styles.
    """

    def __init__(
        self, columns: Columns, steps: Sequence[Step] = (), *, title: str | None = None, styles: Sequence[str] = ()
    ) -> None:
        self._columns, self._steps, self._title, self._styles = columns, steps, title, styles

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        freely = options.update(max_width=_ANY_WIDTH)
        columns = self._columns
        table = self._table(columns, broken=False)
        for step in (list, *self._steps):  # first, titles are broken and nothing else
            if Measurement.get(console, freely, table).maximum <= options.max_width:
                break
            columns = step(columns)
            table = self._table(columns, broken=True)
        yield table
        shown = {column.title for column in columns}
        if left_out := [column.title for column in self._columns if column.title and column.title not in shown]:
            yield Text(f"A wider screen also shows: {', '.join(left_out)}.", style="dim")

    def _table(self, columns: Columns, *, broken: bool) -> Table:
        table = Table(title=self._title, title_justify="left", box=None, pad_edge=False)
        for column in columns:
            width = max([_MIN_TITLE, *(len(text) for text in column.texts)])
            title = heading(column.title, width) if broken else column.title
            table.add_column(title, justify="right" if column.right else "left", max_width=column.most)
        for number, texts in enumerate(zip(*(column.texts for column in columns), strict=True)):
            table.add_row(*texts, style=self._styles[number] if self._styles else None)
        return table


def heading(text: str, width: int) -> str:
    """The title of a column in lines of at most ``width`` characters, broken only after spaces and punctuation."""
    lines = [""]
    for piece in re.findall(r"[^ _./:-]*[ _./:-]+|[^ _./:-]+", text):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
