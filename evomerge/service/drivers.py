"""Drivers of searches: started as processes or Ray jobs, controlled through the store, and found again by its lease.

This process keeps no state about them, so the server can be restarted at any time without losing track of them.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Literal

from evomerge.report.failures import driver_failure, is_driven
from evomerge.search.settings.folder import STORE_VARIABLE
from evomerge.search.settings.rebudget import change_budget
from evomerge.search.settings.sections import Budget, Cluster
from evomerge.service import processes
from evomerge.service.bodies import NewBudget
from evomerge.service.problems import ProblemError
from evomerge.service.ray_jobs import Command, RayJobs
from evomerge.service.root import Root
from evomerge.store import Store, Verb, current_holder
from evomerge.store.lease import current_epoch

LOG_NAME = "driver.log"
RECORD_NAME = "driver.json"

UNFINISHED = ("created", "running", "paused", "confirming")
"""States that remain in the store without a driver only if the driver did not end properly."""


@dataclass(frozen=True)
class DriverState:
    """What is known about a search's driver.

    Attributes:
        state: the state of the search, including "starting" and "interrupted".
        why: what ended the search, or the last error message of a driver that failed to start.
        holds: whether a process holds the lease.
    """

    state: str
    why: str
    holds: bool


class Drivers:
    """Starts, controls and finds the drivers of the searches in a root.

    Args:
        jobs: starts drivers on a Ray cluster; by default they are started on this machine.
    """

    def __init__(self, root: Root, jobs: RayJobs | None = None) -> None:
        self._root = root
        self._jobs = jobs
        self._starting = threading.Lock()

    def state_of(self, name: str, store: Store) -> DriverState:
        """What the driver of a search is doing. This takes a few short queries and reads two small files."""
        search = store.search()
        if is_driven(store):
            if _last(store, "lease", "began again") > _last(store, "state"):  # it is opening models and tasks
                return DriverState("starting", "", holds=True)
            return DriverState(search.state, search.why, holds=True)
        if self._is_starting(name, store):
            return DriverState("starting", "", holds=False)
        why = driver_failure(store) or search.why
        if search.state not in UNFINISHED:
            return DriverState(search.state, why, holds=False)
        state = search.state if search.state == "created" else "interrupted"
        return DriverState(state, why or self._last_error(name), holds=False)

    def send_command(self, name: str, store: Store, verb: Verb) -> str:
        """Send the driver a command. Returns what was done, in words.

        Raises:
            ProblemError: there is no driver (409).
        """
        holder = current_holder(store)
        if holder is None and self._is_starting(name, store):
            raise ProblemError(409, "The driver is starting", detail="It takes no commands yet: wait a few seconds.")
        if holder is None:
            raise ProblemError(409, "No driver is running", detail=f"{name} has none; resume it.")
        store.request_command(verb)
        return f"told {holder} to {verb}"

    def resume(self, name: str, store: Store) -> str:
        """Resume a paused driver, or start one. Returns what was done, in words."""
        if current_holder(store) is not None:
            return self.send_command(name, store, "resume")
        self.start(name, store)
        return f"started a driver of {name}"

    def start(self, name: str, store: Store, command: Command = "resume") -> None:
        """Start a driver that resumes a search, or one that only confirms it.

        Raises:
            ProblemError: a driver is already running or starting (409), or cannot be started (500).
        """
        folder = self._root.folder_of(name)
        if command == "confirm" and (holder := current_holder(store)) is not None:
            raise ProblemError(
                409, "A driver is running", detail=f"It is {holder}, and confirms at its end; stop it first."
            )
        with self._starting:
            if self._is_starting(name, store):
                raise ProblemError(409, "A driver is starting already")
            log, record = folder / LOG_NAME, folder / RECORD_NAME
            details = {"after": current_epoch(store)}
            if self._jobs is not None:
                cluster = Cluster.model_validate(store.search().settings["cluster"])
                processes.write(record, details | self._jobs.start(name, folder, log, cluster, command))
                return
            arguments = [sys.executable, "-m", "evomerge", command, str(folder)]
            more = {} if self._root.database is None else {STORE_VARIABLE: self._root.database}
            processes.start(arguments, self._root.folder, log, record, details, **more)

    def change_budget(self, name: str, store: Store, wanted: NewBudget) -> str:
        """Change the budget of a search, even while a driver is running, and resume the search if requested.

        Raises:
            ProblemError: the driver takes no commands at the moment (409).
            InputError: no bound would be left.
        """
        state = self.state_of(name, store)
        if state.state == "confirming" or (state.state == "starting" and not state.holds):
            detail = f"The search is {state.state}, and its budget cannot be changed: wait until that is over."
            raise ProblemError(409, "Not now", detail=detail)
        changes = wanted.model_dump(exclude_unset=True, exclude={"resume"})
        message = _budget_text(change_budget(self._root.folder_of(name), store, changes))
        if state.holds:
            store.request_command("reread")
        goes_on = wanted.resume and state.state not in ("starting", "running")
        return f"{message}; {self.resume(name, store)}" if goes_on else message

    def _is_starting(self, name: str, store: Store) -> bool:
        """Whether a driver was started here that has not acquired the lease yet: it imports and checks first."""
        record = processes.read(self._root.folder / name / RECORD_NAME)
        if record is None or current_epoch(store) > record.get("after", 0):
            return False
        if "job" in record:
            return self._jobs is not None and self._jobs.is_alive(record)
        return processes.is_alive(record)

    def _last_error(self, name: str) -> str:
        """The last error message of a driver that has ended."""
        record = processes.read(self._root.folder / name / RECORD_NAME)
        if self._jobs is not None and record is not None and "job" in record:
            return self._jobs.last_error(record)[:500]
        return processes.last_error(processes.tail(self._root.folder / name / LOG_NAME))[:500]


def _last(store: Store, *kinds: str) -> int:
    """The number of the newest event of these kinds; 0 if there is none."""
    return max((event.seq for event in store.events(kinds=kinds, newest=1)), default=0)


def _budget_text(budget: Budget) -> str:
    bounds: dict[Literal["candidates", "hours", "patience", "cost"], str] = {
        "candidates": "candidates", "hours": "hours", "patience": "generations without a better front",
        "cost": "in money",
    }  # fmt: skip
    parts = [f"{getattr(budget, key):g} {words}" for key, words in bounds.items() if getattr(budget, key) is not None]
    return f"the budget is {', '.join(parts)}"
