"""The pages of searches: the list of all, and a page with everything known about one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel

from evomerge.report.conclusions import conclusions, is_front, roles_of
from evomerge.report.drawings import Drawing, drawing_grid
from evomerge.report.entries import Entry
from evomerge.report.parameters import ParameterColumn, columns_of
from evomerge.report.picks import Pick
from evomerge.report.screen import best_confirmed_source, choice_text, gain_cell, ranked, thrift_lines
from evomerge.report.search_status import SearchStatus
from evomerge.report.selection import selection_of
from evomerge.report.team import team_of
from evomerge.search.estimation.preference import BEST as WINNER
from evomerge.search.estimation.preference import KNEE
from evomerge.service.api.candidates import candidates
from evomerge.service.api.searches import status_with
from evomerge.service.bodies import CandidatePage, SearchSummary
from evomerge.service.dependencies import DriversDependency, RootDependency, StoreDependency
from evomerge.service.pages.rendering import api_url, drawing_url, gains_over_source, page, shell_place, signed
from evomerge.service.report import report_html
from evomerge.service.root import Root
from evomerge.service.summary import summaries_of, summary_of
from evomerge.store import Store, summaries
from evomerge.store.rows import Estimate, number_of

router = APIRouter(include_in_schema=False)

MAX_ON_FRONT = 12
"""The maximum number of rows of the front below the baselines; the table of candidates has all of them."""

MAX_FAILURES = 25
"""The maximum number of failed candidates on the page, the latest."""

PAGE_ROWS = 25
"""The number of candidates on a page of their table."""

BEST = "best in search"
"""The name of the best by search score; the best on held-out items is called the winner."""

_MEANINGS = {
    "pause": ("Pause", "Running candidates finish, nothing new starts. The driver waits and keeps its workers."),
    "resume": ("Resume", "Continues where it was, with the same candidates, bit for bit."),
    "stop": ("Stop", "Running candidates finish, then the driver ends. It can be resumed."),
    "cancel": ("Cancel", "Ends immediately and discards what is running. It can be resumed."),
}
_CONFIRM = ("Confirm", "Scores the best on the held-out split, and chooses there.")


@dataclass(frozen=True)
class ScoreRow:
    """A row in a table of scores: a candidate with its marks, whether it is chosen for anything, and its gain over the
    best source in each objective if known.
    """

    entry: Entry
    marks: list[str]
    baseline: bool
    chosen: bool
    gains: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CandidateChoice:
    """A candidate that can be selected, with its id and a description."""

    number: int
    id: str
    text: str


@dataclass(frozen=True)
class FailedCandidate:
    """A failed candidate: its failure, and the URL of its log."""

    number: int
    failure: dict[str, Any]
    attempts: int
    worker: str
    log: str


class Filter(BaseModel):
    """The filter of the table of candidates. Empty texts, which forms send, do not filter."""

    status: Literal["", "asked", "running", "done", "eliminated", "failed", "cached"] = ""
    origin: str = ""
    sort: str = "number"
    order: Literal["asc", "desc"] = "desc"
    front: bool = False
    cursor: str | None = None


@router.get("/")
def searches(request: Request, root: RootDependency, drivers: DriversDependency) -> HTMLResponse:
    """All searches: their status and results."""
    listed = list(summaries_of(root, drivers))
    return page(
        request, "index.html", here="searches", searches=listed, folder=shell_place(root.folder), gain=gain_words
    )  # fmt: skip


@router.get("/searches/{name}")
def search(
    request: Request, root: RootDependency, drivers: DriversDependency, name: str, store: StoreDependency,
    query: Annotated[Filter, Query()],
) -> HTMLResponse:  # fmt: skip
    """One search: scores, front, progress, failures, candidates."""
    driver = drivers.state_of(name, store)
    status, summary = status_with(store, name, driver), summary_of(name, store, driver)
    search_row, seq = store.search(), summaries.last_event(store)
    failures, origins = _failures(store, name), dict.fromkeys(summaries.columns(store, ["origin"])["origin"])
    table = candidates(
        store, status=[query.status] if query.status else None, origin=query.origin or None, sort=query.sort,
        order=query.order, front=query.front, limit=PAGE_ROWS, cursor=query.cursor,
    )  # fmt: skip
    rows, columns = list(_rows(status)), columns_of(search_row.record.parameters)
    return page(
        request, "search.html", here="", status=status, summary=summary, query=query, seq=seq,
        verbs=_verbs(summary, status.choice is not None and status.choice.made), caption=_caption(status, rows),
        pick=held_out_pick(status), conclusions=conclusions(status), is_front=is_front(status),
        work_s=_work_s(status), columns=columns, table_parameters=_table_parameters(store, table, columns),
        measures=status.measures, best_values=_best_values(status), rows=rows,
        thrift=thrift_lines(status), selection=selection_of(store),
        grid=drawing_grid(store, status, partial(_drawing_url, name)),
        choices=choices(status), confirmed=list(_confirmed(status)),
        gains_over=_gains_over(status), choice=choice_text(status), failures=failures,
        parameters=[parameter.name for parameter in search_row.record.parameters], origins=origins, page=table,
        patience=search_row.record.budget.patience, place=shell_place(place(root, name)), team=team_of(store),
    )  # fmt: skip


@router.get("/searches/{name}/report.html")
def report(root: RootDependency, name: str, store: StoreDependency) -> Response:
    """The report of the search, as a download because it has inline scripts, which this site's policy forbids."""
    html = report_html(store, place(root, name))
    file = quote(f"{name}-report.html")
    return Response(
        html, media_type="text/html", headers={"content-disposition": f"attachment; filename*=UTF-8''{file}"}
    )


def _drawing_url(name: str, drawing: Drawing) -> str:
    return drawing_url(name, drawing.candidate, drawing.item, drawing.split, drawing.measure.name)


def gain_words(summary: SearchSummary) -> str:
    """The best compared with the best source: "0.240 better than", "as good as", "a 0.1 worse, b 0.8 better than"."""
    gains = gains_over_source(summary)
    if gains and not any(gains.values()):
        return "as good as"
    if len(gains) == 1:
        return f"{_compared(next(iter(gains.values())))} than"
    return f"{', '.join(f'{name} {_compared(gain)}' for name, gain in gains.items())} than" if gains else ""


def _compared(gain: float) -> str:
    return "equal" if gain == 0 else f"{signed(abs(gain))[1:]} {'better' if gain > 0 else 'worse'}"


def choices(status: SearchStatus) -> list[CandidateChoice]:
    """The candidates that people select most: the winner, the best in search, then front and baselines."""
    best, main, front = status.best.id if status.best else "", main_pick(status), set(status.front)
    picked = [status.best, *(status.confirmed_entry(pick.id) for pick in status.picks)]
    known = [*status.front_entries, *status.baselines, *(entry for entry in picked if entry is not None)]
    options = []
    for name, entry in {entry.id: entry for entry in known}.items():
        what = dict.fromkeys([*roles_of(status, name, "held_out"), *_marks(entry, status, front)])
        options.append(CandidateChoice(number_of(name), name, f"{name} {', '.join(what)}".strip()))
    return sorted(options, key=lambda choice: (choice.id != main, choice.id != best, choice.number))


def main_pick(status: SearchStatus) -> str:
    """The candidate to show first: the winner, the knee, or without one the best on the search split."""
    pick = held_out_pick(status)
    return pick.id if pick is not None else status.best.id if status.best else ""


def held_out_pick(status: SearchStatus) -> Pick | None:
    """The winner, or the knee of a front, as chosen on held-out items; None before confirmation."""
    return next((pick for pick in status.picks if pick.role in (WINNER, KNEE) and pick.split == "held_out"), None)


def search_roles(status: SearchStatus, candidate: str) -> list[str]:
    """The roles that a candidate is chosen for on the search split."""
    return [BEST if role == WINNER else role for role in roles_of(status, candidate, "search")]


def place(root: Root, name: str) -> Path:
    """The folder of a search, for use in commands."""
    return root.folder / name


def _verbs(summary: SearchSummary, made: bool) -> list[tuple[str, str, str]]:
    """The commands that a search accepts now: verb, text of the button, explanation.

    ``made`` says whether the choice on held-out items is made. If the budget of candidates is spent as well, a driver
    would have nothing to do.
    """
    if summary.state == "finished" and not made:
        return [("resume", *_CONFIRM)]
    if summary.state == "finished" and summary.counts.asked == summary.budget.candidates:
        return []
    if not summary.driver:
        if summary.state == "starting":
            return []
        # Candidates found since the last confirmation can be confirmed without spending the rest of the budget.
        confirm = [("confirm", *_CONFIRM)] if summary.best is not None and summary.state != "finished" else []
        return [("resume", *_MEANINGS["resume"]), *confirm]
    wanted = ["resume" if summary.state == "paused" else "pause", "stop", "cancel"]
    return [(verb, *_MEANINGS[verb]) for verb in wanted]


def _table_parameters(store: Store, table: CandidatePage, columns: Sequence[ParameterColumn]) -> dict[int, list[str]]:
    """The parameters of the candidates in a table, as a text for each column."""
    if not columns:
        return {}
    genomes = summaries.genomes_of(store, [row.number for row in table.candidates])
    return {number: [column.text(genome) for column in columns] for number, genome in genomes.items()}


def _work_s(status: SearchStatus) -> float:
    """Seconds that workers spent on candidates, estimated from the mean of the latest ones."""
    return sum(status.seconds.values()) * (status.candidates.done + status.candidates.eliminated)


def _best_values(status: SearchStatus) -> dict[str, Estimate]:
    """The scores of the best candidate on the search split."""
    known = {name: None if status.best is None else status.best.value(name) for name in status.numbers}
    return {name: value for name, value in known.items() if value is not None}


def _caption(status: SearchStatus, rows: Sequence[ScoreRow]) -> str:
    """The caption of the table of scores."""
    if len(status.directions) == 1:
        return f"Baselines, and the {BEST}"
    front = set(status.front)
    shown = sum(row.entry.id in front for row in rows)
    front_text = "and the front" if shown == len(front) else f"and {shown} of {len(front)} on the front"
    return f"Baselines, {front_text}" if front else "Baselines"


def _rows(status: SearchStatus) -> Iterator[ScoreRow]:
    """Baselines, then the front with the best first; chosen candidates are always included."""
    front = set(status.front)
    known = {entry.id for entry in status.baselines}
    others = ranked([entry for entry in status.front_entries if entry.id not in known], status)
    if status.best is not None and status.best.id not in known | {entry.id for entry in others}:
        others.insert(0, status.best)
    chosen = [entry for entry in others if search_roles(status, entry.id)]
    shown = {entry.id for entry in [*chosen, *others][: max(MAX_ON_FRONT, len(chosen))]}
    for entry in [*status.baselines, *(entry for entry in others if entry.id in shown)]:
        chosen_for = bool(search_roles(status, entry.id))
        yield ScoreRow(entry, _marks(entry, status, front), baseline=entry.id in known, chosen=chosen_for)


def _marks(shown: Entry, status: SearchStatus, front: set[str]) -> list[str]:
    label = [shown.label] if shown.label else []
    return [*label, *search_roles(status, shown.id), *["front"] * (shown.id in front)]


def _gains_over(status: SearchStatus) -> dict[str, str]:
    """The best source in each number, which gains are relative to; empty if nothing is confirmed."""
    best = {name: best_confirmed_source(status, name) for name in status.numbers} if status.confirmed else {}
    return {name: source for name, source in best.items() if source}


def _confirmed(status: SearchStatus) -> Iterator[ScoreRow]:
    """The table of the held-out split: baselines, then the shortlist with the best first."""
    for entry in status.confirmed_baselines:
        yield _confirmed_row(entry, status, baseline=True)
    for entry in ranked(status.confirmed, status):
        gains = {name: gain_cell(entry, status, name) for name in status.numbers}
        yield _confirmed_row(entry, status, baseline=False, gains=gains)


def _confirmed_row(
    shown: Entry, status: SearchStatus, *, baseline: bool, gains: Mapping[str, str] | None = None
) -> ScoreRow:
    roles = roles_of(status, shown.id, "held_out")
    on_search = [] if is_front(status) else search_roles(status, shown.id)
    label = [shown.label] if shown.label else []
    return ScoreRow(shown, [*label, *roles, *on_search], baseline=baseline, chosen=bool(roles), gains=gains or {})


def _failures(store: Store, name: str) -> list[FailedCandidate]:
    """The latest failed candidates, newest first."""
    order = summaries.Order(descending=True)
    return [
        FailedCandidate(row.number, row.failure or {"reason": "unknown", "message": ""}, row.attempts, row.worker,
               log_url(name, row.failure))
        for row in summaries.page(store, order, MAX_FAILURES, statuses=["failed"])
    ]  # fmt: skip


def log_url(name: str, failure: dict[str, Any] | None) -> str:
    """The URL of the log of a failure; empty if there is none."""
    log = (failure or {}).get("log")
    return f"{api_url(name)}/logs/{str(log).removeprefix('logs/')}" if log else ""
