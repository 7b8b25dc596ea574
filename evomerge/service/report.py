"""The report of a search as a single HTML file: figures, tables, settings, versions and commands. It works offline."""

from __future__ import annotations

import base64
import gzip
import json
import shlex
import time
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evomerge import __version__
from evomerge.report.candidate import status_text
from evomerge.report.conclusions import conclusions, is_front, roles_of
from evomerge.report.confirmed import Choice
from evomerge.report.drawings import drawing_grid, embedded
from evomerge.report.entries import ConfirmedEntry, Entry, interval_text, percent
from evomerge.report.path import is_plain
from evomerge.report.screen import arrow, cells, choice_text, duration, further_titles, gain_text, p_text, ranked
from evomerge.report.search_status import SearchStatus
from evomerge.report.seen import seen_items
from evomerge.report.selection import selection_of
from evomerge.report.status import depths_of, status_of
from evomerge.report.svg import COLOURS
from evomerge.report.team import Team, team_of
from evomerge.search.estimation.preference import BEST, KNEE, Preference
from evomerge.search.estimation.preference import ranked as ranked_rows
from evomerge.search.settings.folder import FILE_NAME
from evomerge.service.figures import FigureOptions, Name, draw, draw_path, draw_recipe
from evomerge.service.figures.recipe import recipe_of, subject_of
from evomerge.service.figures.style import is_empty, without_notes, words_of
from evomerge.store import SearchRow, Store
from evomerge.store.events import ConfirmFailed, Failure
from evomerge.store.rows import candidate_id, number_of

_TOP = 15  # rows in the table of the best candidates
_FAILURES = 50  # rows in the table of the newest failures

_FIGURES: tuple[tuple[Name, FigureOptions, str, str], ...] = (
    ("front", FigureOptions(), "Candidates and the front", "All candidates; bars are standard errors."),
    ("grid", FigureOptions(), "Niches", "The best of each, chosen by this very score."),
    ("history", FigureOptions(), "Best so far", "Chosen by this very score, so partly luck."),
    ("history", FigureOptions(over="hours"), "Best so far, by time", ""),
    ("hypervolume", FigureOptions(), "Hypervolume", "What the front covers."),
    ("curse", FigureOptions(), "Search against held-out score", "How much of a good score was luck."),
    ("importance", FigureOptions(), "What matters", "How much each parameter decides whether a candidate is good."),
    ("proxy", FigureOptions(), "Gradient of the proxy", "What would make right answers more likely."),
    ("parallel", FigureOptions(), "Parameters and score", "A line a candidate."),
    ("team", FigureOptions(), "Team", "Which held-out items each member solves."),
    ("coverage", FigureOptions(), "Team, as the search went on", ""),
    ("constraints", FigureOptions(), "Constraints", ""),
    ("timeline", FigureOptions(), "Workers", "A bar an attempt."),
    ("failures", FigureOptions(), "Failures", "By cause, over time."),
)  # fmt: skip


_WIDE = ("parallel", "timeline", "team")  # figures of double width


class Picture(NamedTuple):
    """A figure of the report: plotly's JSON, or empty JSON with ``words`` that say why there is nothing to draw."""

    title: str
    about: str
    words: str
    json: Markup
    is_wide: bool


class ReportRow(NamedTuple):
    """A candidate in a table."""

    id: str
    label: str
    what: str
    cells: list[str]
    roles: list[str]


class GapRow(NamedTuple):
    """A confirmed candidate compared with another model in one objective, as text."""

    id: str
    objective: str
    to: str
    difference: str
    interval: str
    p: str


class FailureRow(NamedTuple):
    """A failed attempt."""

    id: str
    attempt: int
    reason: str
    message: str
    log: str
    final: bool


def report_html(store: Store, folder: Path) -> str:
    """The report of a search as one self-contained HTML page.

    Args:
        folder: the search's folder as it is written in the commands.
    """
    search, status = store.search(), status_of(store)
    environment = Environment(
        loader=PackageLoader("evomerge.service"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    shown, team = _shown(status), team_of(store)
    return environment.get_template("report.html").render(
        status=status,
        search=search,
        version=__version__,
        written=_moment(time.time()),
        began=_moment(search.created_at),
        spent=duration(status.budget.hours_spent * 3600),
        pictures=[_picture(store, *wanted) for wanted in _FIGURES if _applies(wanted[0], status, team)],
        chosen=None if shown is None else shown.id,
        recipe=None if shown is None else _recipe_picture(store, shown),
        path=None if shown is None else _path(store, shown),
        measures=[*(f"{name} {arrow(way)}" for name, way in status.numbers.items()), *further_titles(status)],
        best=list(_best(store, search, status)),
        confirmed=list(_confirmed(status)),
        gaps=list(_gaps(status)),
        choice=_choice(status),
        seen=[] if shown is None else seen_items(store, number_of(shown.id)),
        grid=drawing_grid(store, status, embedded(store)),
        selection=selection_of(store),
        conclusions=conclusions(status),
        best_word=KNEE if is_front(status) else BEST,
        team=team,
        failures=list(_failures(store)),
        settings=yaml.safe_dump(search.settings, sort_keys=False, allow_unicode=True),
        versions=search.environment,
        commands=list(commands(folder, status)),
        darker=Markup(json.dumps(dict(COLOURS))),
        plotly=_plotly(),
    )


@cache
def _plotly() -> str:
    """Plotly's script, compressed because it is nine tenths of a report, and every browser can decompress it."""
    script = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(script, 9, mtime=0)).decode()


def commands(folder: Path, status: SearchStatus) -> Iterator[tuple[str, str]]:
    """Pairs of what a command does, and the command."""
    here, file = shlex.quote(str(folder)), shlex.quote(str(folder / FILE_NAME))
    model = shlex.quote(f"{status.name}-model")
    again = shlex.quote(f"{status.name}-again")
    yield "Run the same search again", f"evomerge search {file} --dir {again}"
    yield "Go on with it", f"evomerge resume {here}"
    yield "Score the best on the held-out split", f"evomerge confirm {here}"
    shown = _shown(status)
    if shown is not None:
        yield "Write the model", f"evomerge export {here} {model} --candidate {shown.id}"
        yield "Score that model again on held-out items", f"evomerge score {model} {file} --split held_out"
        yield "See its recipe", f"evomerge show {here} {shown.id} --recipe"
    yield "See where it stands", f"evomerge status {here}"


def _shown(status: SearchStatus) -> Entry | None:
    """The candidate whose recipe is drawn: the winner or the knee, or without one the best on the search split."""
    for pick in status.picks:
        if pick.role in (BEST, KNEE) and (entry := status.confirmed_entry(pick.id)) is not None:
            return entry
    return status.best


def _applies(name: Name, status: SearchStatus, team: Team | None) -> bool:
    """Whether a figure can apply to this search."""
    if name in ("team", "coverage"):
        return team is not None
    if name == "constraints":
        return bool(status.constraints)
    if name == "grid":
        return bool(status.features)
    if name == "proxy":
        return status.proxy is not None
    return name != "hypervolume" or len(status.directions) > 1


def _picture(store: Store, name: Name, options: FigureOptions, title: str, about: str) -> Picture:
    return _picture_of(draw(store, name, options), title, about, is_wide=name in _WIDE)


def _picture_of(drawn: Any, title: str, about: str, *, is_wide: bool = False) -> Picture:
    """A figure whose notes are moved to the text of the page, where they can wrap."""
    json_ = Markup("") if is_empty(drawn) else _script(without_notes(drawn).to_json())
    return Picture(title, about, words_of(drawn), json_, is_wide)


def _script(text: str) -> Markup:
    """JSON that is safe inside a script element, whatever names it contains."""
    return Markup(json.dumps(json.loads(text)).replace("<", "\\u003c"))


def _recipe_picture(store: Store, shown: Entry) -> Picture:
    about = f"{subject_of(recipe_of(store, number_of(shown.id)))}."
    return _picture_of(draw_recipe(store, number_of(shown.id)), f"Recipe of {shown.id} {shown.label}".strip(), about)


def _path(store: Store, shown: Entry) -> Markup | None:
    """The path as a picture, unless it is simply all layers in order."""
    number = number_of(shown.id)
    if is_plain(recipe_of(store, number), depths_of(store)):
        return None
    return Markup(draw_path(store, number))  # its texts are escaped by the XML library


def _best(store: Store, search: SearchRow, status: SearchStatus) -> Iterator[ReportRow]:
    for row in ranked_rows(store, Preference.of_search(search), _TOP):
        entry = status.entry(row, search.record)
        marks = [*roles_of(status, entry.id, "search"), *["front"] * row.on_front]
        what = [entry.origin, *marks, status_text(row, status), *_change(entry)]
        texts = list(cells(entry, status))
        yield ReportRow(entry.id, entry.label, ", ".join(what), texts, roles_of(status, entry.id, "held_out"))


def _confirmed(status: SearchStatus) -> Iterator[ReportRow]:
    for mark in status.confirmed_baselines:
        texts = list(cells(mark, status, whole=True))
        what = ", ".join(["baseline", *_change(mark)])
        yield ReportRow(mark.id, mark.label, what, texts, roles_of(status, mark.id, "held_out"))
    for entry in ranked(status.confirmed, status):
        what = "; ".join([*(_gain(entry, status, name) for name in status.numbers), *_change(entry)])
        texts = list(cells(entry, status, whole=True))
        yield ReportRow(entry.id, entry.label, what, texts, roles_of(status, entry.id, "held_out"))


def _change(entry: Entry) -> list[str]:
    """How far a model is from the base, in words, if known."""
    return [] if entry.change is None else [f"changes {percent(entry.change)} of the base"]


def _gain(entry: ConfirmedEntry, status: SearchStatus, number: str) -> str:
    inside = f"{number} " if len(status.directions) > 1 else ""
    return f"{inside}{gain_text(entry, status, number)}"


def _gaps(status: SearchStatus) -> Iterator[GapRow]:
    for entry in ranked(status.confirmed, status):
        for name in status.numbers:
            for gap in entry.gaps(name):
                interval = interval_text(gap.low, gap.high)
                yield GapRow(entry.id, name, gap.to, f"{gap.mean:+.3f}", interval, p_text(gap.p))


def _choice(status: SearchStatus) -> list[str]:
    choice: Choice | None = status.choice
    if choice is None:
        return []
    frozen = f"The shortlist of {choice.shortlist} was written down at {_moment(choice.frozen_at)}, before that."
    return [frozen, *choice_text(status)]


def _failures(store: Store) -> Iterator[FailureRow]:
    for event in store.events(kinds=("failure", "confirm failed"), newest=_FAILURES)[::-1]:
        failure = event.read(Failure)
        number = event.read(ConfirmFailed).candidate if event.candidate is None else event.candidate
        yield FailureRow(
            candidate_id(number),
            event.attempt or 0,
            failure.reason.replace("_", " "),
            failure.message,
            failure.log,
            failure.final,
        )


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
