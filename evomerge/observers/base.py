"""What an observer is, what it is told of a search, and what it keeps between two processes.

An observer reads and never writes to a search: whatever it does, the search is the same.
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
"""The folder in a search's folder where observers keep what is theirs."""

ENDED = ("finished", "stopped", "cancelled", "failed")
"""States of a search in which nothing more will come, unless it is resumed."""


class PoolCounts(Protocol):
    """What a pool is doing: workers by what they do now, and the jobs that wait for one."""

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
    """What happened in a search since the last look, and where it stands.

    Attributes:
        events: the new ones, oldest first.
        candidates: those that an event of these ended, by number, as they are now.
        best: the best candidate by each objective that has one, by the objective's name.
        held_out: means on the held-out split by objective, of every candidate that was scored there.
        winner: the number of the candidate that the last confirmation named, None before it has.
        workers: None where they are not known: in another process than the driver's.
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
        """The candidate that an event ended; None if it ended none."""
        return self.candidates.get(event.candidate) if event.candidate is not None and ends(event) else None

    @property
    def objectives(self) -> Sequence[Measure]:
        """The objectives of the search."""
        return self.search.record.objectives


def ends(event: EventRow) -> bool:
    """Whether nothing more of a candidate will be scored on the search split after this event."""
    if event.kind == "failure":
        return event.read(Failure).final
    return event.kind in ("result", "cached", "eliminated", "done")


def genome_of(row: CandidateRow, search: SearchRow) -> dict[str, float]:
    """A candidate's genome by the names of the parameters; empty for a baseline that has none."""
    if row.genome is None:
        return {}
    names = [parameter.name for parameter in search.record.parameters]
    return dict(zip(names, np.asarray(row.genome).tolist(), strict=True))


def named(number: int) -> str:
    """How a candidate is named to people: c0042."""
    return f"c{number:04d}"


class Observer(ABC):
    """Tells somebody else of a search. Whatever it raises is logged once, and it is told no more."""

    seq: int = 0
    """The last event that it was told of. Set at the start to what an earlier process told; later ``hub`` counts on."""

    @abstractmethod
    def tell(self, news: News) -> None:
        """Take what is new: at most once a second, and also when there are no new events."""

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Let go of what is open. Called once, after the last news."""


class ObserverSettings(BaseModel, ABC):
    """What the search file says of one observer: an entry of ``observers:``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str

    def check(self) -> None:
        """Raise InputError where this observer cannot work here: a package is missing."""

    @abstractmethod
    def build(self, folder: Path, search: SearchRow) -> Observer:
        """Start it for the search in ``folder``; raises whatever goes wrong."""


def package(name: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        InputError: it is not installed; says which extra brings it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        problem = f"needs the package {name}, which is not installed here ({error})"
        raise InputError(f"observers: {extra}", problem, f"Install it: pip install 'evomerge[{extra}]'") from None


def locked(path: Path, kind: str) -> IO[bytes]:
    """A file opened for this process alone, so that nobody is told everything twice.

    Raises:
        InputError: another process holds it.
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
    """What an observer keeps in a search's folder: the ids of its runs, and the last event that it was told of.

    Raises:
        InputError: another process tells the same observer of this search.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._lock = locked(folder / FOLDER_NAME / f"{kind}.lock", kind)
        self._path = folder / FOLDER_NAME / f"{kind}.json"
        self.content: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def save(self, **values: Any) -> None:
        """Replace these values; the file is whole at any time."""
        self.content |= values
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content))
        partial.replace(self._path)

    def close(self) -> None:
        self._lock.close()
