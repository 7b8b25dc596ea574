"""A team of candidates: which items each member solves, and how the coverage grew during the search."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from evomerge.report.team import Team, team_of
from evomerge.service.figures.style import BLUE, GREY, MARKS, ORANGE, figure, markers, safe
from evomerge.store import Store
from evomerge.store.events import TeamChosen

NO_TEAM = "No team is chosen yet."

_ROW, _ROOM = 34, 110  # heights in pixels: a member, axes and notes
_TOGETHER = "at least one"
_TINTS = [[0.0, "rgba(118,118,118,0.16)"], [1.0, BLUE]]  # "not solved" is visible on light and dark backgrounds
_MAX_ITEMS = 1500
"""The maximum number of columns that fit on a screen; of more items, an even selection is drawn."""

Matrix = NDArray[np.float64]


def team(store: Store) -> go.Figure:
    """Members by held-out items: what each of them solves, and what at least one of them solves.

    Items are sorted by objective and then by the members that solve them, so that the items solved by only one member
    are contiguous.
    """
    chosen = team_of(store)
    if chosen is None:
        return figure(notes=[NO_TEAM])
    solved, places = ordered(chosen)
    rows = [*(safe(member.id) for member in chosen.members), _TOGETHER]
    shares = np.vstack([solved, solved.max(axis=0)])
    objectives = _objective_of(chosen)[places]
    words = [[f"{row}, {safe(objectives[x])} item {places[x]}" for x in range(len(places))] for row in rows]
    cells = go.Heatmap(
        z=shares[::-1], y=rows[::-1], text=words[::-1], hovertemplate="%{text}: %{z:.0%}<extra></extra>",
        colorscale=_TINTS, zmin=0.0, zmax=1.0, showscale=False, ygap=3,
    )  # fmt: skip
    starts = [int(np.argmax(objectives == name)) for name in chosen.objectives if name in objectives]
    ends = [*starts[1:], len(places)]
    edges = [{"type": "line", "x0": x - 0.5, "x1": x - 0.5, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": GREY}}
             for x in starts[1:]]  # fmt: skip
    names = [name for name in chosen.objectives if name in objectives]
    return figure(
        [cells],
        notes=_notes(chosen, len(places)),
        height=_ROOM + _ROW * len(rows),
        shapes=edges,
        xaxis={
            "title": {"text": "held-out items"},
            "showgrid": False,
            "tickvals": [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)],
            "ticktext": [safe(name) for name in names],
        },
        yaxis={"type": "category", "showgrid": False},
    )


def ordered(chosen: Team) -> tuple[Matrix, NDArray[np.int64]]:
    """What members solve of the drawn items, in the order of the figure, and which items these are.

    Returns:
        float64 [members, drawn], from 0 to 1, and int64 [drawn], positions among the team's items.
    """
    solved = np.array([[int(letter) for letter in text] for text in chosen.solved], dtype=np.float64) / 9
    order = np.lexsort([*-solved[::-1], np.repeat(np.arange(len(chosen.objectives)), list(chosen.objectives.values()))])
    if len(order) > _MAX_ITEMS:
        order = order[np.linspace(0, len(order) - 1, _MAX_ITEMS).round().astype(np.int64)]
    return solved[:, order], order


def _objective_of(chosen: Team) -> NDArray[np.str_]:
    """The objective of each item."""
    return np.repeat(list(chosen.objectives), list(chosen.objectives.values()))


def _notes(chosen: Team, drawn: int) -> list[str]:
    best = max(member.mean for member in chosen.members)
    notes = [f"Together {chosen.coverage:.1%} of the items, the best member alone {best:.1%}."]
    if drawn < chosen.items:
        notes.append(f"{drawn:,} of {chosen.items:,} items are drawn, evenly over all.")
    return notes


def coverage(store: Store) -> go.Figure:
    """The coverage of the best team of the same size during the search, compared with the best candidate."""
    events = store.events(kinds=("team",), newest=1)
    chosen = events[0].read(TeamChosen) if events else None
    if chosen is None or not chosen.curve:
        return figure(notes=[NO_TEAM])
    candidates, covered, best = (list(column) for column in zip(*chosen.curve, strict=True))
    lines = [
        go.Scatter(
            x=candidates, y=values, name=name, mode="lines+markers", line={"color": colour, "shape": "hv"},
            marker=markers(MARKS["candidates"], color=colour),
            hovertemplate=f"{name}: %{{y:.1%}} of %{{x}} candidates<extra></extra>",
        )
        for name, values, colour in (
            (f"a team of {len(chosen.candidates)}", covered, BLUE),
            ("the best candidate", best, ORANGE),
        )
    ]  # fmt: skip
    return figure(
        lines,
        notes=["By the items of the search, by which the team was chosen: partly luck."],
        xaxis={"title": {"text": "candidates scored"}},
        yaxis={"title": {"text": "items solved"}, "tickformat": ".0%"},
    )
