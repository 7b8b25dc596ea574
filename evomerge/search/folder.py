"""The folder of a search: what its files are called, and its store. Looking at a search needs nothing heavier."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import InputError
from evomerge.store import Store

STORE_NAME = "search.db"
FILE_NAME = "search.yaml"
LOGS_NAME = "logs"
STATISTICS_NAME = "statistics.safetensors"


def open_store(folder: Path) -> Store:
    """The store of a search folder.

    Raises:
        InputError: no search lies there, or one of a newer version.
    """
    if not (folder / STORE_NAME).is_file():
        raise InputError(str(folder), "is not the folder of a search", "Start one: evomerge search FILE --dir DIR")
    return Store.open(folder / STORE_NAME)
