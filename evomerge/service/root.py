"""Where the service finds searches: the folders of a folder, or a database that holds many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import InputError
from evomerge.search.folder import is_search, open_store
from evomerge.store import Store
from evomerge.store.listing import searches


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

    @classmethod
    def of(cls, place: str, folder: Path) -> Root:
        """``place`` is a folder or the URL of a database; with a database, ``folder`` is where new searches live."""
        return cls(folder.resolve(), place) if "://" in place else cls(Path(place).resolve())

    def names(self) -> list[str]:
        """Every search, those that began last first."""
        if self.database is not None:
            return [found.name for found in searches(self.database)]
        if not self.folder.is_dir():
            return []
        folders = [each for each in self.folder.iterdir() if not each.name.startswith(".") and is_search(each)]
        return [each.name for each in sorted(folders, key=lambda each: each.stat().st_ctime, reverse=True)]

    @contextmanager
    def store(self, name: str) -> Iterator[Store]:
        """The store of a search, for reading and for commands.

        Raises:
            UnknownSearchError: there is none of this name.
            InputError: its store cannot be opened.
        """
        self._check(name)
        with open_store(self.folder / name) if self.database is None else Store.open(self.database, name=name) as found:
            yield found

    def folder_of(self, name: str) -> Path:
        """The folder of a search, which need not be here when its store is in a database.

        Raises:
            UnknownSearchError: there is no search of this name.
            InputError: its folder is on another machine.
        """
        self._check(name)
        folder = self.folder / name
        if not is_search(folder):
            raise InputError(name, "was started elsewhere, and its folder is not here", "Use the machine that has it.")
        return folder

    def _check(self, name: str) -> None:
        """Refuse a name that is no search's, so that none reaches out of the root."""
        if name not in self.names():
            raise UnknownSearchError(f"no search is called {name!r} here")
