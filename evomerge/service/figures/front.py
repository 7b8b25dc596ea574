"""The front of a search, with all other candidates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from evomerge.report.entries import measure_text
from evomerge.service.figures.style import (
    BLUE,
    GREEN,
    MARKS,
    MAX_POINTS,
    drawn_note,
    figure,
    focused,
    is_outside,
    markers,
    outside_note,
    safe,
    texts,
)
from evomerge.service.reading import (
    Columns,
    Mask,
    Values,
    axis_title,
    columns_of,
    confirmed_values,
    thinned,
    value_text,
)
from evomerge.store import Store
from evomerge.store.record import Measure
from evomerge.store.rows import Estimate, candidate_id

_BASELINES = (("sources", "source"), ("uniform average", "average"), ("defaults", "default"), ("fitted", "fit"))
"""The legend names of kinds of baselines, and their origins."""


@dataclass(frozen=True, eq=False)
class _Axis:
    """One axis: values and errors float64 [n]; if it has no measure, the values are candidate numbers."""

    measure: Measure | None
    values: Values
    errors: Values

    @property
    def title(self) -> str:
        if self.measure is None:
            return "candidate"
        return safe(axis_title(self.measure))


def front(store: Store, x: str | None = None, y: str | None = None) -> go.Figure:
    """Candidates by two objectives, ``x`` and ``y`` (by default the first two), or by number and the only objective.

    Each point's ``customdata`` is the candidate's number. Bars are standard errors and drawn for highlighted points
    only; every point shows its own on hover. Held-out scores are stars, joined to the candidate's search score.

    Raises:
        KeyError: ``x`` or ``y`` is not an objective of the search.
    """
    columns = columns_of(store)
    return _Front(store, columns, *_axes(store, columns, x, y)).draw()


def _axes(store: Store, columns: Columns, x: str | None, y: str | None) -> tuple[_Axis, _Axis]:
    def axis(measure: Measure) -> _Axis:
        means, errors, _ = columns.measured(store, measure.name)
        return _Axis(measure, means, errors)

    if len(columns.objectives) == 1:
        numbers = columns.numbers.astype(np.float64)
        return _Axis(None, numbers, np.full(len(numbers), np.nan)), axis(columns.objective(y or x))
    first, second = (columns.objectives[i].name if name is None else name for i, name in enumerate((x, y)))
    return axis(columns.objective(first)), axis(columns.objective(second))


class _Front:
    """Draws the figure group by group."""

    def __init__(self, store: Store, columns: Columns, x: _Axis, y: _Axis) -> None:
        self._store, self._columns, self._x, self._y = store, columns, x, y
        self._known: Mask = np.isfinite(x.values) & np.isfinite(y.values) & columns.own
        wanted = np.ones(len(columns.numbers), dtype=np.bool_)
        for axis in (x, y):
            if axis.measure is not None:
                wanted &= columns.measured(store, axis.measure.name)[2] >= axis.measure.items
        self._whole = self._known & wanted
        self._marked: Mask = columns.on_front | columns.baseline

    def draw(self) -> go.Figure:
        if not self._known.any():
            return figure(notes=["No candidate has been scored yet."])
        plain = self._known & ~self._marked
        shown = thinned(plain, np.zeros_like(plain), MAX_POINTS)
        missing = self._whole & ~self._columns.eligible
        groups = (
            ("estimated, left their race", shown & ~self._whole, {"opacity": 0.45}),
            ("miss a constraint", shown & missing, {"opacity": 0.6}),
            ("candidates", shown & self._whole & ~missing, {"opacity": 0.85}),
        )
        traces = [self._points(name, mask, **style) for name, mask, style in groups if mask.any()]
        traces += self._front_traces()
        for name, origin in _BASELINES:
            if (mask := self._known & self._columns.baseline & self._columns.of_origin(origin)).any():
                traces.append(self._named(name, mask) if origin == "source" else self._marked_points(name, mask))
        traces += self._held_out()
        x, y = self._bounds(self._x), self._bounds(self._y)
        outside = self._known & (is_outside(self._x.values, x) | is_outside(self._y.values, y))
        return figure(
            traces,
            notes=[
                *self._notes(),
                *drawn_note(int(shown.sum()), int(plain.sum())),
                *outside_note(int(outside.sum())),
            ],
            xaxis={"title": {"text": self._x.title}, "range": x},
            yaxis={"title": {"text": self._y.title}, "range": y},
        )

    def _bounds(self, axis: _Axis) -> list[float] | None:
        """The range of an axis without outliers, so that a few poor models do not stretch it; None if all fit."""
        if axis.measure is None:
            return None
        kept = self._columns.on_front & ~self._columns.baseline
        return focused(axis.values[self._known], kept[self._known], maximise=axis.measure.maximise)

    def _notes(self) -> Iterator[str]:
        if len(self._columns.objectives) > 2:
            yield f"The front is that of all {len(self._columns.objectives)} objectives, of which two are drawn."

    def _hover(self, mask: Mask) -> NDArray[np.str_]:
        words = []
        measures = [(m.name, m.items, *self._columns.measured(self._store, m.name)) for m in self._columns.measures]
        for at in np.flatnonzero(mask).tolist():
            lines = [f"<b>{safe(self._columns.names[at])}</b>"]
            for name, wanted, means, errors, items in measures:
                if np.isfinite(means[at]):
                    lines.append(safe(value_text(name, means[at], errors[at], items[at], wanted)))
            words.append("<br>".join(lines))
        return texts(words)

    def _points(self, name: str, mask: Mask, **style: Any) -> go.Scatter:
        return go.Scatter(
            x=self._x.values[mask],
            y=self._y.values[mask],
            mode="markers",
            name=name,
            marker=markers(MARKS[name], **style),
            customdata=self._columns.numbers[mask],
            hovertext=self._hover(mask),
            hoverinfo="text",
        )

    def _marked_points(self, name: str, mask: Mask) -> go.Scatter:
        trace = self._points(name, mask)
        colour = MARKS[name].colour
        trace.error_y = _bars(self._y.errors[mask], colour)
        if self._x.measure is not None:
            trace.error_x = _bars(self._x.errors[mask], colour)
        return trace

    def _named(self, name: str, mask: Mask) -> go.Scatter:
        """Candidates labelled with their names."""
        trace = self._marked_points(name, mask)
        names = [safe(self._columns.labels[at]) for at in np.flatnonzero(mask)]
        return trace.update(
            mode="markers+text", text=names, textposition="top center", textfont={"size": 11}, cliponaxis=False
        )

    def _front_traces(self) -> list[go.Scatter]:
        """The front, with its attainment line if all of the front is visible."""
        mask = self._known & self._columns.on_front
        if not mask.any():
            return []
        if self._x.measure is None:
            return [self._marked_points("best in search", mask)]
        points = self._marked_points("front", mask)
        if len(self._columns.objectives) > 2:
            return [points]
        order = np.argsort(self._x.values[mask], kind="stable")
        # Between two points, the line follows the best y among those that reach this x.
        shape = "vh" if self._x.measure.maximise else "hv"
        line = go.Scatter(
            x=self._x.values[mask][order],
            y=self._y.values[mask][order],
            mode="lines",
            line={"color": BLUE, "width": 1.5, "shape": shape},
            hoverinfo="skip",
            showlegend=False,
        )
        return [line, points]

    def _held_out(self) -> list[go.Scatter]:
        """Held-out scores of the shortlist, and lines from their search scores."""
        names = [axis.measure.name for axis in (self._x, self._y) if axis.measure is not None]
        confirmed = {
            number: values
            for number, values in confirmed_values(self._store, self._columns).items()
            if all(name in values for name in names)
        }
        if not confirmed:
            return []
        at = {number: int(np.searchsorted(self._columns.numbers, number)) for number in confirmed}
        ends = {number: self._at(number, values) for number, values in confirmed.items()}
        joined_x = [v for n, end in ends.items() for v in (float(self._x.values[at[n]]), end[0], None)]
        joined_y = [v for n, end in ends.items() for v in (float(self._y.values[at[n]]), end[1], None)]
        line = {"color": GREEN, "width": 1, "dash": "dot"}
        joins = go.Scatter(
            x=joined_x, y=joined_y, mode="lines", line=line, opacity=0.6, hoverinfo="skip", showlegend=False
        )
        stars = go.Scatter(
            x=[end[0] for end in ends.values()],
            y=[end[1] for end in ends.values()],
            mode="markers",
            name="held out",
            marker=markers(MARKS["held out"]),
            customdata=list(confirmed),
            hovertext=texts(self._held_out_words(n, values) for n, values in confirmed.items()),
            hoverinfo="text",
            error_y=_bars([values[names[-1]].stderr or 0.0 for values in confirmed.values()], GREEN),
        )
        if len(names) == 2:
            stars.error_x = _bars([values[names[0]].stderr or 0.0 for values in confirmed.values()], GREEN)
        return [joins, stars]

    def _at(self, number: int, values: Mapping[str, Estimate]) -> tuple[float, float]:
        x, y = (None if axis.measure is None else values[axis.measure.name].mean for axis in (self._x, self._y))
        return (float(number) if x is None else x), (float(number) if y is None else y)

    def _held_out_words(self, number: int, values: Mapping[str, Estimate]) -> str:
        label = self._columns.labels[int(np.searchsorted(self._columns.numbers, number))]
        name = f"{candidate_id(number)} {label}".strip()
        lines = [f"{measure} {measure_text(v.mean, v.stderr)} on {v.n} held-out items" for measure, v in values.items()]
        return "<br>".join([f"<b>{safe(name)}</b>", *map(safe, lines)])


def _bars(errors: Values | Sequence[float], colour: str) -> dict[str, Any]:
    return {"type": "data", "array": np.nan_to_num(np.asarray(errors)), "color": colour, "thickness": 1, "width": 2}
