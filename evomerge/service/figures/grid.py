"""The niches of a search with features: a cell for each, coloured by the best score in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from evomerge.report.entries import FeatureRange, features_of
from evomerge.service.figures.style import AREA_SCALE, figure, safe
from evomerge.service.reading import Columns, Values, axis_title, columns_of, value_text
from evomerge.store import Store


def grid(store: Store, objective: str | None = None) -> go.Figure:
    """The best elite of each cell by its score, with the first two features as axes.

    If there are more features, a cell shows the best of all its niches. Each cell's ``customdata`` is the candidate's
    number.

    Raises:
        KeyError: ``objective`` is not an objective of the search.
    """
    columns, features = columns_of(store), features_of(store.search().record)
    measure = columns.objective(objective)
    if not features:
        return figure(notes=["The search has no features."])
    means, errors, items = columns.measured(store, measure.name)
    elites = np.flatnonzero(columns.elite & np.isfinite(means))
    if not len(elites):
        return figure(notes=["No candidate has been scored yet."])
    across, along = _shown(features)
    best: dict[tuple[int, int], int] = {}
    for at in sorted(elites.tolist(), key=lambda at: means[at], reverse=not measure.maximise):
        niche = columns.niches[at]
        best[niche[0], niche[1] if len(features) > 1 else 0] = at  # the best comes last and wins
    scores, numbers = np.full((2, len(along[1]), len(across[1])), np.nan)
    words = np.full(scores.shape, "", dtype=object)
    for (x, y), at in best.items():
        scores[y, x], numbers[y, x] = means[at], columns.numbers[at]
        text = value_text(measure.name, means[at], errors[at], items[at], measure.items)
        words[y, x] = f"<b>{safe(columns.names[at])}</b><br>{safe(text)}"
    cells = go.Heatmap(
        x=across[1], y=along[1], z=scores, customdata=numbers, hovertext=words, hoverinfo="text", hoverongaps=False,
        colorscale=AREA_SCALE, reversescale=not measure.maximise, xgap=1, ygap=1,
        colorbar={"title": {"text": safe(axis_title(measure))}, "thickness": 12, "len": 0.9},
    )  # fmt: skip
    occupied = len({tuple(columns.niches[at]) for at in elites.tolist()})
    bins = int(np.prod([feature.bins for feature in features.values()]))
    notes = [f"{occupied} of {bins:,} niches have a candidate."]
    if len(features) > 2:
        notes.append(f"The first two of {len(features)} features are drawn; a cell is the best of all niches there.")
    notes += _beyond(store, columns, features)
    axis: Mapping[str, Any] = {"showgrid": False}
    return figure(
        [cells],
        notes=notes,
        xaxis={"title": {"text": safe(across[0])}, **axis},
        yaxis={"title": {"text": safe(along[0])}, "showticklabels": len(features) > 1, **axis},
    )


def _beyond(store: Store, columns: Columns, features: Mapping[str, FeatureRange]) -> list[str]:
    """Notes about values outside the range of a feature, which are in its first or last bin."""
    notes = []
    for name, feature in features.items():
        values, _, _ = columns.measured(store, name)
        known = values[np.isfinite(values)]
        beyond = int(((known < feature.low) | (known > feature.high)).sum())
        if beyond:
            notes.append(f"{beyond:,} of {len(known):,} candidates lie beyond the range of {name}, in its end bins.")
    return notes


def _shown(features: Mapping[str, FeatureRange]) -> list[tuple[str, Values]]:
    """The titles and bin centres of both axes; with a single feature, the second axis has one bin."""
    axes = [
        (name, feature.low + (np.arange(feature.bins, dtype=np.float64) + 0.5) * feature.width)
        for name, feature in features.items()
    ]
    return [*axes, ("", np.zeros(1))][:2]
