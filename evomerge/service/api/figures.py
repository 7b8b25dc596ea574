"""Figures of a search and of its candidates: plotly's JSON, and the path as SVG."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel
from starlette.responses import Response

from evomerge.service.dependencies import StoreDependency
from evomerge.service.figures import FigureOptions, Name, Over, draw, draw_path, draw_recipe
from evomerge.service.problems import RESPONSES, Fault, ProblemError
from evomerge.store import Store, summaries

router = APIRouter(prefix="/api/v1/searches/{name}", tags=["figures"], responses=RESPONSES)

_LARGEST = 2**31 - 1

CandidateNumber = Annotated[int, Path(ge=0, le=_LARGEST)]
ObjectiveName = Annotated[str | None, Query(max_length=100, description="an objective; the first by default")]


class Figure(BaseModel):
    """A figure in plotly's JSON. If it has no traces, the layout's title says why there is nothing to draw."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]


class SvgResponse(Response):
    media_type = "image/svg+xml"


@router.get("/figures/{figure}", response_model=Figure)
def figure(
    figure: Name,
    store: StoreDependency,
    x: ObjectiveName = None,
    y: ObjectiveName = None,
    over: Over = "candidates",
    objective: ObjectiveName = None,
    parameter: Annotated[str | None, Query(max_length=300, description="of the slice")] = None,
) -> Response:
    """A figure of a search. ``x`` and ``y`` apply to the front, ``over`` to the history, and ``objective`` to figures
    about a single objective.
    """
    options = FigureOptions(x=x, y=y, over=over, objective=objective, parameter=parameter)
    _check_objectives(store, {"x": x, "y": y, "objective": objective})
    try:
        drawn = draw(store, figure, options)
    except KeyError as error:  # the objectives were checked above
        fault = Fault(field="parameter", problem=f"the search has no parameter {parameter!r}")
        raise ProblemError(422, "There is no such parameter", fault) from error
    return _as_json(drawn)


@router.get("/candidates/{number}/figures/recipe", response_model=Figure)
def recipe_figure(number: CandidateNumber, store: StoreDependency) -> Response:
    """A heat map of how much each part of a candidate takes from each source."""
    _check_candidate(store, number)
    return _as_json(draw_recipe(store, number))


@router.get("/candidates/{number}/figures/path", response_class=SvgResponse)
def path_figure(number: CandidateNumber, store: StoreDependency) -> SvgResponse:
    """A picture of the path that the hidden state takes through a candidate."""
    _check_candidate(store, number)
    return SvgResponse(draw_path(store, number))


def _as_json(drawn: Any) -> Response:
    return Response(drawn.to_json(), media_type="application/json")


def _check_objectives(store: Store, given: dict[str, str | None]) -> None:
    known = [objective.name for objective in store.search().record.objectives]
    for field, value in given.items():
        if value is not None and value not in known:
            fault = Fault(field=field, problem=f"is not an objective; the search has {', '.join(known)}")
            raise ProblemError(422, "There is no such objective", fault)


def _check_candidate(store: Store, number: int) -> None:
    if not summaries.candidates(store, [number]):
        raise ProblemError(404, "There is no such candidate", detail=f"The search has none of number {number}.")
