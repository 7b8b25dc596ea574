"""The pages of searches: all of them, and one with everything that is known of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel

from evomerge.report.entries import Entry
from evomerge.report.screen import choice_text, gain_text, thrift_lines
from evomerge.report.status import SearchStatus
from evomerge.service.api.candidates import candidates
from evomerge.service.api.searches import show, summaries_of
from evomerge.service.app import DriversDependency, RootDependency
from evomerge.service.bodies import SearchSummary
from evomerge.service.pages.rendering import api_url, gain_over_source, page, shell_place, signed
from evomerge.service.report import report_html
from evomerge.service.root import Root
from evomerge.service.summary import summary_of
from evomerge.store import Store, summaries

router = APIRouter(include_in_schema=False)

MOST_ON_FRONT = 12
"""Rows of the front beside the landmarks; the table of candidates has them all."""

MOST_FAILURES = 25
"""Failed candidates that the page lists, the latest."""

PAGE_ROWS = 25
"""Candidates on a page of their table."""

_MEANINGS = {
    "pause": ("Pause", "What runs finishes, nothing new begins. The driver waits and keeps its workers."),
    "resume": ("Resume", "Goes on where it was, with the same candidates, bit for bit."),
    "stop": ("Stop", "What runs finishes, then the driver ends. It can be resumed."),
    "cancel": ("Cancel", "Ends at once and throws away what runs. It can be resumed."),
}


@dataclass(frozen=True)
class Row:
    """A line of a table of scores: a candidate with what it is, and its gain over the best source where known."""

    entry: Entry
    marks: list[str]
    landmark: bool
    gain: str = ""


@dataclass(frozen=True)
class Choice:
    """A candidate that can be picked, by what it is called and known for."""

    number: int
    id: str
    text: str


@dataclass(frozen=True)
class Failed:
    """A failed candidate: what it said, and where its log is."""

    number: int
    failure: dict[str, Any]
    attempts: int
    worker: str
    log: str


class Filter(BaseModel):
    """What the table of candidates shows. Empty texts, as forms send them, ask for nothing."""

    status: Literal["", "asked", "running", "done", "eliminated", "failed", "cached"] = ""
    origin: str = ""
    sort: str = "number"
    order: Literal["asc", "desc"] = "desc"
    front: bool = False
    cursor: str | None = None


@router.get("/")
def searches(request: Request, root: RootDependency, drivers: DriversDependency) -> HTMLResponse:
    """Every search: where it stands and what it found."""
    found = list(summaries_of(root, drivers))
    return page(
        request, "index.html", here="searches", searches=found, folder=shell_place(root.folder), gain=gain_words
    )  # fmt: skip


@router.get("/searches/{name}")
def search(
    request: Request, root: RootDependency, drivers: DriversDependency, name: str, query: Annotated[Filter, Query()]
) -> HTMLResponse:
    """One search: scores, front, progress, failures, candidates."""
    status = show(name, root, drivers)
    with root.store(name) as store:
        found, seq = store.search(), summaries.last_event(store)
        summary = summary_of(store, drivers.look(name, store))
        failures, origins = _failures(store, name), dict.fromkeys(summaries.columns(store, ["origin"])["origin"])
    table = candidates(
        name, root, status=[query.status] if query.status else None, origin=query.origin or None, sort=query.sort,
        order=query.order, front=query.front, limit=PAGE_ROWS, cursor=query.cursor,
    )  # fmt: skip
    return page(
        request, "search.html", here="", status=status, summary=summary, query=query, seq=seq, verbs=_verbs(summary),
        measures=[*status.directions, *status.constraints], rows=list(_rows(status)), thrift=thrift_lines(status),
        choices=choices(status), confirmed=list(_confirmed(status)), choice=choice_text(status), failures=failures,
        parameters=[each["name"] for each in found.fingerprints["parameters"]], origins=origins, page=table,
        patience=found.settings["budget"].get("patience"), place=shell_place(place(root, name)),
    )  # fmt: skip


@router.get("/searches/{name}/report.html")
def report(root: RootDependency, name: str) -> Response:
    """The search as one file, to be saved: it holds scripts of its own, which this site's pages may not."""
    with root.store(name) as store:
        html = report_html(store, place(root, name))
    file = quote(f"{name}-report.html")
    return Response(
        html, media_type="text/html", headers={"content-disposition": f"attachment; filename*=UTF-8''{file}"}
    )


def gain_words(summary: SearchSummary) -> str:
    """How the best is to the best source: 0.240 better."""
    gain = gain_over_source(summary)
    if gain is None:
        return ""
    return "as good" if gain == 0 else f"{signed(abs(gain))[1:]} {'better' if gain > 0 else 'worse'}"


def choices(status: SearchStatus) -> list[Choice]:
    """The candidates that people pick most: best, front and landmarks."""
    best = status.best.id if status.best else ""
    front = {
        each.id: each for each in [*status.front_entries, *([status.best] if status.best else []), *status.baselines]
    }
    found = []
    for name, each in front.items():
        what = [each.label] if each.label else []
        what += ["best"] * (name == best) + ["winner"] * (name == status.winner) + ["front"] * (name in status.front)
        found.append(Choice(int(name.removeprefix("c")), name, f"{name} {', '.join(what)}".strip()))
    return sorted(found, key=lambda choice: (choice.id != best, choice.number))


def place(root: Root, name: str) -> Path:
    """The folder of a search, which commands name."""
    return root.folder / name


def _verbs(summary: SearchSummary) -> list[tuple[str, str, str]]:
    """What can be done with a search now: verb, word on the button, what it means."""
    if summary.state == "starting":
        return []
    if not summary.driver:
        wanted = ["resume"]
    else:
        wanted = ["resume" if summary.state == "paused" else "pause", "stop", "cancel"]
    return [(verb, *_MEANINGS[verb]) for verb in wanted]


def _rows(status: SearchStatus) -> Iterator[Row]:
    """Landmarks, then the front by the first objective."""
    best, front = status.best.id if status.best else "", set(status.front)
    first = next(iter(status.directions))
    known = {each.id for each in status.baselines}
    for each in status.baselines:
        yield Row(each, _marks(each, best, front), landmark=True)
    others = [each for each in status.front_entries if each.id not in known and first in each.objectives]
    others.sort(key=lambda each: each.objectives[first].mean, reverse=status.directions[first] == "maximize")
    if status.best is not None and status.best.id not in known | {each.id for each in others}:
        others.insert(0, status.best)
    for each in others[:MOST_ON_FRONT]:
        yield Row(each, _marks(each, best, front), landmark=False)


def _marks(shown: Entry, best: str, front: set[str]) -> list[str]:
    return [*([shown.label] if shown.label else []), *["best"] * (shown.id == best), *["front"] * (shown.id in front)]


def _confirmed(status: SearchStatus) -> Iterator[Row]:
    """The held-out split: landmarks, then the shortlist, the best first."""
    first = next(iter(status.directions))
    for each in status.confirmed_baselines:
        yield Row(each, [each.label, *["winner"] * (each.id == status.winner)], landmark=True)
    up = status.directions[first] == "maximize"
    for found in sorted(status.confirmed, key=lambda each: each.objectives[first].mean, reverse=up):
        marks = [*([found.label] if found.label else []), *["winner"] * (found.id == status.winner)]
        yield Row(found, marks, landmark=False, gain=gain_text(found, status))


def _failures(store: Store, name: str) -> list[Failed]:
    """The latest failed candidates, the newest first."""
    order = summaries.Order(descending=True)
    return [
        Failed(row.number, row.failure or {"reason": "unknown", "message": ""}, row.attempts, row.worker,
               log_url(name, row.failure))
        for row in summaries.page(store, order, MOST_FAILURES, statuses=["failed"])
    ]  # fmt: skip


def log_url(name: str, failure: dict[str, Any] | None) -> str:
    """Where the log of a failure can be read; nothing where there is none."""
    log = (failure or {}).get("log")
    return f"{api_url(name)}/logs/{str(log).removeprefix('logs/')}" if log else ""
