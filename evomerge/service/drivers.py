"""Drivers of searches: started as processes or Ray jobs, told what to do through the store, found again by its lease.

Nothing of them is kept in this process, so that the server may end at any time and a new one knows as much.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Literal

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
"""States that a driver leaves behind only where it did not end as it should."""


@dataclass(frozen=True)
class DriverState:
    """What is known of a search's driver.

    Attributes:
        state: of the search, "starting" and "interrupted" among them.
        why: what ended the search, or what a driver that did not come up said last.
        holds: whether a process holds the lease.
    """

    state: str
    why: str
    holds: bool


class Drivers:
    """Starts, tells and finds the drivers of the searches in a root.

    Args:
        jobs: where drivers are started; on this machine when left out.
    """

    def __init__(self, root: Root, jobs: RayJobs | None = None) -> None:
        self._root = root
        self._jobs = jobs
        self._starting = threading.Lock()

    def look(self, name: str, store: Store) -> DriverState:
        """What the driver of a search is doing. Costs a few short queries and two small files."""
        search = store.search()
        if current_holder(store) is not None:
            if _last(store, "lease", "began again") > _last(store, "state"):  # it opens models and tasks
                return DriverState("starting", "", holds=True)
            return DriverState(search.state, search.why, holds=True)
        if self._is_starting(name, store):
            return DriverState("starting", "", holds=False)
        if search.state not in UNFINISHED:
            return DriverState(search.state, search.why, holds=False)
        state = search.state if search.state == "created" else "interrupted"
        return DriverState(state, search.why or self._complaint(name), holds=False)

    def tell(self, name: str, store: Store, verb: Verb) -> str:
        """Give the driver a word; what was done, for people.

        Raises:
            ProblemError: there is no driver (409).
        """
        holder = current_holder(store)
        if holder is None and self._is_starting(name, store):
            raise ProblemError(409, "The driver is starting", detail="It takes no commands yet: wait a few seconds.")
        if holder is None:
            raise ProblemError(409, "No driver is at work", detail=f"{name} has none; resume it.")
        store.request_command(verb)
        return f"told {holder} to {verb}"

    def resume(self, name: str, store: Store) -> str:
        """Wake a driver that is paused, or start one; what was done, for people."""
        if current_holder(store) is not None:
            return self.tell(name, store, "resume")
        self.start(name, store)
        return f"started a driver of {name}"

    def start(self, name: str, store: Store, command: Command = "resume") -> None:
        """Start a driver that goes on with a search, or one that only confirms it.

        Raises:
            ProblemError: one is at work or starting already (409), or cannot be started (500).
        """
        folder = self._root.folder_of(name)
        if command == "confirm" and (holder := current_holder(store)) is not None:
            raise ProblemError(
                409, "A driver is at work", detail=f"It is {holder}, and confirms at its end; stop it first."
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
        """Give a search another budget, also one that a driver is at work on; and go on with it if that is wanted.

        Raises:
            ProblemError: the driver hears nothing now (409).
            InputError: no bound is left.
        """
        state = self.look(name, store)
        if state.state == "confirming" or (state.state == "starting" and not state.holds):
            detail = f"The search is {state.state}, and takes no other budget: wait until that is over."
            raise ProblemError(409, "Not now", detail=detail)
        changes = wanted.model_dump(exclude_unset=True, exclude={"resume"})
        message = _budget_text(change_budget(self._root.folder_of(name), store, changes))
        if state.holds:
            store.request_command("reread")
        goes_on = wanted.resume and state.state not in ("starting", "running")
        return f"{message}; {self.resume(name, store)}" if goes_on else message

    def _is_starting(self, name: str, store: Store) -> bool:
        """Whether a driver was started here that has not held the lease yet: it imports and checks for a while."""
        record = processes.read(self._root.folder / name / RECORD_NAME)
        if record is None or current_epoch(store) > record.get("after", 0):
            return False
        if "job" in record:
            return self._jobs is not None and self._jobs.is_alive(record)
        return processes.is_alive(record)

    def _complaint(self, name: str) -> str:
        """What a driver that ended said last of a fault."""
        record = processes.read(self._root.folder / name / RECORD_NAME)
        if self._jobs is not None and record is not None and "job" in record:
            return self._jobs.complaint(record)[:500]
        lines = processes.tail(self._root.folder / name / LOG_NAME).splitlines()
        return next((line for line in reversed(lines) if line.startswith("error: ")), "")[:500]


def _last(store: Store, *kinds: str) -> int:
    """The number of the newest event of these kinds; 0 where there is none."""
    return max((event.seq for event in store.events(kinds=kinds, newest=1)), default=0)


def _budget_text(budget: Budget) -> str:
    bounds: dict[Literal["candidates", "hours", "patience", "cost"], str] = {
        "candidates": "candidates", "hours": "hours", "patience": "generations without a better front",
        "cost": "in money",
    }  # fmt: skip
    parts = [f"{getattr(budget, key):g} {words}" for key, words in bounds.items() if getattr(budget, key) is not None]
    return f"the budget is {', '.join(parts)}"
