"""The gradient of the proxy, the likelihood of right answers, with a cell for each number of the search space."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from evomerge.service.figures.style import SIGN_SCALE, figure, safe
from evomerge.store import Store
from evomerge.store.events import Descent


def proxy(store: Store) -> go.Figure:
    """The initial direction of the latest descent, by part of the model and by number.

    A cell is the negative derivative of the proxy times the range of its number, relative to the largest one.
    """
    events = store.events(kinds=("descent",), newest=1)
    if not events:
        return figure(notes=["No gradient of the proxy is known yet."])
    descent, parameters = events[0].read(Descent), store.search().record.parameters
    groups, names = list(dict.fromkeys(p.group for p in parameters)), dict[str, None]()
    cells: dict[tuple[str, str], float] = {}
    for parameter, slope in zip(parameters, descent.gradient, strict=True):
        if slope is not None:
            name = parameter.name.removeprefix(f"{parameter.group}.")
            names[name] = None
            cells[parameter.group, name] = -slope * (parameter.high - parameter.low)
    most = max(map(abs, cells.values()), default=0.0) or 1.0
    values = np.array([[cells.get((group, name), np.nan) / most for name in names] for group in groups])
    words = [[_words(group, name, cells.get((group, name), np.nan) / most) for name in names] for group in groups]
    heat = go.Heatmap(
        x=[safe(name) for name in names], y=[safe(group) for group in groups], z=values, hovertext=words,
        hoverinfo="text", hoverongaps=False, colorscale=SIGN_SCALE, zmin=-1.0, zmax=1.0, xgap=1, ygap=1,
        colorbar={"title": {"text": "less to more"}, "thickness": 12, "len": 0.9},
    )  # fmt: skip
    before, after = descent.proxy
    return figure(
        [heat],
        notes=[f"By the gradient of step {descent.step}; the proxy was {before:.3g}, and {after:.3g} at its end."],
        xaxis={"showgrid": False},
        yaxis={"showgrid": False, "autorange": "reversed"},
    )


def _words(group: str, name: str, share: float) -> str:
    way = "more" if share > 0 else "less"
    return f"<b>{safe(group)}</b><br>{safe(name)}: {way}, {abs(share):.0%} of the largest"
