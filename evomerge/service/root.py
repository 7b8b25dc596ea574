"""Where the service finds searches: in the subfolders of a folder, or in a database."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from evomerge.errors import InputError
from evomerge.printable import printable
from evomerge.search.settings.folder import checked, find_store, is_search
from evomerge.store import Store
from evomerge.store.listing import searches
from evomerge.store.reading import NoSearchError

Result = TypeVar("Result")

_MAX_LOGGED = 1000

_log = logging.getLogger(__name__)


class UnknownSearchError(LookupError):
    """There is no search with this name. The message is meant for people."""


@dataclass(frozen=True)
class Root:
    """The searches that the service shows, by name.

    Args:
        folder: has a subfolder for each search, which gives the search its name here. New searches are created there.
        database: the URL of the database that holds the searches; None if they are found through their folders.
    """

    folder: Path
    database: str | None = None
    _logged: set[tuple[str, str]] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def of(cls, place: str, folder: Path) -> Root:
        """``place`` is a folder or the URL of a database; with a database, new searches are created in ``folder``."""
        return cls(folder.resolve(), place) if "://" in place else cls(Path(place).resolve())

    def names(self) -> list[str]:
        """The names of all searches, newest first."""
        if self.database is not None:
            return [search.name for search in searches(self.database)]
        if not self.folder.is_dir():
            return []
        dated = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # just removed, or not readable
                if not path.name.startswith(".") and is_search(path):
                    dated.append((path.stat().st_ctime, path.name))
        return [name for _, name in sorted(dated, key=lambda pair: pair[0], reverse=True)]

    def has(self, name: str) -> bool:
        """Whether there is a search with this name."""
        if self.database is None:
            return self._has_folder(name)
        try:
            Store.open(self.database, name=name).close()
        except NoSearchError:
            return False
        return True

    @contextmanager
    def store(self, name: str) -> Iterator[Store]:
        """The store of a search, for commands and event streams. Open it once per request and pass it on.

        Raises:
            UnknownSearchError: there is no search with this name.
            InputError: its store cannot be opened, or does not contain a complete search.
        """
        with checked(self._open(name)) as store:
            yield store

    @contextmanager
    def snapshot(self, name: str) -> Iterator[Store]:
        """A consistent snapshot of the store of a search, for reading. Raises like ``store``."""
        with self._open(name) as store, store.snapshot():
            _ = store.search().record  # raises if it cannot be read
            yield store

    def each(
        self, read: Callable[[str, Store], Result], names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, Result | str]]:
        """Yield (name, result of ``read``) for all searches or for ``names``; a text result says why one is unreadable.

        A broken store does not affect the others.
        """
        for name in self.names() if names is None else names:
            shown = printable(name)  # the name of a folder need not be valid text
            result: Result | str
            try:
                with self.snapshot(name) as store:
                    result = read(name, store)
            except UnknownSearchError:  # just removed
                continue
            except InputError as error:
                result = str(error)
            except Exception as error:
                self._log_unreadable(shown, error)
                result = f"{shown}: holds what cannot be read ({type(error).__name__})"
            yield shown, result

    def folder_of(self, name: str) -> Path:
        """The folder of a search. If the store is in a database, the folder may be on another machine.

        Raises:
            UnknownSearchError: there is no search with this name.
            InputError: its folder is on another machine.
        """
        if self._has_folder(name):
            return self.folder / name
        if self.database is None or not self.has(name):
            raise UnknownSearchError(f"there is no search called {name!r} here")
        raise InputError(name, "was started elsewhere, and its folder is not here", "Use the machine that has it.")

    def _open(self, name: str) -> Store:
        if self.database is None:
            return find_store(self.folder_of(name))
        try:
            return Store.open(self.database, name=name)
        except NoSearchError:
            raise UnknownSearchError(f"there is no search called {name!r} here") from None

    def _has_folder(self, name: str) -> bool:
        """Whether a folder with this name, directly in the root, holds a search. Rejects names that leave the root."""
        if name.startswith(".") or not name or "/" in name or "\0" in name:
            return False
        try:
            return is_search(self.folder / name)
        except OSError:  # the name is too long for a file
            return False

    def _log_unreadable(self, name: str, error: Exception) -> None:
        """Log why a search cannot be read, once per cause, because pages request the list every few seconds."""
        cause = (name, repr(error)[:200])
        if cause not in self._logged and len(self._logged) < _MAX_LOGGED:
            self._logged.add(cause)
            _log.error("the search %r cannot be read", name, exc_info=error)
