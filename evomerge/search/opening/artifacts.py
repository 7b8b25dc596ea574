"""A search's folder in object storage: copied there while the search runs, and fetched to continue elsewhere.

A driver may vanish with its machine and its disk; only the copy is left then. The copy is at
``artifacts/NAME``. A store that is a file is copied last in each turn, as a snapshot, so that what observers remember
is never ahead of its events.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from evomerge.errors import InputError
from evomerge.objects import PARTIAL, Storage, StorageError
from evomerge.search.opening.claim import BEAT_S, RECORD, Claim, TakenUpError
from evomerge.search.settings.folder import FILE_NAME, STORE_NAME, has_store
from evomerge.store import Store
from evomerge.store.events import CopyingState

EVERY_S = 60.0
"""How long copying pauses between two turns."""

_REST = 9  # times the duration of a turn: a large store on a slow line is copied at most a tenth of the time
_FAULTS = 3  # a turn is abandoned after this many files that cannot be copied: the storage is unavailable
_MAGIC = b"SQLite format 3\0"
_BESIDE = ("-wal", "-shm", "-journal", ".lock", PARTIAL)  # suffixes of temporary files of SQLite, locks and writers

_log = logging.getLogger(__name__)


def copy_url(artifacts: str, name: str) -> str:
    """The URL of the copy of the search ``name``, below the URL that its search file names."""
    return f"{artifacts.rstrip('/')}/{name}"


def check_artifacts(artifacts: str, name: str, folder: Path | None) -> None:
    """Check that a search can be copied: the place is writable, and holds no search except that of ``folder``.

    Raises:
        InputError: if it cannot.
    """
    storage = Storage(copy_url(artifacts, name), "artifacts")
    storage.probe()
    if folder is not None:
        Claim(storage, folder).check()


class Artifacts:
    """Copies a search's folder in its own threads: neither slow nor broken storage delays or ends a search.

    A failure is logged once, recorded in an event "artifacts", and tried again at every turn.

    Args:
        url: of the copy.
        folder: of the search.

    Raises:
        InputError: see ``check_artifacts``.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._storage = Storage(url, "artifacts")
        self._folder = folder
        self._claim = Claim(self._storage, folder)
        self._copied: dict[Path, object] = {}
        self._fault: InputError | None = None  # what last failed, until everything is copied
        self._lost: TakenUpError | None = None
        self._news: deque[CopyingState] = deque()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._copy, name="artifacts", daemon=True),
            threading.Thread(target=self._beat, name="artifacts claim", daemon=True),
        ]

    def take(self) -> None:
        """Claim the place for this folder. Raises InputError like ``check_artifacts``."""
        self._claim.take()

    def start(self) -> None:
        """Start copying periodically, in a thread."""
        for thread in self._threads:
            thread.start()

    def poll(self, store: Store) -> None:
        """Record news of the copying; called by the driver, which alone writes to the store."""
        while self._news:
            store.record_event(self._news.popleft())

    def close(self) -> InputError | None:
        """Copy what is left, and release the place. Waits until that is done.

        Returns:
            Why the copy does not contain everything in the folder; None if it does.
        """
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        is_complete = self.turn() and self._tried(self._claim.release)
        return None if is_complete else self._lost or self._fault

    def turn(self) -> bool:
        """Copy what changed since the last turn; whether the copy is complete now."""
        if self._lost or not self._tried(self._claim.beat):
            return False
        faults = 0
        for file in self._changed():
            faults += not self._tried(partial(self._put, file))
            if faults >= _FAULTS:
                return False
        if not faults and self._fault is not None:
            self._fault = None
            self._tell("copied", "")
        return not faults

    def _copy(self) -> None:
        rest = 0.0
        while not self._ended.wait(rest):
            started = time.monotonic()
            self.turn()
            rest = max(EVERY_S, _REST * (time.monotonic() - started))

    def _beat(self) -> None:
        while not self._lost and not self._ended.wait(BEAT_S):
            self._tried(self._claim.beat)

    def _tried(self, work: Callable[[], None]) -> bool:
        """Call ``work``; False if it failed, which is reported."""
        try:
            work()
        except TakenUpError as error:
            if self._lost is None:
                self._lost = error
                self._tell("ended", str(error))
        except InputError as error:
            self._failed(error)
        except (OSError, sqlite3.Error) as error:
            self._failed(InputError(str(self._folder), f"cannot be read ({error})"))
        else:
            return True
        return False

    def _failed(self, fault: InputError) -> None:
        if self._fault is None:
            self._tell("failed", str(fault))
        self._fault = fault

    def _tell(self, state: str, why: str) -> None:
        self._news.append(CopyingState(state=state, why=why))
        if why:
            _log.warning("%s: %s", "copying ended" if state == "ended" else "not copied, to be tried again", why)

    def _changed(self) -> Iterator[Path]:
        """The files that changed since they were copied; the store last, before it the last file of model folders."""
        files = [file for file in self._folder.rglob("*") if self._belongs(file)]
        for file in sorted(files, key=lambda file: (file.name == STORE_NAME, file.name == "config.json", file)):
            if self._copied.get(file) != _looks(file):
                yield file

    def _belongs(self, file: Path) -> bool:
        name = file.relative_to(self._folder)
        hidden = any(part.startswith(".") for part in name.parts)
        return not hidden and not file.name.endswith(_BESIDE) and not file.is_symlink() and file.is_file()

    def _put(self, file: Path) -> None:
        name, looks = file.relative_to(self._folder).as_posix(), _looks(file)
        try:
            if _is_sqlite(file):
                with tempfile.TemporaryDirectory(prefix="evomerge-") as above:
                    self._storage.put(_snapshot(file, Path(above)), name)
            else:
                self._storage.put(file, name)
        except (StorageError, OSError):
            if file.exists():
                raise
        self._copied[file] = looks


def _looks(file: Path) -> object:
    """Changes whenever the content does; much of a database's content is in the log beside it."""
    beside = [path for path in (file, file.with_name(f"{file.name}-wal")) if path.exists()]
    return [(path.stat().st_size, path.stat().st_mtime_ns) for path in beside]


def _is_sqlite(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def _snapshot(file: Path, into: Path) -> Path:
    """A copy of a database in a consistent state, even if another process writes to it."""
    snapshot = into / file.name
    with closing(sqlite3.connect(file)) as live, closing(sqlite3.connect(snapshot)) as copy:
        live.backup(copy)
    return snapshot


def fetch(url: str, folder: Path) -> None:
    """Create ``folder`` from a copied search, completely or not at all, so that it can continue here.

    Raises:
        InputError: there is no copied search, its driver is running, or the folder cannot be created.
    """
    storage = Storage(url, "DIR")
    names = _fetchable(storage)
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        Claim(storage, unfinished).follow()
        for name in names:
            storage.get(name, unfinished / name)
        if not has_store(unfinished):
            problem = "has no snapshot of the store yet: its driver ended within its first minute"
            raise InputError(url, problem, "Start the search again, with another name or prefix.")
        unfinished.rename(folder)
    except OSError as error:
        problem = f"cannot be made ({error.strerror})"
        raise InputError(str(folder), problem, "Name another folder with --dir.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fetchable(storage: Storage) -> list[str]:
    """The names of a copied search's files."""
    names = [name for name in storage.files() if name != RECORD and not name.endswith(PARTIAL)]
    if FILE_NAME not in names:
        hint = "Name the copy of one search: the URL of `artifacts`, and the search's name."
        raise InputError(storage.url, "holds no search", hint)
    if strange := [name for name in names if ".." in name.split("/")]:
        raise InputError(storage.url, f"has a file that would lie elsewhere: {strange[0]}", "Do not use it.")
    return names
