"""How chosen candidates turn out: search scores against held-out scores, and constraints."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from evomerge.report.curse import Curse, SplitScores, curse_of, curse_text
from evomerge.report.entries import constraints_of, measure_text
from evomerge.service.figures.style import (
    BLUE,
    GREEN,
    GREY,
    MAX_POINTS,
    ORANGE,
    PINK,
    Mark,
    drawn_note,
    figure,
    markers,
    safe,
    stacked,
    texts,
)
from evomerge.service.reading import columns_of, thinned, value_text
from evomerge.store import Store
from evomerge.store.rows import number_of

_PANEL = 340  # height in pixels of one of several plots

_CONFIRMED = Mark(BLUE, "circle", 8)
_DRAWN = Mark(BLUE, "circle-open", 8)
_BASELINE = Mark(ORANGE, "diamond", 9)
_WINNER = Mark(GREEN, "star", 15)
_KEPT, _MISSED = Mark(BLUE, "circle", 5), Mark(PINK, "x-thin-open", 7)


def curse(store: Store) -> go.Figure:
    """Search score against held-out score of all candidates that have both, one plot for each number that decides.

    A candidate on the diagonal is as good as it looked. Bars are standard errors.
    """
    panels = {curse.objective: _curse(curse) for curse in curse_of(store).all if curse.points}
    if not panels:
        return figure(notes=["No candidate has held-out scores yet."])
    return stacked(panels, _PANEL) if len(panels) > 1 else next(iter(panels.values()))


def _curse(curse: Curse) -> go.Figure:
    """The plot of one number."""
    groups = (
        ("shortlist", _CONFIRMED, [p for p in curse.candidates if p.confirmed and not p.winner]),
        ("drawn only", _DRAWN, [p for p in curse.candidates if not p.confirmed and not p.winner]),
        ("baselines", _BASELINE, [p for p in curse.baselines if not p.winner]),
        ("winner", _WINNER, [p for p in curse.points if p.winner]),
    )
    traces = [*_lines(curse), *(_points(name, mark, points) for name, mark, points in groups if points)]
    title = f"{curse.objective} {'↑' if curse.maximise else '↓'}"
    return figure(
        traces,
        notes=curse_text(curse),
        height=400,
        xaxis={"title": {"text": safe(f"{title} on search items")}},
        yaxis={"title": {"text": "on held-out items"}},
    )


def _lines(curse: Curse) -> list[go.Scatter]:
    """The diagonal, and the regression over the candidates that the search found."""
    means = [value.mean for point in curse.points for value in (point.search, point.held_out)]
    ends = [min(means), max(means)]
    look = {"color": GREY, "width": 1.2, "dash": "dash"}
    lines = [go.Scatter(x=ends, y=ends, mode="lines", name="as good as it looked", line=look, hoverinfo="skip")]
    if curse.slope is not None:
        x, y = (
            [value.mean for value in side]
            for side in zip(*((p.search, p.held_out) for p in curse.candidates), strict=True)
        )
        at = [min(x), max(x)]
        heights = [float(np.mean(y) + curse.slope * (end - np.mean(x))) for end in at]
        look = {"color": BLUE, "width": 2}
        lines.append(go.Scatter(x=at, y=heights, mode="lines", name="regression", line=look, hoverinfo="skip"))
    return lines


def _points(name: str, mark: Mark, points: list[SplitScores]) -> go.Scatter:
    thin = {"type": "data", "color": mark.colour, "thickness": 1, "width": 0}
    return go.Scatter(
        x=[p.search.mean for p in points],
        y=[p.held_out.mean for p in points],
        error_x={**thin, "array": [p.search.stderr or 0.0 for p in points]},
        error_y={**thin, "array": [p.held_out.stderr or 0.0 for p in points]},
        mode="markers",
        name=name,
        marker=markers(mark),
        customdata=[number_of(p.id) for p in points],
        hovertext=texts(map(_words, points)),
        hoverinfo="text",
    )


def _words(point: SplitScores) -> str:
    name = f"{point.id} {point.label}".strip()
    splits = (("search", point.search), ("held out", point.held_out))
    return "<br>".join(
        [f"<b>{safe(name)}</b>", *(f"{s} {measure_text(v.mean, v.stderr)} (n {v.n})" for s, v in splits)]
    )


def constraints(store: Store) -> go.Figure:
    """Each constraint over the candidates, with its threshold; candidates that violate it have another shape."""
    columns = columns_of(store)
    limits = constraints_of(columns.search.record)
    if not limits:
        return figure(notes=["The search has no constraints."])
    rows = make_subplots(rows=len(limits), shared_xaxes=True)
    wanted = {m.name: m.items for m in columns.measures}
    drawn, all_ = 0, 0
    for row, (name, limit) in enumerate(limits.items(), start=1):
        means, errors, items = columns.measured(store, name)
        known = np.isfinite(means) & columns.own
        shown = thinned(known, columns.baseline | columns.on_front, MAX_POINTS)
        drawn, all_ = max(drawn, int(shown.sum())), max(all_, int(known.sum()))
        kept = means >= limit.threshold if limit.at_least else means <= limit.threshold
        for title, mark, mask in (("kept", _KEPT, shown & kept), ("missed", _MISSED, shown & ~kept)):
            words = [
                f"<b>{safe(columns.names[i])}</b><br>"
                + safe(value_text(name, means[i], errors[i], items[i], wanted[name]))
                for i in np.flatnonzero(mask).tolist()
            ]
            points = go.Scatter(
                x=columns.numbers[mask], y=means[mask], mode="markers", name=title, legendgroup=title,
                showlegend=row == 1, marker=markers(mark, opacity=0.7), customdata=columns.numbers[mask],
                hovertext=texts(words), hoverinfo="text",
            )  # fmt: skip
            rows.add_trace(points, row=row, col=1)
        rows.update_yaxes(title={"text": safe(f"{name} {limit.text}")}, row=row, col=1)
        rows.add_hline(y=limit.threshold, line={"color": ORANGE, "width": 2, "dash": "dash"}, row=row, col=1)
    if not all_:
        return figure(notes=["No candidate has been scored yet."])
    layout = rows.layout.to_plotly_json()
    layout.pop("template", None)
    layout["height"] = 130 + 200 * len(limits)
    layout[f"xaxis{len(limits) if len(limits) > 1 else ''}"]["title"] = {"text": "candidate"}
    return figure(rows.data, notes=drawn_note(drawn, all_), **layout)
