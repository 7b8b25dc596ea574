"""Searches: listed, made, shown, and told what to do."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path
from starlette.responses import FileResponse, PlainTextResponse

from evomerge.report.status import SearchStatus, status_of
from evomerge.search.folder import FILE_NAME, LOGS_NAME
from evomerge.search.search_file import SearchFile
from evomerge.service.allowed import PLACE, checked_file
from evomerge.service.app import CheckerDependency, DriversDependency, RootDependency, SettingsDependency
from evomerge.service.bodies import GivenFile, NewBudget, NewSearch, Plan, Searches, SearchSummary, Told
from evomerge.service.contained import contained
from evomerge.service.drivers import LOG_NAME, Drivers
from evomerge.service.problems import RESPONSES, Fault, ProblemError
from evomerge.service.root import Root
from evomerge.service.summary import summaries_of, summary_of

router = APIRouter(prefix="/api/v1/searches", tags=["searches"], responses=RESPONSES)


@router.get("")
def searches(root: RootDependency, drivers: DriversDependency) -> Searches:
    """All searches, those that began last first."""
    return Searches(searches=list(summaries_of(root, drivers)))


@router.post("", status_code=201)
def create(
    given: NewSearch,
    root: RootDependency,
    drivers: DriversDependency,
    checker: CheckerDependency,
    settings: SettingsDependency,
) -> SearchStatus:
    """Make a search from a search file, which is checked as `evomerge validate` does, and start its driver."""
    _check_name(checked_file(given.file, settings.folders), root)
    name = checker.create(given.file, settings.folders)
    if given.start:
        drivers.start(name)
    return _status(name, root, drivers)


@router.post("/validate")
def validate(given: GivenFile, root: RootDependency, checker: CheckerDependency, settings: SettingsDependency) -> Plan:
    """Check a search file wholly, and say what the search is going to do and cost. Nothing is scored."""
    _check_name(checked_file(given.file, settings.folders), root)
    return checker.plan(given.file, settings.folders)


@router.get("/{name}")
def show(name: str, root: RootDependency, drivers: DriversDependency) -> SearchStatus:
    """Where a search stands: what `evomerge status --json` prints, with "starting" among the states."""
    return _status(name, root, drivers)


@router.get("/{name}/summary")
def summary(name: str, root: RootDependency, drivers: DriversDependency) -> SearchSummary:
    """A search as the list of all shows it."""
    with root.store(name) as store:
        return summary_of(store, drivers.look(name, store)).model_copy(update={"name": name})


@router.get("/{name}/file", response_class=PlainTextResponse)
def search_file(name: str, root: RootDependency) -> PlainTextResponse:
    """The search file, as the search's folder has it."""
    text = contained(root.folder_of(name), FILE_NAME).read_text(encoding="utf-8")
    return PlainTextResponse(text, media_type="text/plain; charset=utf-8")


@router.post("/{name}/budget", status_code=202)
def budget(name: str, wanted: NewBudget, drivers: DriversDependency) -> Told:
    """Change the budget of a search, also while it runs, and go on with it if that is wanted."""
    return Told(told=drivers.change_budget(name, wanted))


@router.post("/{name}/pause", status_code=202)
def pause(name: str, drivers: DriversDependency) -> Told:
    """Start nothing new until it is resumed; what runs goes on."""
    return Told(told=drivers.tell(name, "pause"))


@router.post("/{name}/resume", status_code=202)
def resume(name: str, drivers: DriversDependency) -> Told:
    """Wake the driver of a search, or start one where there is none."""
    return Told(told=drivers.resume(name))


@router.post("/{name}/stop", status_code=202)
def stop(name: str, drivers: DriversDependency) -> Told:
    """Let what runs finish, then end. The search can be resumed."""
    return Told(told=drivers.tell(name, "stop"))


@router.post("/{name}/cancel", status_code=202)
def cancel(name: str, drivers: DriversDependency) -> Told:
    """End now. The search can be resumed."""
    return Told(told=drivers.tell(name, "cancel"))


@router.get("/{name}/logs/{file}", response_class=PlainTextResponse)
def log(name: str, file: Annotated[str, Path(max_length=200)], root: RootDependency) -> FileResponse:
    """A log: driver.log, or that of a candidate, such as c0042.log."""
    folder = root.folder_of(name)
    found = contained(folder, file if file == LOG_NAME else f"{LOGS_NAME}/{file}")
    return FileResponse(found, media_type="text/plain; charset=utf-8")


def _check_name(file: SearchFile, root: Root) -> None:
    """Refuse the name of a search that is there (409)."""
    if file.name in root.names():
        fault = Fault(field=f"{PLACE}: name", problem=f"{file.name} is there already", mend="Choose another.")
        raise ProblemError(409, "There is a search of this name already", fault, detail=file.name)


def _status(name: str, root: Root, drivers: Drivers) -> SearchStatus:
    with root.store(name) as store:
        driver = drivers.look(name, store)
        update: dict[str, Any] = {"name": name, "state": driver.state, "why": driver.why}
        return status_of(store).model_copy(update=update)
