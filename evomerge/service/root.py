"""Where the service finds searches: the folders of a folder, or a database that holds many."""

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
    """No search of this name; the message is for people."""


@dataclass(frozen=True)
class Root:
    """Searches that the service shows, by name.

    Args:
        folder: in it every search has a folder of its own, named as the search is called here. New ones are made there.
        database: URL of the database that holds the searches, where they are not found by their folders.
    """

    folder: Path
    database: str | None = None
    _logged: set[tuple[str, str]] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def of(cls, place: str, folder: Path) -> Root:
        """``place`` is a folder or the URL of a database; with a database, ``folder`` is where new searches live."""
        return cls(folder.resolve(), place) if "://" in place else cls(Path(place).resolve())

    def names(self) -> list[str]:
        """Every search, those that began last first."""
        if self.database is not None:
            return [search.name for search in searches(self.database)]
        if not self.folder.is_dir():
            return []
        dated = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # one that was removed just now, or is not ours to read
                if not path.name.startswith(".") and is_search(path):
                    dated.append((path.stat().st_ctime, path.name))
        return [name for _, name in sorted(dated, key=lambda pair: pair[0], reverse=True)]

    def has(self, name: str) -> bool:
        """Whether a search is called so."""
        if self.database is None:
            return self._has_folder(name)
        try:
            Store.open(self.database, name=name).close()
        except NoSearchError:
            return False
        return True

    @contextmanager
    def store(self, name: str) -> Iterator[Store]:
        """The store of a search, for commands and for whoever follows it. Whoever needs it several times hands it on.

        Raises:
            UnknownSearchError: there is none of this name.
            InputError: its store cannot be opened, or does not hold what a search has.
        """
        with checked(self._open(name)) as store:
            yield store

    @contextmanager
    def snapshot(self, name: str) -> Iterator[Store]:
        """The store of a search at one moment, to answer from. Raises as ``store``."""
        with self._open(name) as store, store.snapshot():
            _ = store.search().record  # which raises where it cannot be read
            yield store

    def each(
        self, read: Callable[[str, Store], Result], names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, Result | str]]:
        """What ``read`` says of every search, or of these, by name; or, as text, why a search cannot be read.

        Whatever is wrong with one store, the others are there.
        """
        for name in self.names() if names is None else names:
            shown = printable(name)  # the name of a folder need not be text
            result: Result | str
            try:
                with self.snapshot(name) as store:
                    result = read(name, store)
            except UnknownSearchError:  # removed just now
                continue
            except InputError as error:
                result = str(error)
            except Exception as error:
                self._log_odd(shown, error)
                result = f"{shown}: holds what cannot be read ({type(error).__name__})"
            yield shown, result

    def folder_of(self, name: str) -> Path:
        """The folder of a search, which need not be here when its store is in a database.

        Raises:
            UnknownSearchError: there is no search of this name.
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
        """Whether this is the name of a folder right in the root that holds a search; none reaches out of it."""
        if name.startswith(".") or not name or "/" in name or "\0" in name:
            return False
        try:
            return is_search(self.folder / name)
        except OSError:  # a name longer than any file's
            return False

    def _log_odd(self, name: str, error: Exception) -> None:
        """Log why a search cannot be read, once for each cause: pages ask for the list every few seconds."""
        cause = (name, repr(error)[:200])
        if cause not in self._logged and len(self._logged) < _MAX_LOGGED:
            self._logged.add(cause)
            _log.error("the search %r cannot be read", name, exc_info=error)
