"""How parameters relate to the score: Optuna's plots of the projected study, in our colours."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.visualization import plot_parallel_coordinate, plot_param_importances, plot_slice
from plotly.colors import sample_colorscale

from evomerge.service.figures.style import BLUE, GREY, MARK_SCALE, figure, safe, texts
from evomerge.service.projection import Projection, projection_of
from evomerge.service.reading import Mask
from evomerge.store import Store
from evomerge.store.record import Measure

MIN = 10
"""The minimum number of candidates for an importance; PED-ANOVA looks at the best tenth."""

_STEADY = 50  # with this many candidates, that tenth has the five that the authors of PED-ANOVA ask for
_MAX_LINES = 100  # in parallel coordinates, half of them the best candidates; more would be illegible
_MAX_TICKED = 7  # axes of parallel coordinates that have room for tick labels
_LETTERS = 28  # the maximum length of a parameter's name on an axis
_LINE = 16  # letters per line if the name is broken into lines
_AXIS, _SIDES = 90, 50  # pixels: the minimum width of an axis of parallel coordinates, and the margins
_ROOM = 1.2  # the range relative to the longest bar, which leaves room for the number after it

optuna.logging.set_verbosity(optuna.logging.WARNING)


def importance(store: Store, objective: str | None = None) -> go.Figure:
    """How much each parameter decides whether a candidate is among the best tenth, by PED-ANOVA.

    Watanabe, Bansal and Hutter, "PED-ANOVA" (IJCAI 2023), as implemented in Optuna.

    Raises:
        KeyError: ``objective`` is not an objective of the search.
    """
    projection = projection_of(store)
    measure = projection.columns.objective(objective)
    if len(projection.numbers) < MIN:
        return _too_few(projection, MIN)
    drawn = plot_param_importances(projection.study(measure), PedAnovaImportanceEvaluator())
    unsteady = [f"Of {len(projection.numbers)} candidates only: it will change."] * (len(projection.numbers) < _STEADY)
    bars = [
        go.Bar(
            x=trace.x, y=[_name(name) for name in trace.y], text=trace.text, orientation="h", textposition="outside",
            cliponaxis=False, marker={"color": BLUE}, hovertext=[safe(name) for name in trace.y], hoverinfo="text+x",
        )
        for trace in drawn.data
    ]  # fmt: skip
    return figure(
        bars,
        notes=[f"For the best tenth in {measure.name} (PED-ANOVA).", *unsteady, *projection.notes],
        xaxis={"title": {"text": "importance"}, "range": [0.0, _ROOM * max(max(bar.x, default=0.0) for bar in bars)]},
        showlegend=False,
    )


def slice_(store: Store, parameter: str | None = None, objective: str | None = None) -> go.Figure:
    """Score by one parameter, with a point per candidate, coloured by age.

    ``parameter`` is a parameter of the space, or a mean of several under the name in the other figures; by default the
    first.

    Raises:
        KeyError: there is no such parameter or objective.
    """
    projection = projection_of(store)
    measure = projection.columns.objective(objective)
    gene = projection.gene(parameter) if parameter is not None else next(iter(projection.genes), None)
    if gene is None or not len(projection.numbers):
        return _too_few(projection, 1)
    drawn = plot_slice(projection.study(measure, [gene]), target_name=measure.name)
    (trace,) = drawn.data
    bar = {"title": {"text": "candidate"}, "thickness": 12, "len": 0.9}
    points = go.Scatter(
        x=trace.x, y=trace.y, mode="markers", customdata=projection.numbers, showlegend=False,
        marker={"color": projection.numbers, "colorscale": MARK_SCALE, "colorbar": bar, "size": 6, "opacity": 0.8},
        hovertext=texts(safe(projection.columns.names[i]) for i in _places(projection)), hoverinfo="text+x+y",
    )  # fmt: skip
    notes = [note for note in projection.notes if note.startswith("From")]
    return figure(
        [points],
        notes=notes,
        xaxis={"title": {"text": safe(gene.name)}},
        yaxis={"title": {"text": safe(measure.name)}},
    )


def parallel(store: Store, objective: str | None = None) -> go.Figure:
    """Parallel coordinates of parameters and score, with a line per candidate, coloured by its score.

    Raises:
        KeyError: ``objective`` is not an objective of the search.
    """
    projection = projection_of(store)
    measure = projection.columns.objective(objective)
    if not len(projection.numbers):
        return _too_few(projection, 1)
    few = _few(projection, measure)
    genes = [replace(gene, name=safe(gene.name)) for gene in few.genes]
    drawn = plot_parallel_coordinate(few.study(measure, genes), target_name=safe(measure.name))
    notes = [note for note in projection.notes if not note.startswith("From")]
    if len(few.numbers) < projection.all:
        half = _MAX_LINES // 2
        notes.insert(0, f"{len(few.numbers)} of {projection.all:,} candidates: the {half} best, and others evenly.")
    notes.append(f"Coloured by {measure.name}.")
    return _restyled(drawn, [measure.name, *sorted((gene.name for gene in few.genes), key=safe)], notes)


def _few(projection: Projection, measure: Measure) -> Projection:
    """The candidates that fit into parallel coordinates: half of them the best, the others spread evenly."""
    if len(projection.numbers) <= _MAX_LINES:
        return projection
    place = next(i for i, o in enumerate(projection.columns.objectives) if o.name == measure.name)
    order = np.argsort(projection.values[:, place] * -measure.sign, kind="stable")
    half = _MAX_LINES // 2
    rest = np.sort(order[half:])
    taken: Mask = np.zeros(len(order), dtype=np.bool_)
    taken[order[:half]] = True
    taken[rest[np.linspace(0, len(rest) - 1, half).round().astype(np.int64)]] = True
    return Projection(
        projection.columns,
        projection.genes,
        projection.numbers[taken],
        projection.genomes[taken],
        projection.values[taken],
        projection.all,
    )


def _restyled(drawn: go.Figure, names: list[str], notes: list[str]) -> go.Figure:
    """Optuna's parallel coordinates without title and background, in a colour scale that is legible in light and dark.

    The lines begin at the objective, scaled to 0 to 1, and go on through ``names``, which Optuna sorts. The last trace
    is the colour bar, which is redundant because the objective has its own axis.
    """
    *lines, bar = drawn.data
    for line in lines:
        (line.line.color,) = sample_colorscale(MARK_SCALE, [min(1.0, max(0.0, float(line.y[0])))])
        line.opacity = 0.7
    bar.marker.showscale = False
    layout: dict[str, Any] = drawn.layout.to_plotly_json()
    if len(drawn.layout.xaxis.tickvals) > _MAX_TICKED:
        layout.pop("annotations", None)  # those of neighbouring axes would overlap; they are shown on hover
    for annotation in layout.get("annotations", ()):
        annotation["font"] = {"color": GREY, "size": 10}
    layout["xaxis"]["ticktext"] = [_lines(name) for name in names]
    layout["xaxis"]["tickangle"] = 0
    layout["margin"] = {"r": _SIDES}  # room for half of the last name
    layout["meta"] = {"least_width": _AXIS * len(names) + _SIDES}
    for key in ("title", "template", "width", "height", "paper_bgcolor", "plot_bgcolor"):
        layout.pop(key, None)
    return figure([*lines, bar], notes=notes, **layout)


def _places(projection: Projection) -> list[int]:
    return list(np.searchsorted(projection.columns.numbers, projection.numbers).tolist())


def _lines(name: str) -> str:
    """A parameter's name in short lines, broken after dots and underscores."""
    lines = [""]
    for part in re.findall(r"[^._]*[._]|[^._]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > _LINE:
            lines.append("")
        lines[-1] += part
    return "<br>".join(safe(line) for line in lines)


def _name(name: str) -> str:
    return safe(name if len(name) <= _LETTERS else "…" + name[1 - _LETTERS :])


def _too_few(projection: Projection, least: int) -> go.Figure:
    if not projection.genes:
        return figure(notes=["The search has no parameters."])
    what = "1 candidate that was" if len(projection.numbers) == 1 else f"{len(projection.numbers)} candidates that were"
    return figure(notes=[f"There are {what} scored on every item and came from the search space; {least} are needed."])
