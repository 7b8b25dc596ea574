"""The interface of observers, the news that they get about a search, and the state that they keep between processes.

Observers read a search and never write to it, so whatever they do, the search stays the same.
"""

from __future__ import annotations

import fcntl
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from evomerge.errors import InputError
from evomerge.store.events import Failure
from evomerge.store.record import Measure
from evomerge.store.rows import CandidateRow, EventRow, SearchRow, Status

FOLDER_NAME = "observers"
"""The folder in a search's folder where observers keep their state."""

ENDED = ("finished", "stopped", "cancelled", "failed")
"""States of a search in which nothing more happens unless it is resumed."""


class PoolCounts(Protocol):
    """What a pool is doing: its workers by state, and the jobs that wait for one."""

    @property
    def workers(self) -> int: ...

    @property
    def busy(self) -> int: ...

    @property
    def starting(self) -> int: ...

    @property
    def queued(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class News:
    """What has happened in a search since the last poll, and its current status.

    Attributes:
        events: the new events, oldest first.
        candidates: the current state of the candidates that these events ended, by number.
        best: the best candidate in each objective that has one, by the objective's name.
        held_out: means on the held-out split by objective, for every candidate that was scored there.
        winner: the number of the winner of the last confirmation; None before that.
        workers: None if unknown, which is the case outside the driver's process.
    """

    search: SearchRow
    events: Sequence[EventRow]
    candidates: Mapping[int, CandidateRow]
    counts: Mapping[Status, int]
    front: Sequence[CandidateRow]
    best: Mapping[str, CandidateRow]
    held_out: Mapping[int, Mapping[str, float]]
    winner: int | None
    workers: PoolCounts | None

    def ended_by(self, event: EventRow) -> CandidateRow | None:
        """The candidate whose scoring an event ended; None for other events."""
        return self.candidates.get(event.candidate) if event.candidate is not None and ends(event) else None

    @property
    def objectives(self) -> Sequence[Measure]:
        """The objectives of the search."""
        return self.search.record.objectives


def ends(event: EventRow) -> bool:
    """Whether an event is the last one of a candidate's scoring on the search split."""
    if event.kind == "failure":
        return event.read(Failure).final
    return event.kind in ("result", "cached", "eliminated", "done")


def genome_of(row: CandidateRow, search: SearchRow) -> dict[str, float]:
    """A candidate's genome by parameter name; empty for a baseline without one."""
    if row.genome is None:
        return {}
    names = [parameter.name for parameter in search.record.parameters]
    return dict(zip(names, np.asarray(row.genome).tolist(), strict=True))


def named(number: int) -> str:
    """The display id of a candidate, such as c0042."""
    return f"c{number:04d}"


class Observer(ABC):
    """Reports a search to another system. If it raises an exception, that is logged once and it is dropped."""

    seq: int = 0
    """The last event that was reported. Initialised from the saved state of an earlier process; ``hub`` updates it."""

    @abstractmethod
    def tell(self, news: News) -> None:
        """Report the news. Called at most once a second, even if there are no new events."""

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Release resources. Called once, after the last news."""


class ObserverSettings(BaseModel, ABC):
    """The settings of one observer: an entry of ``observers:`` in the search file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str

    def check(self) -> None:
        """Raise InputError if this observer cannot work here, for example because a package is missing."""

    @abstractmethod
    def build(self, folder: Path, search: SearchRow) -> Observer:
        """Start the observer for the search in ``folder``; may raise any exception."""


def package(name: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        InputError: it is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        problem = f"needs the package {name}, which is not installed here ({error})"
        raise InputError(f"observers: {extra}", problem, f"Install it: pip install 'evomerge[{extra}]'") from None


def locked(path: Path, kind: str) -> IO[bytes]:
    """Open a file and lock it for this process, so that nothing is reported twice.

    Raises:
        InputError: another process has locked it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        problem = f"another process already reports this search to {kind}"
        raise InputError(f"observers: {kind}", problem, "End that one, or leave this one out.") from None
    return file


class ObserverState:
    """The state of an observer in a search's folder: the ids of its runs, and the last event that it reported.

    Raises:
        InputError: another process runs the same observer for this search.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._lock = locked(folder / FOLDER_NAME / f"{kind}.lock", kind)
        self._path = folder / FOLDER_NAME / f"{kind}.json"
        self.content: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def save(self, **values: Any) -> None:
        """Replace these values. The file is replaced atomically."""
        self.content |= values
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content))
        partial.replace(self._path)

    def close(self) -> None:
        self._lock.close()
