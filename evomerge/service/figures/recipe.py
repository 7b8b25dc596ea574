"""The recipe of one candidate as a picture: how much each part of the model takes from each source, and its path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from evomerge.blends import shares_of
from evomerge.method import share_parameters
from evomerge.recipes.base import Recipe, read_recipe
from evomerge.recipes.routed import RoutedRecipe
from evomerge.recipes.stack import Blend, Hop, StackRecipe
from evomerge.recipes.stack_text import step_text, value_text
from evomerge.report.experts import uses_of
from evomerge.report.path import path_svg
from evomerge.report.status import depths_of
from evomerge.service.figures.experts import experts
from evomerge.service.figures.style import AREA_SCALE, SIGN_SCALE, figure, safe
from evomerge.store import Store
from evomerge.store.rows import candidate_id

_Part = tuple[str, Blend, Hop | None]
"""The name of a part, its blend, and the hop of the path if it is one."""

_MAX_WRITTEN, _WRITTEN_ROW = 60, 28  # the most cells that have their numbers written in them, and their height
_ROW, _ROOM, _MIN = 15, 130, 240  # heights in pixels: a part, axes and notes, and the minimum of the figure


def recipe(store: Store, number: int) -> go.Figure:
    """A heat map of weights: parts of the model from embedding (bottom) to head, by sources.

    Weights are those that the blend gives to sources, as written in the recipe. A base to which changes are added has
    no weight and no column. Each layer has a row, or two if attention and mlp differ; consecutive layers with the same
    blend share a row. If there are few cells, their numbers are written in them. All numbers of a blend are shown on
    hover. For routed experts, the figure shows how much tokens use each expert, by layer.

    Raises:
        InputError: there is no such candidate.
    """
    recipe = recipe_of(store, number)
    if isinstance(recipe, RoutedRecipe):
        return experts(recipe, uses_of(store, store.candidate(number)))
    if not isinstance(recipe, StackRecipe):
        return figure(notes=["Drawn are layers that are merged. " + line for line in recipe.lines()[:1]])
    names = list(store.search().record.sources)
    used = [name for name in names if any(name in blend.sources for blend in recipe.blends)]
    rows = _runs(list(_parts(recipe)))
    weights = np.array([[share_in(blend, name) for name in used] for _, blend, _ in rows], dtype=np.float64)
    words = [[_words(part, blend, hop, name) for name in used] for part, blend, hop in rows]
    low, high = _bounds(store, recipe)  # the same for all candidates, so that pictures can be compared
    legible = len(rows) * len(used) <= _MAX_WRITTEN
    signs = bool(min(float(np.nanmin(weights)), low) < 0)
    most = max(float(np.nanmax(np.abs(weights))), -low, high)
    cells = go.Heatmap(
        z=weights, x=[safe(name) for name in used], y=[part for part, _, _ in rows], text=words, hoverinfo="text",
        colorscale=SIGN_SCALE if signs else AREA_SCALE, zmin=-most if signs else 0.0, zmax=most, xgap=2, ygap=1,
        texttemplate="%{z:.3f}" if legible else None,
        colorbar={"title": {"text": "weight", "side": "right"}, "thickness": 12},
    )  # fmt: skip
    return figure(
        [cells],
        notes=_notes(recipe),
        height=max(_MIN, _ROOM + (_WRITTEN_ROW if legible else _ROW) * len(rows)),
        xaxis={"type": "category", "side": "bottom", "showgrid": False},
        yaxis={"type": "category", "showgrid": False, "dtick": 1 if len(rows) <= 40 else 2},
    )


def subject_of(recipe: Recipe) -> str:
    """What the picture of a recipe shows, as a sentence without a full stop."""
    if isinstance(recipe, RoutedRecipe):
        return "How much tokens use each expert, layer by layer and task by task"
    return "How much each part of the model takes from each source"


def _bounds(store: Store, recipe: StackRecipe) -> tuple[float, float]:
    """The smallest and largest share that the search space allows for these methods; 0 and 1 if it searches none."""
    names = {name for blend in recipe.blends for name in share_parameters(blend.method)}
    named = [p for p in store.search().record.parameters if names & set(p.name.split("."))]
    return min((float(p.low) for p in named), default=0.0), max((float(p.high) for p in named), default=1.0)


def path(store: Store, number: int) -> str:
    """The path of a candidate as a self-contained SVG. Raises InputError: there is no such candidate."""
    row = store.candidate(number)
    title = f"{store.search().name} {candidate_id(number)} {row.label}".strip()
    return path_svg(recipe_of(store, number), depths_of(store), title)


def recipe_of(store: Store, number: int) -> Recipe:
    """The recipe of a candidate."""
    return read_recipe(store.candidate(number).recipe, store.search().record.sources)


def share_in(blend: Blend, source: str) -> float:
    """How much a blend takes from a source, in the numbers of its method; 0 for the base, NaN for none."""
    if source not in blend.sources:
        return 0.0 if source == blend.base else float("nan")
    return shares_of(blend)[source]


def _parts(recipe: StackRecipe) -> Iterator[_Part]:
    """Every part of the model with its blend, in the order of the forward pass."""
    yield "embedding", recipe.blends[recipe.embedding], None
    for number, hop in enumerate(recipe.hops):
        name = f"layer {number}" if hop.layer == number else f"hop {number}: layer {_layers(hop)}"
        if hop.attention == hop.mlp:
            yield name, recipe.blends[hop.attention], hop
        else:
            yield f"{name} attention", recipe.blends[hop.attention], hop
            yield f"{name} mlp", recipe.blends[hop.mlp], hop
    yield "norm", recipe.blends[recipe.norm], None
    yield "head", recipe.blends[recipe.head], None
    if recipe.seen is not None:
        yield "vision", recipe.seen, None


def _runs(rows: Sequence[_Part]) -> list[_Part]:
    """Merge consecutive layers with the same blend into one row, instead of repeating equal numbers."""
    if all(blend is rows[0][1] and _is_layer(name, hop) for name, blend, hop in rows):
        return [("the whole model", rows[0][1], None)]
    runs: list[list[_Part]] = []
    for row in rows:
        before = runs[-1][-1] if runs else None
        if (
            before is not None
            and before[2]
            and row[2]
            and before[1] is row[1]
            and _is_layer(before[0], before[2])
            and _is_layer(row[0], row[2])
        ):
            runs[-1].append(row)
        else:
            runs.append([row])
    return [run[0] if len(run) == 1 else (f"layers {_place(run[0])} to {_place(run[-1])}", *run[0][1:]) for run in runs]


def _is_layer(name: str, hop: Hop | None) -> bool:
    """Whether a part is a complete, unscaled layer in its usual place, so that runs of such layers can be merged."""
    return hop is None or (name == f"layer {hop.layer}" and hop.scale == 1.0 and hop.norm in (hop.attention, hop.mlp))


def _place(row: _Part) -> str:
    return row[0].removeprefix("layer ")


def _layers(hop: Hop) -> str:
    if isinstance(hop.layer, int):
        return str(hop.layer)
    return ", ".join(f"{layer} of {name}" for name, layer in hop.layer.items())


def _words(part: str, blend: Blend, hop: Hop | None, source: str) -> str:
    numbers = []
    for name, value in blend.parameters.items():
        mine: Any = value.get(source) if isinstance(value, dict) else value
        if mine is not None and mine is not False:
            numbers.append(name if mine is True else f"{name} {value_text(mine)}")
    onto = f" on {blend.base}" if blend.base else ""
    basis = " in core space" if blend.basis == "core" else ""
    lines = [f"{part}, {source}", f"{blend.method}{onto}{basis}", *numbers]
    lines += [f"then {step_text(step)}" for step in blend.steps]
    if hop is not None and hop.scale != 1.0:
        lines.append(f"scale {hop.scale:.4g}")
    return "<br>".join(safe(line) for line in lines)


def _notes(recipe: StackRecipe) -> list[str]:
    notes = []
    bases = dict.fromkeys(blend.base for blend in recipe.blends if blend.base and blend.base not in blend.sources)
    if bases:
        notes.append(f"Weights are of changes, which are added to {' and '.join(bases)}.")
    if recipe.tensors:
        notes.append(f"{len(recipe.tensors)} tensors are made otherwise than their part.")
    if any(hop.norm not in (hop.attention, hop.mlp) for hop in recipe.hops):
        notes.append("Norms of layers have weights of their own, which are not shown.")
    return notes
