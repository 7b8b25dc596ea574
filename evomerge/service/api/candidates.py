"""Candidates of a search: lists, details, the front, and comparisons item by item."""

from __future__ import annotations

import base64
import json
import math
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from evomerge.inference.pictures import media_type
from evomerge.report.comparing import compared
from evomerge.report.items import ItemAnswers, items_of
from evomerge.service.bodies import CandidateDetail, CandidatePage, Compared, ComparedItem, Front, Side
from evomerge.service.dependencies import StoreDependency
from evomerge.service.problems import RESPONSES, Fault, ProblemError
from evomerge.service.summary import candidate_detail, candidate_summaries, measure_named
from evomerge.store import Store, summaries
from evomerge.store.rows import ListedCandidate, Status
from evomerge.store.summaries import Order

router = APIRouter(prefix="/api/v1/searches/{name}", tags=["candidates"], responses=RESPONSES)

MAX_LISTED = 500
_LARGEST = 2**31 - 1

CandidateNumber = Annotated[int, Path(ge=0, le=_LARGEST)]
CandidateQuery = Annotated[int, Query(ge=0, le=_LARGEST)]


@router.get("/candidates")
def candidates(
    store: StoreDependency,
    status: Annotated[list[Status] | None, Query()] = None,
    origin: Annotated[str | None, Query(max_length=40)] = None,
    sort: Annotated[str, Query(max_length=100, description="number, or an objective")] = "number",
    order: Literal["asc", "desc"] = "asc",
    front: bool = False,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> CandidatePage:
    """A page of the matching candidates. If sorted by an objective, candidates without a value of it are left out."""
    objective = None if sort == "number" else measure_named(store.search(), sort).name
    after = () if cursor is None else _read_cursor(cursor, 1 if objective is None else 3)
    rows = summaries.page(
        store,
        Order(objective, order == "desc", after),
        limit + 1,
        statuses=status or (),
        origin=origin,
        front=front,
    )
    more = _cursor(rows[limit - 1], objective) if len(rows) > limit else None
    return CandidatePage(candidates=candidate_summaries(store, rows[:limit]), next=more)


@router.get("/candidates/{number}")
def candidate(number: CandidateNumber, store: StoreDependency) -> CandidateDetail:
    """Everything known about one candidate."""
    _check(store, number)
    return candidate_detail(store, number)


@router.get("/front")
def front(store: StoreDependency) -> Front:
    """The candidates on the Pareto front."""
    rows = summaries.page(store, Order(), _LARGEST, front=True)
    return Front(candidates=candidate_summaries(store, rows))


@router.get("/compare")
def compare(
    store: StoreDependency,
    a: CandidateQuery,
    b: CandidateQuery,
    split: Literal["search", "held_out"] = "search",
    objective: Annotated[str | None, Query(max_length=100)] = None,
) -> Compared:
    """Compare two candidates in every objective and constraint, and item by item in one, by default the first."""
    _check(store, a, b)
    comparisons = [comparison for comparison in compared(store, a, b) if comparison.split == split]
    measure = measure_named(store.search(), objective)
    items = items_of(store, (a, b), split, measure)
    return Compared(comparisons=comparisons, objective=measure.name, items=[_compared(item) for item in items])


@router.get("/pictures/{picture}", response_class=Response, responses={200: {"content": {"image/*": {}}}})
def picture(store: StoreDependency, picture: Annotated[str, Path(pattern="^[0-9a-f]{64}$")]) -> Response:
    """A thumbnail of a picture that items of the search show, by its hash."""
    image = store.thumbnail(picture)
    if image is None:
        raise ProblemError(404, "There is no such picture", detail="No item of the search shows it.")
    return _image(image)


@router.get(
    "/candidates/{number}/drawings/{item}", response_class=Response, responses={200: {"content": {"image/*": {}}}}
)
def drawing(
    store: StoreDependency,
    number: CandidateNumber,
    item: CandidateNumber,
    split: Literal["search", "held_out"] = "search",
    objective: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """A thumbnail of what a candidate drew for an item in an objective, by default the first."""
    _check(store, number)
    measure = measure_named(store.search(), objective)
    image = store.drawings(number, split).get(measure.version, {}).get(item)
    if image is None:
        raise ProblemError(404, "There is no such drawing", detail="Nothing was drawn of the item, or it is not kept.")
    return _image(image)


def _image(image: bytes) -> Response:
    return Response(image, media_type=media_type(image), headers={"Cache-Control": "private, max-age=86400"})


def _compared(item: ItemAnswers) -> ComparedItem:
    a, b = (Side(score=one.score, answer=one.answer, drawn=one.drawn) for one in item.answered)
    return ComparedItem(item=item.number, text=item.text, gold=item.right, a=a, b=b, pictures=list(item.pictures))


def _check(store: Store, *numbers: int) -> None:
    """Respond with 404 if any of these candidates does not exist."""
    there = {row.number for row in summaries.candidates(store, numbers)}
    if missing := [number for number in numbers if number not in there]:
        raise ProblemError(404, "There is no such candidate", detail=f"The search has none of number {missing[0]}.")


def _cursor(last: ListedCandidate, objective: str | None) -> str:
    """The cursor of the next page: the sort keys of the last candidate on this page."""
    mean = [] if objective is None else [last.objectives[objective].mean, int(last.on_front)]
    keys = [*mean, last.number]
    return base64.urlsafe_b64encode(json.dumps(keys).encode()).decode()


def _read_cursor(text: str, length: int) -> tuple[float, ...]:
    try:
        keys = json.loads(base64.urlsafe_b64decode(text.encode()))
        if not isinstance(keys, list) or len(keys) != length or not 0 <= keys[-1] <= _LARGEST:
            raise ValueError
        if not all(type(key) in (int, float) and math.isfinite(key) for key in keys) or type(keys[-1]) is not int:
            raise ValueError
        return tuple(key if i == length - 1 else float(key) for i, key in enumerate(keys))
    except (ValueError, TypeError, OverflowError, RecursionError):
        fault = Fault(field="cursor", problem="is not one that this list gave", hint="Start again without it.")
        raise ProblemError(422, "The request is not valid", fault) from None
