"""Searches: listing, creating, showing and controlling them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Path as InPath
from fastapi.concurrency import run_in_threadpool
from starlette.responses import FileResponse, PlainTextResponse

from evomerge.files import read_text
from evomerge.report.confirmed import UNCONFIRMED
from evomerge.report.search_status import SearchStatus
from evomerge.report.status import status_of
from evomerge.search.settings.folder import FILE_NAME, LOGS_NAME
from evomerge.service.allowed import PLACE, checked_file
from evomerge.service.bodies import CommandResult, GivenFile, NewBudget, NewSearch, Plan, Searches, SearchSummary
from evomerge.service.contained import contained
from evomerge.service.dependencies import (
    CheckerDependency,
    DriversDependency,
    RootDependency,
    SettingsDependency,
    StoreDependency,
)
from evomerge.service.disconnects import while_connected
from evomerge.service.drivers import LOG_NAME, Drivers, DriverState
from evomerge.service.problems import RESPONSES, Fault, ProblemError
from evomerge.service.root import Root
from evomerge.service.summary import summaries_of, summary_of
from evomerge.store import Store

router = APIRouter(prefix="/api/v1/searches", tags=["searches"], responses=RESPONSES)


@router.get("")
def searches(root: RootDependency, drivers: DriversDependency) -> Searches:
    """All searches, newest first."""
    return Searches(searches=list(summaries_of(root, drivers)))


@router.post("", status_code=201)
async def create(
    given: NewSearch,
    root: RootDependency,
    drivers: DriversDependency,
    checker: CheckerDependency,
    settings: SettingsDependency,
) -> SearchStatus:
    """Create a search from a search file, which is checked as by `evomerge validate`, and start its driver."""
    await run_in_threadpool(_check_text, given.file, root, settings.folders)
    name = await checker.create(given.file, settings.folders)
    return await run_in_threadpool(_created, name, given.start, root, drivers)


@router.post("/validate")
async def validate(
    given: GivenFile, request: Request, root: RootDependency, checker: CheckerDependency, settings: SettingsDependency
) -> Plan:
    """Check a search file completely, and return what the search would do and cost. Nothing is scored."""
    await run_in_threadpool(_check_text, given.file, root, settings.folders)
    return await while_connected(request, checker.plan(given.file, settings.folders))


@router.get("/{name}")
def show(name: str, store: StoreDependency, drivers: DriversDependency) -> SearchStatus:
    """The status of a search, as `evomerge status --json` prints it, with "starting" as an additional state."""
    return status_with(store, name, drivers.state_of(name, store))


@router.get("/{name}/summary")
def summary(name: str, store: StoreDependency, drivers: DriversDependency) -> SearchSummary:
    """The summary of a search, as in the list of all searches."""
    return summary_of(name, store, drivers.state_of(name, store))


@router.get("/{name}/file", response_class=PlainTextResponse)
def search_file(name: str, root: RootDependency) -> PlainTextResponse:
    """The search file in the search's folder."""
    text = read_text(contained(root.folder_of(name), FILE_NAME), FILE_NAME)
    return PlainTextResponse(text, media_type="text/plain; charset=utf-8")


@router.post("/{name}/budget", status_code=202)
def budget(name: str, wanted: NewBudget, store: StoreDependency, drivers: DriversDependency) -> CommandResult:
    """Change the budget of a search, even while it is running, and resume it if requested."""
    return CommandResult(told=drivers.change_budget(name, store, wanted))


@router.post("/{name}/pause", status_code=202)
def pause(name: str, store: StoreDependency, drivers: DriversDependency) -> CommandResult:
    """Start nothing new until the search is resumed; running candidates continue."""
    return CommandResult(told=drivers.send_command(name, store, "pause"))


@router.post("/{name}/resume", status_code=202)
def resume(name: str, store: StoreDependency, drivers: DriversDependency) -> CommandResult:
    """Resume the paused driver of a search, or start one if there is none."""
    return CommandResult(told=drivers.resume(name, store))


@router.post("/{name}/stop", status_code=202)
def stop(name: str, store: StoreDependency, drivers: DriversDependency) -> CommandResult:
    """Let running candidates finish, then end. The search can be resumed."""
    return CommandResult(told=drivers.send_command(name, store, "stop"))


@router.post("/{name}/cancel", status_code=202)
def cancel(name: str, store: StoreDependency, drivers: DriversDependency) -> CommandResult:
    """End immediately. The search can be resumed."""
    return CommandResult(told=drivers.send_command(name, store, "cancel"))


@router.post("/{name}/confirm", status_code=202)
def confirm(name: str, store: StoreDependency, drivers: DriversDependency) -> CommandResult:
    """Score the front and the best on the held-out split and choose the winner, without continuing the search."""
    drivers.start(name, store, "confirm")
    return CommandResult(told=f"started a confirmation of {name}")


@router.get("/{name}/logs/{file}", response_class=PlainTextResponse)
def log(name: str, file: Annotated[str, InPath(max_length=200)], root: RootDependency) -> FileResponse:
    """A log: driver.log, or the log of a candidate, such as c0042.log."""
    folder = root.folder_of(name)
    log_file = contained(folder, file if file == LOG_NAME else f"{LOGS_NAME}/{file}")
    return FileResponse(log_file, media_type="text/plain; charset=utf-8")


def _check_text(text: str, root: Root, folders: Sequence[Path]) -> None:
    """Refuse a search file whose text alone is already wrong, or whose name is already taken (409)."""
    file = checked_file(text, folders)
    if root.has(file.name):
        fault = Fault(field=f"{PLACE}: name", problem=f"{file.name} already exists", hint="Choose another.")
        raise ProblemError(409, "A search of this name already exists", fault, detail=file.name)


def _created(name: str, start: bool, root: Root, drivers: Drivers) -> SearchStatus:
    """The status of a search that was just created, after starting its driver if requested."""
    with root.store(name) as store:
        if start:
            drivers.start(name, store)
        return status_with(store, name, drivers.state_of(name, store))


def status_with(store: Store, name: str, driver: DriverState) -> SearchStatus:
    """The status of a search, under the name that it has here, including the state of its driver."""
    status = status_of(store)
    update: dict[str, Any] = {"name": name}
    if (driver.state, status.state) != ("finished", UNCONFIRMED):
        update |= {"state": driver.state, "why": driver.why}
    return status.model_copy(update=update)
