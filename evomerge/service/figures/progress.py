"""The progress of a search: the best so far, and the volume that its front covers."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from evomerge.front import hypervolume as volume_of
from evomerge.front import nondominated
from evomerge.service.figures.style import (
    BLUE,
    MARKS,
    MAX_POINTS,
    ORANGE,
    PURPLE,
    drawn_note,
    figure,
    focused,
    is_empty,
    is_outside,
    markers,
    outside_note,
    safe,
    stacked,
    texts,
)
from evomerge.service.reading import Columns, Mask, Values, axis_title, columns_of, number_text, thinned, value_text
from evomerge.store import Store
from evomerge.store.record import Number
from evomerge.store.rows import candidate_id

Over = Literal["candidates", "hours"]

_PANEL = 260  # height in pixels of one of several plots


def history(store: Store, over: Over = "candidates", objective: str | None = None) -> go.Figure:
    """The best eligible candidate so far, with the best source and the uniform average: a plot for each number that
    decides, one below the other.

    Args:
        over: candidates in the order asked, or hours since the search began, including pauses, in the order finished.
        objective: the only objective to show.

    Raises:
        KeyError: ``objective`` is not an objective of the search.
    """
    columns = columns_of(store)
    measures = columns.numbers_that_decide if objective is None else [columns.objective(objective)]
    panels = {measure.name: _history(store, columns, measure, over) for measure in measures}
    if len(panels) > 1 and not any(map(is_empty, panels.values())):
        return stacked(panels, _PANEL)
    return next(iter(panels.values()))


def _history(store: Store, columns: Columns, measure: Number, over: Over) -> go.Figure:
    """The best so far in one measure."""
    means, errors, items = columns.measured(store, measure.name)
    where = columns.numbers.astype(np.float64) if over == "candidates" else columns.hours()
    known: Mask = columns.eligible & np.isfinite(means) & np.isfinite(where)
    if not known.any():
        return figure(notes=["No candidate that may win has been scored yet."])
    order = np.flatnonzero(known)[np.argsort(where[known], kind="stable")]
    best = running_best(means[order], maximise=measure.maximise)
    steps = np.flatnonzero(np.r_[True, best[1:] != best[:-1]])
    end = float(where[order][-1])
    own = known & columns.own
    shown = thinned(own, columns.baseline, MAX_POINTS)
    traces = [
        _dots(columns, shown & ~columns.baseline, where, means, errors, items, measure),
        *_baseline_lines(columns, means, errors, measure, end),
        _best_line(columns, order, steps, where, best, errors, end, measure.name),
    ]
    bounds = focused(means[own], (columns.baseline & _is_best_source(columns, means, measure))[own],
                     maximise=measure.maximise)  # fmt: skip
    axis = "candidate" if over == "candidates" else "hours since the start, pauses included"
    return figure(
        traces,
        notes=[
            *drawn_note(int(shown.sum()), int(own.sum())),
            *outside_note(int(is_outside(means[own], bounds).sum())),
        ],
        xaxis={"title": {"text": axis}},
        yaxis={"title": {"text": safe(axis_title(measure))}, "range": bounds},
    )


def _is_best_source(columns: Columns, means: Values, measure: Number) -> Mask:
    """A mask of the source that is best in a measure, with which the others are compared."""
    marks: Mask = np.zeros(len(means), dtype=np.bool_)
    sources = np.flatnonzero(columns.baseline & columns.of_origin("source") & np.isfinite(means))
    if len(sources):
        marks[sources[np.argmax(means[sources]) if measure.maximise else np.argmin(means[sources])]] = True
    return marks


def running_best(means: Values, *, maximise: bool) -> Values:
    """The best of the first i values, for each i: float64 [n]."""
    return np.asarray(np.maximum.accumulate(means) if maximise else np.minimum.accumulate(means))


def _dots(
    columns: Columns, mask: Mask, where: Values, means: Values, errors: Values, items: Any, measure: Number
) -> go.Scatter:
    words = [
        f"<b>{safe(columns.names[i])}</b><br>"
        + safe(value_text(measure.name, means[i], errors[i], items[i], measure.items))
        for i in np.flatnonzero(mask).tolist()
    ]
    return go.Scatter(
        x=where[mask], y=means[mask], mode="markers", name="candidates", customdata=columns.numbers[mask],
        marker=markers(MARKS["candidates"], opacity=0.5), hovertext=texts(words), hoverinfo="text",
    )  # fmt: skip


def _best_line(
    columns: Columns, order: Any, steps: Any, where: Values, best: Values, errors: Values, end: float, name: str
) -> go.Scatter:
    """The line of the best so far, which changes at ``steps``, up to the last candidate."""
    at = order[steps]
    words = [
        f"<b>best so far: {safe(columns.names[i])}</b><br>"
        f"{number_text(name, value, errors[i])}; chosen for it, so partly luck"
        for i, value in zip(at.tolist(), best[steps].tolist(), strict=True)
    ]
    return go.Scatter(
        x=np.append(where[at], end), y=np.append(best[steps], best[-1]), mode="lines+markers", name="best so far",
        line={"color": BLUE, "width": 2.5, "shape": "hv"}, marker={"size": [6] * len(at) + [0], "color": BLUE},
        customdata=np.append(columns.numbers[at], columns.numbers[at[-1]]), hovertext=texts([*words, words[-1]]),
        hoverinfo="text",
    )  # fmt: skip


def _baseline_lines(columns: Columns, means: Values, errors: Values, measure: Number, end: float) -> list[go.Scatter]:
    """The best source with its error as a band, and the uniform average, even if they violate constraints."""
    known = columns.baseline & np.isfinite(means)
    traces = []
    for at in np.flatnonzero(_is_best_source(columns, means, measure)).tolist():
        mean, error = means[at], np.nan_to_num(errors[at])
        band = {"x": [0.0, end, end, 0.0], "y": [mean - error, mean - error, mean + error, mean + error]}
        look = {"fill": "toself", "fillcolor": ORANGE, "opacity": 0.18, "line": {"width": 0}, "mode": "lines"}
        traces.append(go.Scatter(**band, **look, hoverinfo="skip", showlegend=False))
        name = f"best source: {columns.labels[at]}"
        traces.append(
            _level(
                name, mean, end, ORANGE, "dash", f"{columns.names[at]} {number_text(measure.name, mean, errors[at])}"
            )
        )
    for at in np.flatnonzero(known & columns.of_origin("average")).tolist():
        words = f"{columns.names[at]} {number_text(measure.name, means[at], errors[at])}"
        traces.append(_level(columns.labels[at], means[at], end, PURPLE, "dot", words))
    return traces


def _level(name: str, value: float, end: float, colour: str, dash: str, words: str) -> go.Scatter:
    line = {"color": colour, "width": 2, "dash": dash}
    ends = {"x": [0.0, end], "y": [value, value]}
    return go.Scatter(**ends, mode="lines", name=safe(name), line=line, hovertext=safe(words), hoverinfo="text")


# ---- hypervolume -----------------------------------------------------------------------------------------------------


def hypervolume(store: Store) -> go.Figure:
    """The hypervolume between the front and a reference point: the worst of the baselines in each objective."""
    columns = columns_of(store)
    if len(columns.objectives) == 1:
        return figure(notes=["There is one objective: the best so far says it all."])
    losses = _losses(store, columns)
    known = columns.eligible & columns.own & np.isfinite(losses).all(axis=1)
    if not known.any():
        return figure(notes=["No candidate that may win has been scored yet."])
    reference = reference_of(losses, known, columns.baseline)
    at, volumes = growth(losses, known, reference)
    signs = [-o.sign for o in columns.objectives]
    place = ", ".join(
        f"{o.name} {sign * value:.3f}" for o, sign, value in zip(columns.objectives, signs, reference, strict=True)
    )
    last = int(np.flatnonzero(known)[-1])
    words = [f"<b>{candidate_id(int(columns.numbers[i]))}</b><br>{v:.5g}" for i, v in zip(at, volumes, strict=True)]
    line = go.Scatter(
        x=np.append(columns.numbers[at], columns.numbers[last]), y=np.append(volumes, volumes[-1]),
        mode="lines+markers", line={"color": BLUE, "width": 2.5, "shape": "hv"},
        marker={"size": [6] * len(at) + [0], "color": BLUE},
        customdata=np.append(columns.numbers[at], columns.numbers[at[-1]]), hovertext=texts([*words, words[-1]]),
        hoverinfo="text", showlegend=False,
    )  # fmt: skip
    return figure(
        [line],
        notes=[f"Volume beyond {place}, the worst of the baselines in each objective."],
        xaxis={"title": {"text": "candidate"}},
        yaxis={"title": {"text": "hypervolume"}, "rangemode": "tozero"},
    )


def _losses(store: Store, columns: Columns) -> Values:
    """All objectives with signs such that lower is better: float64 [n, objectives]."""
    losses = [-o.sign * columns.measured(store, o.name)[0] for o in columns.objectives]
    return np.stack(losses, axis=1)


def reference_of(losses: Values, known: Mask, baseline: Mask) -> Values:
    """The worst of the baselines in each objective, float64 [m]; if no baseline is known, the worst of all."""
    marks = known & baseline
    return np.asarray(losses[marks if marks.any() else known].max(axis=0))


def growth(losses: Values, known: Mask, reference: Values) -> tuple[list[int], list[float]]:
    """The positions at which the hypervolume of the known rows grows, and its values there."""
    front = np.empty((0, losses.shape[1]))
    at: list[int] = []
    volumes: list[float] = []
    for row in np.flatnonzero(known).tolist():
        point = losses[row]
        if len(front) and (front <= point).all(axis=1).any():
            continue
        front = np.vstack([front, point])
        front = front[nondominated(front)]
        volume = volume_of(front, reference)
        if not volumes or volume > volumes[-1]:
            at.append(row)
            volumes.append(volume)
    return at, volumes
