"""The page of exports: start them, follow their progress, and see the folder and its model card."""

from __future__ import annotations

import re

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from evomerge.errors import InputError
from evomerge.report.entries import SOURCE
from evomerge.report.licences import CARD
from evomerge.report.search_status import SearchStatus
from evomerge.search.estimation.preference import BEST, KNEE
from evomerge.service.api.searches import status_with
from evomerge.service.bodies import Export
from evomerge.service.dependencies import DriversDependency, ExportsDependency, RootDependency, StoreDependency
from evomerge.service.exports import Exporter
from evomerge.service.pages.model_card import Card, card_of
from evomerge.service.pages.rendering import api_url, page, shell_place
from evomerge.service.pages.search import choices, place
from evomerge.service.problems import ProblemError

router = APIRouter(include_in_schema=False)


@router.get("/searches/{name}/exports")
def exports(
    request: Request, root: RootDependency, drivers: DriversDependency, store: StoreDependency,
    known: ExportsDependency, name: str, candidate: str = "best",
) -> HTMLResponse:  # fmt: skip
    """The exports of a search, and a form to start more."""
    status = status_with(store, name, drivers.state_of(name, store))
    try:
        existing = known.all(name)
    except InputError:  # its folder is on another machine
        existing = []
    taken = {export.id for export in existing}
    wanted = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{name[:40]}-{candidate}")[:60]
    proposal = next(
        option for option in (wanted, *(f"{wanted}-{i}" for i in range(2, len(taken) + 3))) if option not in taken
    )
    return page(
        request, "exports.html", here="", status=status, exports=existing, candidate=candidate, proposal=proposal,
        cards={export.id: _card(known, name, export) for export in existing},
        choices=choices(status), roles=[pick.role for pick in status.picks if pick.role not in (BEST, KNEE)],
        source=_unmerged(status, candidate),
        place=shell_place(place(root, name)),
    )  # fmt: skip


def _unmerged(status: SearchStatus, candidate: str) -> str:
    """The pick that a name refers to, if it is an unmerged source."""
    if candidate == BEST and not any(pick.role == BEST for pick in status.picks):
        candidate = KNEE
    return next((pick.called for pick in status.picks if pick.role == candidate and pick.origin == SOURCE), "")


def _card(known: Exporter, name: str, export: Export) -> Card | None:
    """The model card of a finished export."""
    if export.state != "done":
        return None
    try:
        text = known.file(name, export.id, CARD).read_text(encoding="utf-8", errors="replace")
    except (ProblemError, OSError):
        return None
    return card_of(text, f"{api_url(name)}/exports/{export.id}/files/")
