"""The pages of candidates: one candidate with its recipe and items, and two candidates compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from fastapi.responses import HTMLResponse
from markupsafe import Markup
from pydantic import BaseModel, Field

from evomerge.errors import InputError
from evomerge.genome import Parameter
from evomerge.mergekit import dump_recipe
from evomerge.recipes.base import Recipe, read_recipe
from evomerge.recipes.routed import RoutedRecipe
from evomerge.report.allocation import allocation_lines
from evomerge.report.candidate import status_text
from evomerge.report.comparing import Comparison
from evomerge.report.conclusions import roles_of
from evomerge.report.entries import SOURCE, origin_of
from evomerge.report.experts import uses_of
from evomerge.report.items import are_records
from evomerge.report.naming import chosen
from evomerge.report.parameters import parameter_text, parameters_of
from evomerge.report.path import is_plain, path_svg, path_text
from evomerge.report.picks import best_source as best_label
from evomerge.report.screen import choice_text, p_text, ranked
from evomerge.report.search_status import SearchStatus
from evomerge.report.status import depths_of
from evomerge.search.estimation.preference import BEST, KNEE
from evomerge.service.api.candidates import compare as paired
from evomerge.service.api.searches import status_with
from evomerge.service.bodies import ComparedItem
from evomerge.service.contained import contained
from evomerge.service.dependencies import DriversDependency, RootDependency, StoreDependency
from evomerge.service.figures.recipe import subject_of
from evomerge.service.pages.rendering import gap_words, page, signed
from evomerge.service.pages.search import choices, log_url, main_pick, search_roles
from evomerge.service.problems import ProblemError
from evomerge.service.root import Root
from evomerge.store import CandidateRow, Store
from evomerge.store.rows import candidate_id, number_of
from evomerge.yaml import dump_yaml

router = APIRouter(include_in_schema=False)

MAX_ITEMS = 8
"""The maximum numbers of won and of lost items on a candidate's page; the comparison has all of them."""

PAGE_ITEMS = 25
"""Items on a page of the comparison."""

LOG_CHARACTERS = 4000
"""The length of the end of a log on a candidate's page."""

_SPLITS: tuple[Literal["search", "held_out"], ...] = ("search", "held_out")
_PATH_WIDTH = 10_000  # lines of the path are not broken here; the page wraps them


class ComparisonQuery(BaseModel):
    """The query of the comparison page."""

    a: str = ""
    b: str = ""
    objective: str = ""
    split: Literal["search", "held_out"] = "search"
    differ: bool = False
    page: int = Field(default=1, ge=1, le=10_000)


@dataclass(frozen=True)
class ParameterValue:
    """A parameter of the search space with its value, for display."""

    name: str
    value: str
    low: str
    high: str


@router.get("/searches/{name}/candidates/{candidate}")
def show_candidate(
    request: Request, root: RootDependency, drivers: DriversDependency, store: StoreDependency, name: str,
    candidate: Annotated[str, InPath(pattern=r"^c?[0-9]{1,9}$")], against: str = "", objective: str = "",
) -> HTMLResponse:  # fmt: skip
    """One candidate, by its number or its id: scores on both splits, recipe, failure, and the items that it won and
    lost against another candidate.
    """
    number = number_of(candidate)
    mine, status = candidate_id(number), status_with(store, name, drivers.state_of(name, store))
    if not 0 <= number < status.candidates.asked:
        raise ProblemError(404, f"{mine} is not a candidate of {name}", detail="The search's page lists them.")
    measures = [*status.directions, *status.constraints]
    wanted = objective if objective in measures else measures[0]
    row, search, depths = store.candidate(number), store.search(), depths_of(store)
    other = _opponent(store, status, number, against)
    compared = None if other is None else paired(store, number, other, "search", wanted)
    recipe = read_recipe(row.recipe, search.record.sources)
    comparisons = (
        [comparison for comparison in compared.comparisons if comparison.objective == wanted] if compared else []
    )
    up = is_up(status, wanted)
    won, lost = _won_and_lost(compared.items, up) if compared else ([], [])
    theirs = "" if other is None else called(status, other)
    return page(
        request, "candidate.html", here="", status=status, row=row, measures=measures, objective=wanted,
        numbers=status.measures,
        searched=status.entry(row, search.record), origin=origin_of(row, search.record.sources),
        fate=status_text(row, status),
        held_out=status.confirmed_entry(mine), gaps=_gaps(status, mine),
        path=path_text(recipe, depths, _PATH_WIDTH), recipe_yaml=_mergekit(recipe, row.recipe),
        hold=choice_text(status)[:1] if status.confirmed_entry(mine) else [],
        picture=None if is_plain(recipe, depths) else Markup(path_svg(recipe, depths, f"{name} {mine} {row.label}")),
        roles=[*roles_of(status, mine, "held_out"), *search_roles(status, mine)],
        recipe_lines=recipe.lines(), subject=subject_of(recipe), allocation=_allocation(store, row, recipe),
        genome=_genes(row, search.record.parameters),
        log=_log(root, name, row), log_url=log_url(name, row.failure), baselines=choices(status), against=other,
        sentences=[sentence(comparison, mine, theirs) for comparison in comparisons],
        won=won[:MAX_ITEMS], lost=lost[:MAX_ITEMS], won_count=len(won), lost_count=len(lost),
        name_a=mine, name_b=theirs, maximise=up, lead=ahead, drawn_by=(number, other), split="search",
        are_records=are_records(search, wanted),
    )  # fmt: skip


@router.get("/searches/{name}/compare")
def compare(
    request: Request,
    drivers: DriversDependency,
    store: StoreDependency,
    name: str,
    query: Annotated[ComparisonQuery, Query()],
) -> HTMLResponse:
    """Two candidates: the paired test in words, and their items side by side.

    By default, the winner, or without one the best, is compared with the best source. If it is the best source itself,
    it is compared with the best candidate that was found.
    """
    status = status_with(store, name, drivers.state_of(name, store))
    query = _proposed(query, status)
    measures = [*status.directions, *status.constraints]
    wanted = query.objective if query.objective in measures else measures[0]
    fault, comparisons, items, name_a, name_b, drawn_by = "", [], [], query.a, query.b, (0, 0)
    if query.a and query.b:
        try:
            drawn_by = a, b = chosen(store, query.a), chosen(store, query.b)
            by_split = {split: paired(store, a, b, split, wanted) for split in _SPLITS}
            comparisons = [comparison for split in _SPLITS for comparison in by_split[split].comparisons]
            items, name_a, name_b = by_split[query.split].items, called(status, a), called(status, b)
            fault = "" if comparisons else f"{name_a} and {name_b} were not scored on the same items."
        except InputError as error:
            fault = f"{error.place} {error.problem}."
    up = is_up(status, wanted)
    items = [item for item in items if not query.differ or ahead(item, up)]
    begin, shown = (query.page - 1) * PAGE_ITEMS, query.model_copy(update={"objective": wanted})
    return page(
        request, "compare.html", here="", status=status, query=shown, measures=measures, choices=choices(status),
        roles=[pick.role for pick in status.picks if pick.role not in (BEST, KNEE)],
        fault=fault, compared=comparisons, name_a=name_a, name_b=name_b, maximise=up, lead=ahead,
        are_records=are_records(store.search(), wanted),
        sentences=[sentence(comparison, name_a, name_b) for comparison in comparisons],
        drawn_by=drawn_by, split=query.split, objective=wanted,
        shown=items[begin : begin + PAGE_ITEMS], total=len(items), more=len(items) > begin + PAGE_ITEMS,
    )  # fmt: skip


def _proposed(query: ComparisonQuery, status: SearchStatus) -> ComparisonQuery:
    """The requested pair; by default the best and the best source."""
    a = query.a or main_pick(status)
    average = next((baseline.id for baseline in status.baselines if baseline.origin == "average"), "")
    ids = [entry.id for entry in [*ranked(status.confirmed, status), *status.front_entries] if entry.origin != SOURCE]
    # If the best is the best source itself, compare it with the best that was found, or the average.
    others = [best_source(status), "" if status.best is None else status.best.id, *ids, average]
    labels = {baseline.id: baseline.label for baseline in status.baselines}
    b = query.b or next((other for other in others if other and a not in (other, labels.get(other))), "")
    return query.model_copy(update={"a": a, "b": b})


def called(status: SearchStatus, number: int) -> str:
    """The display name of a candidate: the label of a baseline, the id of any other."""
    name = candidate_id(number)
    return next((baseline.label for baseline in status.baselines if baseline.id == name and baseline.label), name)


def sentence(comparison: Comparison, a: str, b: str) -> str:
    """A paired comparison in words."""
    where = (
        f"{comparison.objective}, on {comparison.n} {'held-out' if comparison.split == 'held_out' else 'search'} items"
    )
    items = "item" if comparison.better_a == 1 else "items"
    counts = f"It won {comparison.better_a} {items} and lost {comparison.better_b} (p {p_text(comparison.p)})."
    if comparison.better_a is None:  # a scalarisation is not scored item by item
        counts = ""
    if comparison.difference == 0:
        return f"{where}: {a} and {b} score the same. {counts}".rstrip()
    how = "better" if comparison.difference > 0 else "worse"
    gap = signed(abs(comparison.difference))[1:]
    if comparison.low is None or comparison.high is None:
        return f"{where}: {a} is {gap} {how} than {b}. One item says nothing of how sure that is."
    interval = f"{comparison.confidence:.0%} interval {signed(comparison.low)} to {signed(comparison.high)}"
    sure = "" if comparison.low > 0 or comparison.high < 0 else " That may be luck: the interval holds 0."
    return f"{where}: {a} is {gap} {how} than {b}, {interval}.{sure} {counts}".rstrip()


def is_up(status: SearchStatus, measure: str) -> bool:
    """Whether higher is better for an objective or a constraint."""
    limit = status.constraints.get(measure)
    return status.directions[measure] == "maximize" if limit is None else limit.at_least


def ahead(item: ComparedItem, maximise: bool) -> float:
    """By how much the first candidate is better on an item; 0 if a score is unknown."""
    if item.a.score is None or item.b.score is None:
        return 0.0
    return (item.a.score - item.b.score) * (1 if maximise else -1)


def _won_and_lost(items: Sequence[ComparedItem], maximise: bool) -> tuple[list[ComparedItem], list[ComparedItem]]:
    gaps = [(ahead(item, maximise), item) for item in items]
    return [item for gap, item in gaps if gap > 0], [item for gap, item in gaps if gap < 0]


def _opponent(store: Store, status: SearchStatus, number: int, against: str) -> int | None:
    """The candidate to compare with: the requested one, or the best source; None if that is the candidate itself."""
    if against:
        return chosen(store, against)
    best = best_source(status)
    other = number_of(best) if best else number
    return None if other == number else other


def best_source(status: SearchStatus) -> str:
    """The id of the best source on the search split, by the number that decides, or for a front by the first objective.
    Empty if no source has been scored yet.
    """
    first, way = next(iter(status.numbers.items()))
    label = best_label(status.baselines, status.sources, first, way)
    return next((baseline.id for baseline in status.baselines if label and baseline.label == label), "")


def _gaps(status: SearchStatus, name: str) -> list[str]:
    """The corrected differences between a confirmed candidate and the baselines, in words."""
    entry = next((entry for entry in status.confirmed if entry.id == name), None)
    if entry is None:
        return []
    return [
        f"{measure}: {gap_words(gap)} over {gap.to}" + (f", p {p_text(gap.p)}" if gap.p is not None else "")
        for measure in status.numbers
        for gap in entry.gaps(measure)
    ]


def _genes(row: CandidateRow, parameters: Sequence[Parameter]) -> list[ParameterValue]:
    bounds = {parameter.name: (f"{parameter.low:g}", f"{parameter.high:g}") for parameter in parameters}
    values = parameters_of(row.genome, parameters)
    return [ParameterValue(name, parameter_text(value), *bounds[name]) for name, value in values]


def _mergekit(recipe: Recipe, canonical: str) -> str:
    """The recipe in mergekit's format, or in our own if mergekit cannot express it."""
    try:
        return dump_recipe(recipe)
    except InputError:
        return dump_yaml(json.loads(canonical))


def _allocation(store: Store, row: CandidateRow, recipe: Recipe) -> str:
    """Experts by layer as a text table; empty for other recipes."""
    if not isinstance(recipe, RoutedRecipe):
        return ""
    return "\n".join(allocation_lines(recipe, uses_of(store, row)))


def _log(root: Root, name: str, row: CandidateRow) -> str:
    """The end of the log of a failure; empty if it is not on this machine."""
    log = (row.failure or {}).get("log")
    if not log:
        return ""
    try:
        path = contained(root.folder_of(name), str(log))
        return path.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]
    except (InputError, ProblemError, OSError):
        return ""
