"""The experts of a routed candidate as a picture: the layers that they are in, and how much tokens use them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from evomerge.recipes.routed import RoutedRecipe
from evomerge.recipes.use import ExpertUse
from evomerge.report.allocation import columns_of, depth_of, entropy_at, lives, share_at
from evomerge.service.figures.style import AREA_SCALE, figure, safe

_ROW, _ROOM, _MIN = 28, 150, 240  # heights in pixels: a layer, axes and notes, and the minimum of the figure


def experts(recipe: RoutedRecipe, uses: Mapping[str, ExpertUse]) -> go.Figure:
    """A heat map of layers, from the first (bottom) to the last, by experts, with the use by each task beside it.

    A cell is an expert's share of the gate weights of its layer, averaged over tasks. It is empty if the layer does not
    have the expert. If nothing was measured, all experts of a layer have equal shares.
    """
    columns, layers = columns_of(recipe), range(depth_of(recipe))
    shares = np.array([[_share(recipe, uses, layer, n) for n in range(len(columns))] for layer in layers])
    tasks = {task: use.mean_shares for task, use in uses.items() if use.mean_shares}
    z = np.concatenate([shares, *([np.array(list(tasks.values()))] if tasks else [])])
    rows = [*(f"layer {layer}" for layer in layers), *(safe(task) for task in tasks)]
    words = [[_words(recipe, uses, layer, name) for name in columns] for layer in layers]
    words += [[f"{safe(task)}<br>{safe(name)}" for name in columns] for task in tasks]
    cells = go.Heatmap(
        z=z, x=[safe(name) for name in columns], y=rows, text=words, hovertemplate="%{text}<br>%{z:.1%}<extra></extra>",
        hoverongaps=False, colorscale=AREA_SCALE, zmin=0.0, zmax=1.0, xgap=2, ygap=1,
        texttemplate="%{z:.0%}" if z.size <= 200 else None,
        colorbar={"title": {"text": "share", "side": "right"}, "thickness": 12, "tickformat": ".0%"},
    )  # fmt: skip
    return figure(
        [cells],
        notes=_notes(recipe, uses),
        height=max(_MIN, _ROOM + _ROW * len(rows)),
        xaxis={"type": "category", "side": "bottom", "showgrid": False},
        yaxis={"type": "category", "showgrid": False, "dtick": 1 if len(rows) <= 40 else 2},
    )


def _share(recipe: RoutedRecipe, uses: Mapping[str, ExpertUse], layer: int, column: int) -> float:
    columns = columns_of(recipe)
    if not lives(recipe, layer, columns[column]):
        return float("nan")
    share = share_at(uses, layer, column)
    return 1 / sum(lives(recipe, layer, name) for name in columns) if share is None else share


def _words(recipe: RoutedRecipe, uses: Mapping[str, ExpertUse], layer: int, name: str) -> str:
    group = recipe.group_of(layer)
    kept = "all" if group.top_k is None else f"top {group.top_k}"
    gains = f"gain {group.attention_gain:.3g} and {group.mlp_gain:.3g}"
    lines = [f"layer {layer}, {name}", f"{kept}, temperature {group.temperature:.3g}, {gains}"]
    if (entropy := entropy_at(uses, layer)) is not None:
        lines.append(f"a token's entropy over experts {entropy:.2f}")
    return "<br>".join(safe(line) for line in lines)


def _notes(recipe: RoutedRecipe, uses: Mapping[str, ExpertUse]) -> list[str]:
    if not uses:
        return ["Experts have equal shares here where they live: what tokens were given of them is not measured yet."]
    notes = ["Rows of layers are means over tasks, and those of tasks are means over layers."]
    entropies = [number for use in uses.values() for number in use.entropy if number is not None]
    if entropies:
        even = np.log(max(len(columns_of(recipe)), 2))
        mean = sum(entropies) / len(entropies)
        notes.append(f"A token's gates have an entropy of {mean:.2f}; {even:.2f} would be even over all experts.")
    within = [use.variation_within for use in uses.values() if use.variation_within is not None]
    between = [use.variation_between for use in uses.values() if use.variation_between is not None]
    if within and between:
        numbers = f"{sum(within) / len(within):.2f} within the halves of the experts, {sum(between) / len(between):.2f}"
        notes.append(f"Shares vary by {numbers} between them (standard deviation over mean).")
    return notes
