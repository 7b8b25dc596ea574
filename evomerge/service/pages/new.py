"""The page for a new search: a form, the search file that it writes, and the lines of faults in it."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from evomerge.printable import printable
from evomerge.search.settings.search_file import SearchFile
from evomerge.service.bodies import GivenFile
from evomerge.service.dependencies import RootDependency
from evomerge.service.pages import forms
from evomerge.service.pages.lines import FaultPlace, place_of
from evomerge.service.pages.rendering import page

router = APIRouter(include_in_schema=False)


class FaultyField(GivenFile):
    """A search file, and the field in it that is wrong."""

    field: str


@router.get("/new")
def new(request: Request, root: RootDependency) -> HTMLResponse:
    """The form."""
    taken = set(root.names())
    proposal = next(name for i in range(1, len(taken) + 2) if (name := f"search-{i}") not in taken)
    evaluators = forms.evaluators()
    return page(
        request, "new.html", here="new", proposal=proposal, spaces=forms.spaces(), evaluators=evaluators,
        sections=forms.sections(sorted(taken)), optimizers=forms.optimizers(),
        about={
            "evaluators": {evaluator.name: evaluator.hint for evaluator in evaluators},
            "keys": [*SearchFile.model_fields],
            "several": forms.SEVERAL,
        },
    )  # fmt: skip


@router.post("/new/line")
def line(fault: FaultyField) -> FaultPlace:
    """The line of a fault in a search file."""
    place = place_of(fault.file, fault.field)
    return replace(place, path=tuple(printable(key) for key in place.path))
