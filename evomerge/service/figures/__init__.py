"""Plotly figures of a search, one function each, from its store alone. Notes say what a figure leaves out.

Each works for a search that has just begun, and takes a fraction of a second for 10,000 candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import plotly.graph_objects as go

from evomerge.service.figures import chosen, front, genes, grid, progress, proxy, recipe, team, workers
from evomerge.service.figures.progress import Over
from evomerge.store import Store

__all__ = ["NAMES", "FigureOptions", "Name", "Over", "draw", "draw_path", "draw_recipe"]

Name = Literal[
    "front",
    "grid",
    "history",
    "hypervolume",
    "importance",
    "proxy",
    "slice",
    "parallel",
    "timeline",
    "curse",
    "failures",
    "constraints",
    "team",
    "coverage",
]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class FigureOptions:
    """Options of figures; each figure uses some of them.

    Attributes:
        x, y: the objectives on the axes of the front; by default the first two.
        over: the x axis of the history.
        objective: the objective that the figure is about; by default the first.
        parameter: the parameter of the slice; by default the first.
    """

    x: str | None = None
    y: str | None = None
    over: Over = "candidates"
    objective: str | None = None
    parameter: str | None = None


_DRAWN: Mapping[Name, Callable[[Store, FigureOptions], go.Figure]] = {
    "front": lambda store, options: front.front(store, options.x, options.y),
    "grid": lambda store, options: grid.grid(store, options.objective),
    "history": lambda store, options: progress.history(store, options.over, options.objective),
    "hypervolume": lambda store, options: progress.hypervolume(store),
    "importance": lambda store, options: genes.importance(store, options.objective),
    "proxy": lambda store, options: proxy.proxy(store),
    "slice": lambda store, options: genes.slice_(store, options.parameter, options.objective),
    "parallel": lambda store, options: genes.parallel(store, options.objective),
    "timeline": lambda store, options: workers.timeline(store),
    "curse": lambda store, options: chosen.curse(store),
    "failures": lambda store, options: workers.failures(store),
    "constraints": lambda store, options: chosen.constraints(store),
    "team": lambda store, options: team.team(store),
    "coverage": lambda store, options: team.coverage(store),
}


def draw(store: Store, name: Name, options: FigureOptions | None = None) -> go.Figure:
    """A figure of a search.

    Raises:
        KeyError: ``options`` names an objective or a parameter that the search does not have.
    """
    return _DRAWN[name](store, options or FigureOptions())


def draw_recipe(store: Store, number: int) -> go.Figure:
    """The heat map of a candidate's recipe. Raises InputError: there is no such candidate."""
    return recipe.recipe(store, number)


def draw_path(store: Store, number: int) -> str:
    """The path of a candidate, as SVG. Raises InputError: there is no such candidate."""
    return recipe.path(store, number)
