"""Figures of a search, one function each, from its store alone: plotly figures that say in words what they leave out.

Each works on a search that has just begun, and answers in a fraction of a second after 10,000 candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import plotly.graph_objects as go

from evomerge.service.figures import chosen, front, genes, grid, progress, proxy, recipe, team, workers
from evomerge.service.figures.progress import Over
from evomerge.store import Store

__all__ = ["NAMES", "Name", "Over", "Wish", "draw", "draw_path", "draw_recipe"]

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
class Wish:
    """What a figure is to show, where it has a choice.

    Attributes:
        x, y: objectives of the front; the first two by default.
        over: what the history goes by.
        objective: which one it is about; the first by default.
        parameter: of the slice; the first by default.
    """

    x: str | None = None
    y: str | None = None
    over: Over = "candidates"
    objective: str | None = None
    parameter: str | None = None


_DRAWN: Mapping[Name, Callable[[Store, Wish], go.Figure]] = {
    "front": lambda store, wish: front.front(store, wish.x, wish.y),
    "grid": lambda store, wish: grid.grid(store, wish.objective),
    "history": lambda store, wish: progress.history(store, wish.over, wish.objective),
    "hypervolume": lambda store, wish: progress.hypervolume(store),
    "importance": lambda store, wish: genes.importance(store, wish.objective),
    "proxy": lambda store, wish: proxy.proxy(store),
    "slice": lambda store, wish: genes.slice_(store, wish.parameter, wish.objective),
    "parallel": lambda store, wish: genes.parallel(store, wish.objective),
    "timeline": lambda store, wish: workers.timeline(store),
    "curse": lambda store, wish: chosen.curse(store),
    "failures": lambda store, wish: workers.failures(store),
    "constraints": lambda store, wish: chosen.constraints(store),
    "team": lambda store, wish: team.team(store),
    "coverage": lambda store, wish: team.coverage(store),
}


def draw(store: Store, name: Name, wish: Wish | None = None) -> go.Figure:
    """A figure of a search.

    Raises:
        KeyError: the wish names an objective or a parameter that the search has not.
    """
    return _DRAWN[name](store, wish or Wish())


def draw_recipe(store: Store, number: int) -> go.Figure:
    """The heat map of a candidate's recipe. Raises InputError: there is no such candidate."""
    return recipe.recipe(store, number)


def draw_path(store: Store, number: int) -> str:
    """The path of a candidate, as SVG. Raises InputError: there is no such candidate."""
    return recipe.path(store, number)
