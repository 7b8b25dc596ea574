"""The style of figures: colours, texts and axes. The page sets text and line colours for light and dark mode.

Colours are those of the light scheme of all other pictures: each has a contrast of at least 3:1 on light and dark
backgrounds, as graphics need. Each kind of mark also has its own shape, for people who cannot tell colours apart.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from evomerge.report.svg import COLOURS

BLUE, ORANGE, GREEN, PURPLE, PINK, TEAL = (light for light, _ in COLOURS)
GREY = "#767676"  # 4.5:1 on white and 4.2:1 on dark: for less important marks, and for text until it is themed
CLEAR = "rgba(0,0,0,0)"
MARK_SCALE = [[0.0, BLUE], [1.0, ORANGE]]  # for points and lines: medium lightness throughout
AREA_SCALE = "Cividis"  # for areas: made for colour-blind readers, with uniform lightness
SIGN_SCALE = "PuOr"  # for areas of either sign

MAX_POINTS = 2000
"""The maximum number of points of one kind in a figure: more overlap and make SVG slow. A note says so."""

_MAX_FOCUSED = 0.9  # the share of the values of an axis that are always visible
_FAR = 8.0  # times their width: a value at this distance would compress them into a point
_NEAR = 3.0  # times their width: values within this distance are visible too
_EDGE = 0.15  # times their width: the margin on either side
_WIDTH = 54  # letters in a line of the notes, which fits on a phone
_LINE, _TOP, _PLOT = 16, 14, 360  # heights in pixels: a line of the notes, the top margin, and the rest of a figure


class Mark(NamedTuple):
    """How a kind of candidate is drawn."""

    colour: str
    symbol: str
    size: int


MARKS: Mapping[str, Mark] = {
    "candidates": Mark(BLUE, "circle", 5),
    "estimated, left their race": Mark(GREY, "circle-open", 5),
    "miss a constraint": Mark(PINK, "x-thin-open", 6),
    "front": Mark(BLUE, "diamond", 10),
    "best in search": Mark(BLUE, "diamond", 10),
    "sources": Mark(ORANGE, "square", 11),
    "uniform average": Mark(PURPLE, "triangle-up", 12),
    "defaults": Mark(TEAL, "triangle-down", 11),
    "held out": Mark(GREEN, "star", 13),
}


def safe(text: str) -> str:
    """Escape text for plotly, which interprets a few tags; names may contain any character."""
    return html.escape(text, quote=False)


def figure(traces: Iterable[Any] = (), notes: Iterable[str] = (), height: int = _PLOT, **layout: Any) -> go.Figure:
    """A figure with ``notes`` above it, each a sentence. Without traces it shows only the notes.

    Args:
        height: in pixels, without the notes.
        layout: plotly's layout settings.
    """
    lines = [line for note in notes for line in textwrap.wrap(note, _WIDTH)]
    look: dict[str, Any] = {
        "template": "none",
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"color": GREY, "size": 12},
        "title": {
            "text": "<br>".join(safe(line) for line in lines),
            "font": {"size": 12},
            "xref": "container",
            "x": 0.01,
            "xanchor": "left",
            "yref": "paper",
            "y": 1,
            "yanchor": "bottom",
            "pad": {"b": 8},
        },
        "margin": {"l": 56, "r": 16, "t": _TOP + _LINE * len(lines), "b": 48},
        "legend": {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"},
        "hovermode": "closest",
        "height": height + _LINE * len(lines),
    }
    for name, value in layout.items():
        look[name] = look.get(name, {}) | value if isinstance(value, dict) else value
    for axis in ["xaxis", "yaxis", *(name for name in layout if name.startswith(("xaxis", "yaxis")))]:
        look[axis] = {**look.get(axis, {}), "automargin": True, "zeroline": False}
    return go.Figure(list(traces), look)  # all at once: each later update of a figure takes as long as creating it


def texts(words: Iterable[str]) -> NDArray[np.str_]:
    """Texts of marks as an array, because plotly checks each element of a list several times."""
    return np.array(list(words), dtype=np.str_)


def stacked(panels: Mapping[str, go.Figure], height: int) -> go.Figure:
    """Figures of one plot each, stacked vertically with a common legend.

    Args:
        panels: the figures by subject, which is put before their notes.
        height: the height of a plot in pixels.
    """
    rows = make_subplots(rows=len(panels))
    named: set[str] = set()
    notes = []
    for row, (of, panel) in enumerate(panels.items(), start=1):
        for trace in panel.data:
            shown = trace.showlegend is not False and trace.name not in named
            named |= {trace.name} if shown else set()
            rows.add_trace(trace.update(legendgroup=trace.name, showlegend=shown), row=row, col=1)
        for axis, update in (("xaxis", rows.update_xaxes), ("yaxis", rows.update_yaxes)):
            look = panel.layout[axis]
            update(title={"text": look.title.text}, range=look.range, row=row, col=1)
        notes += [f"{of}: {words}"] if (words := words_of(panel)) else []
    layout = rows.layout.to_plotly_json()
    layout.pop("template", None)
    return figure(rows.data, notes=notes, height=height * len(panels), **layout)


def words_of(drawn: go.Figure) -> str:
    """The notes of a figure as plain text."""
    return html.unescape((drawn.layout.title.text or "").replace("<br>", " "))


def without_notes(drawn: go.Figure) -> go.Figure:
    """The same figure without its notes, for a page that shows ``words_of`` it as text."""
    text = drawn.layout.title.text or ""
    lines = text.count("<br>") + 1 if text else 0
    return go.Figure(drawn).update_layout(
        title={"text": ""}, margin={"t": _TOP}, height=drawn.layout.height - _LINE * lines
    )


def is_empty(drawn: go.Figure) -> bool:
    """Whether there is nothing to draw; the notes then say why."""
    return not drawn.data


def focused(values: NDArray[np.float64], keep: NDArray[np.bool_], *, maximise: bool) -> list[float] | None:
    """The range of an axis if a few poor values would compress all others into a point; None if there are none.

    The range contains the best nine tenths, everything close to them, and everything marked in ``keep``; values beyond
    its poor end are outside.

    Args:
        values: float64 [n], finite.
        keep: bool [n].
    """
    if not len(values):
        return None
    losses = -values if maximise else values
    best = float(losses.min())
    worst = max(float(np.quantile(losses, _MAX_FOCUSED)), float(losses[keep].max()) if keep.any() else best)
    width = worst - best
    if width <= 0 or float(losses.max()) - best <= _FAR * width:
        return None
    worst = float(losses[losses <= best + _NEAR * width].max())
    ends = best - _EDGE * width, worst + _EDGE * width
    return [-ends[1], -ends[0]] if maximise else list(ends)


def is_outside(values: NDArray[np.float64], bounds: list[float] | None) -> NDArray[np.bool_]:
    """Which values are outside the range of an axis: bool [n]."""
    if bounds is None:
        return np.zeros(len(values), dtype=np.bool_)
    return np.asarray((values < bounds[0]) | (values > bounds[1]))


def outside_note(count: int) -> list[str]:
    """A note about candidates outside the range, if there are any."""
    who = "1 poor candidate lies" if count == 1 else f"{count} poor candidates lie"
    return [f"{who} outside; a double click shows all."] if count else []


def markers(mark: Mark, **changes: Any) -> dict[str, Any]:
    """A mark as plotly's marker settings."""
    outline = {"width": 1.5 if mark.symbol.endswith("open") else 0.5, "color": mark.colour}
    return {"color": mark.colour, "symbol": mark.symbol, "size": mark.size, "line": outline} | changes


def drawn_note(drawn: int, all_: int) -> list[str]:
    """A note about candidates that are not drawn, if there are any."""
    return [] if drawn == all_ else [f"{drawn:,} of {all_:,} candidates are drawn, evenly over the search."]
