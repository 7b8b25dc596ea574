"""Draw the front of a finished search with two objectives, as in the README.

pip install -c constraints.txt -e '.[docs]'
python scripts/plot_front.py searches/demo docs/front.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from evomerge.report.status import read_status
from evomerge.search.settings.folder import open_store
from evomerge.store import Estimate
from evomerge.store.rows import candidate_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    draw(arguments.search, arguments.out)


def draw(search: Path, out: Path) -> None:
    status = read_status(search)
    x, y = list(status.directions)[:2]
    with open_store(search) as store:
        rows = [row for row in store.candidates() if row.objectives]
    matplotlib.rcParams.update({"svg.hashsalt": "evomerge", "font.size": 10})  # the same bytes for the same search
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(
        [row.objectives[x].mean for row in rows], [row.objectives[y].mean for row in rows],
        s=14, color="0.7", label=f"{len(rows)} candidates",
    )  # fmt: skip
    front = sorted(status.front_entries, key=lambda entry: entry.objectives[x].mean)
    points(axes, [e.objectives for e in front], x, y, "tab:blue", "front, search split", fmt="o-")
    confirmed = {e.id: e.objectives for e in status.confirmed}
    held_out = [dict(confirmed[e.id]) for e in front if e.id in confirmed]
    points(axes, held_out, x, y, "tab:green", "the same, held-out split", fmt="s")
    for baseline in status.confirmed_baselines:
        point = baseline.objectives
        axes.plot(point[x].mean, point[y].mean, "x", color="tab:red", markersize=8)
        axes.annotate(
            baseline.label, (point[x].mean, point[y].mean),
            xytext=(6, -12), textcoords="offset points", color="tab:red", fontsize=8,
        )  # fmt: skip
    axes.plot([], [], "x", color="tab:red", label="sources and baselines, held-out split")
    for pick in (pick for pick in status.picks if pick.split == "held_out"):
        won = pick.objectives
        axes.annotate(
            f"{pick.role} {pick.id}", (won[x].mean, won[y].mean),
            xytext=(-8, 12), textcoords="offset points", ha="right", color="tab:green", weight="bold",
        )  # fmt: skip
    axes.set(xlabel=x, ylabel=y, title=f"{status.name}: {candidate_id(0)} to {candidate_id(len(rows) - 1)}")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", fontsize=8)
    figure.savefig(out, metadata={"Date": None})


def points(
    axes: matplotlib.axes.Axes, values: list[dict[str, Estimate]], x: str, y: str, color: str, label: str, fmt: str
) -> None:
    axes.errorbar(
        [v[x].mean for v in values], [v[y].mean for v in values],
        xerr=[v[x].stderr for v in values], yerr=[v[y].stderr for v in values],
        fmt=fmt, color=color, markersize=5, linewidth=1, elinewidth=0.7, label=label,
    )  # fmt: skip


if __name__ == "__main__":
    main()
