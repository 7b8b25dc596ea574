"""From data to HTML: the autoescaped templates, and the format of numbers, times and names in them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evomerge import __version__
from evomerge.report.entries import Gap, percent, value_text
from evomerge.report.items import fields_of
from evomerge.report.lists import origin_text
from evomerge.report.screen import duration, p_text
from evomerge.service.bodies import SearchSummary
from evomerge.store.rows import candidate_id, number_of

HERE = Path(__file__).resolve().parent.parent
TEMPLATES, STATIC = HERE / "templates", HERE / "static"

STATUS_WORDS = {"asked": "waiting"}
"""What is shown for statuses whose names would be misleading."""

ORIGIN_WORDS = {
    "favourite": "mean of the optimizer",
    "proxy": "gradient of the proxy",
    "start": "of an earlier search",
    "refit": "fitted anew",
}
"""The same for the origins of candidates."""

_WIDTH, _HEIGHT, _EDGE = 100.0, 30.0, 2.0  # the size and margin of a sparkline, in its own units


def page(request: Request, template: str, *, status_code: int = 200, **content: Any) -> HTMLResponse:
    """Render a page. In templates, ``query_url(key=value)`` is its URL with changed parameters; None drops one."""

    def query_url(**changes: object) -> str:
        kept = {key: value for key, value in request.query_params.items() if key not in changes}
        kept |= {key: str(value) for key, value in changes.items() if value is not None}
        return f"{request.url.path}?{urlencode(kept)}"

    has_login = request.app.state.authenticator.token is not None
    html = _environment().get_template(template).render(query_url=query_url, has_login=has_login, **content)
    return HTMLResponse(html.encode(errors="backslashreplace"), status_code)  # file names need not be valid text


@cache
def compile_templates() -> None:
    """Compile all templates when the server starts: it takes longer than the rest of a response, so the first visitor
    would have to wait.
    """
    environment = _environment()
    for name in environment.list_templates(filter_func=lambda name: name != "report.html"):  # has its own environment
        environment.get_template(name)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, optimized=False,  # folding takes an eighth of a first response, for nothing
    )  # fmt: skip
    environment.filters |= {
        "score": score, "signed": signed, "duration": duration, "hours": _hours, "seconds": _seconds, "size": _size,
        "moment": _moment, "candidate_id": _candidate_id, "spark": sparkline, "p_text": p_text,
        "first": _first, "fields": fields_of, "gap": gap_words, "measure": value_text, "percent": percent,
    }  # fmt: skip
    environment.globals |= {
        "version": __version__, "search_url": search_url, "api_url": api_url, "candidate_url": candidate_url,
        "drawing_url": drawing_url,
        "gains_over_source": gains_over_source, "origin_text": origin_text, "status_words": STATUS_WORDS,
        "origin_words": ORIGIN_WORDS,
    }  # fmt: skip
    return environment


# ---- addresses -------------------------------------------------------------------------------------------------------


def search_url(name: str) -> str:
    """The URL of the page of a search."""
    return f"/searches/{quote(name, safe='')}"


def api_url(name: str) -> str:
    """The URL of a search in the API."""
    return f"/api/v1/searches/{quote(name, safe='')}"


def drawing_url(name: str, candidate: int, item: int, split: str, objective: str) -> str:
    """The API's URL of what a candidate of a search drew for an item."""
    asked = urlencode({"split": split, "objective": objective})
    return f"{api_url(name)}/candidates/{candidate}/drawings/{item}?{asked}"


def candidate_url(name: str, candidate: int | str) -> str:
    """The URL of the page of a candidate, given by its number or its id."""
    return f"{search_url(name)}/candidates/{number_of(str(candidate))}"


def shell_place(folder: Path) -> str:
    """The folder of a search, quoted for a shell."""
    return shlex.quote(str(folder))


# ---- numbers and names -----------------------------------------------------------------------------------------------


def score(value: float | None) -> str:
    """A score or its error; a dash if it is unknown."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float) -> str:
    """A difference with its sign, using a minus sign as wide as the plus."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def gap_words(gap: Gap) -> str:
    """A difference with its interval, which is left out if there is only one item."""
    if gap.low is None or gap.high is None:
        return signed(gap.mean)
    return f"{signed(gap.mean)} [{signed(gap.low)}, {signed(gap.high)}]"


def gains_over_source(summary: SearchSummary) -> dict[str, float]:
    """By how much the best is better than the best source, in the scalarisation and in each objective, if both have a
    score.
    """
    gains = {}
    best, source = summary.best, summary.best_source
    one, other = (None if candidate is None else candidate.scalar for candidate in (best, source))
    if summary.scalar is not None and one is not None and other is not None:
        gains[summary.scalar.name] = (one - other) * (1 if summary.scalar.maximise else -1)
    for objective in summary.objectives:
        ours, theirs = (
            None if candidate is None else candidate.objectives.get(objective.name) for candidate in (best, source)
        )
        if ours is not None and theirs is not None and ours.mean is not None and theirs.mean is not None:
            gains[objective.name] = (ours.mean - theirs.mean) * (1 if objective.maximise else -1)
    return gains


def sparkline(points: Sequence[float], source: float | None) -> Mapping[str, str] | None:
    """SVG paths of a sparkline: the ``line``, the ``area`` below it, and the level of the best ``source``, which is
    empty if unknown. None if there are no points. Infinities are left out.

    The best so far is constant until a better one comes, so the line is a step function.
    """
    points = [point for point in points if math.isfinite(point)]
    if not points:
        return None
    source = source if source is not None and math.isfinite(source) else None
    levels = [*points, *([] if source is None else [source])]
    low, high = min(levels), max(levels)

    def y(value: float) -> str:
        share = 0.5 if high == low else (value - low) / (high - low)
        return f"{_HEIGHT - _EDGE - share * (_HEIGHT - 2 * _EDGE):.2f}"

    step = _WIDTH / len(points)
    line = f"M0 {y(points[0])}" + "".join(f"V{y(point)}H{step * (i + 1):.2f}" for i, point in enumerate(points))
    level = "" if source is None else f"M0 {y(source)}H{_WIDTH:g}"
    return {"line": line, "area": f"{line}V{_HEIGHT:g}H0Z", "source": level}


def _first(values: Any) -> Any:
    return next(iter(values))


def _candidate_id(number: int | str) -> str:
    return candidate_id(number_of(str(number)))


def _hours(hours: float) -> str:
    return f"{hours:.2f}" if hours < 10 else f"{hours:,.0f}"


def _seconds(seconds: float) -> str:
    if seconds >= 60:
        return duration(seconds)
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B"


def _moment(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M UTC")
