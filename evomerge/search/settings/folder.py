"""The folder of a search: the names of its files, and its store. Importing this is fast and enough to read a search."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import InputError
from evomerge.files import read_text
from evomerge.objects import was_url
from evomerge.store import Store
from evomerge.store.engine import PASSWORD_HINT, parse_place, without_password
from evomerge.yaml import load_yaml

STORE_NAME = "search.db"
FILE_NAME = "search.yaml"
LOGS_NAME = "logs"
EVIDENCE_NAME = "evidence"
SOURCES_NAME = "sources"

STORE_VARIABLE = "EVOMERGE_STORE"
"""The environment variable with the URL of a store; it may contain a password, which is stored nowhere else."""


def open_store(folder: Path) -> Store:
    """The store of a search folder, after checking that its record of the search can be read.

    Raises:
        InputError: there is no search, or one of a newer version; or its database cannot be reached, or is damaged.
    """
    return checked(find_store(folder))


def find_store(folder: Path) -> Store:
    """The store of a search folder: the file in it, or the one that its search file names. Raises as ``open_store``."""
    if (folder / STORE_NAME).is_file():
        return Store.open(folder / STORE_NAME)
    named, name = _named(folder / FILE_NAME)
    place = store_place(folder, named)
    if name is None or isinstance(place, Path):
        raise InputError(str(folder), "is not the folder of a search", "Start one: evomerge search FILE --dir DIR")
    return Store.open(place, name=name)


def checked(store: Store) -> Store:
    """The same store, after checking that its record can be read. Raises InputError: it cannot; the store is closed."""
    try:
        _ = store.search().record
    except BaseException:
        store.close()
        raise
    return store


def is_search(folder: Path) -> bool:
    """Whether a search was started in a folder, wherever its store is."""
    return (folder / STORE_NAME).is_file() or (folder / FILE_NAME).is_file()


def has_store(folder: Path) -> bool:
    """Whether the folder holds its store, or its search file names one elsewhere."""
    return (folder / STORE_NAME).is_file() or _named(folder / FILE_NAME)[0] is not None


def store_place(folder: Path, named: str | None) -> str | Path:
    """Where the store of a search is: at the URL in its search file, otherwise at that in the environment, otherwise in
    its folder. If both URLs name the same database, that of the environment is used, because it may have the password.

    Raises:
        InputError: one of them is not a URL of a database.
    """
    given = os.environ.get(STORE_VARIABLE) or None
    if named is None:
        return folder / STORE_NAME if given is None else given
    if given is not None and public_url(given) == public_url(named):
        return given
    return named


def public_url(url: str) -> str:
    """The URL of a database without its password, as written to files of a search."""
    return without_password(parse_place(url)).render_as_string(hide_password=False)


def refuse_existing(folder: Path) -> None:
    """Refuse to start a search in a folder that already exists, or that cannot be made. Raises InputError."""
    if was_url(folder):
        hint = "Name a local folder, and have it copied there: --set artifacts=s3://bucket/prefix"
        raise InputError("--dir", "is a URL, and a search lives on a disk", hint)
    try:
        there = folder.exists()
        above = next(parent for parent in folder.absolute().parents if parent.exists())
    except OSError as error:
        raise cannot_be_made(folder, error) from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            str(folder), f"cannot be made: {above} is not a folder to write in", "Name another with --dir."
        )
    if there:
        go_on = f"Continue it (evomerge resume {folder}), or name" if is_search(folder) else "Name"
        raise InputError(str(folder), "already exists", f"{go_on} another folder with --dir.")


def cannot_be_made(folder: Path, error: OSError) -> InputError:
    """The error for a search folder that the operating system refuses to make."""
    return InputError(str(folder), f"cannot be made ({error.strerror})", "Name another folder with --dir.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder next to ``folder`` in which to prepare a search; it is renamed to ``folder`` at the end.

    If several processes make the same folder, only one succeeds. Files that a killed process left are deleted.

    Raises:
        InputError: the folder already exists, is being made by another process, or cannot be made.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _held(partial, folder):
            for left in partial.iterdir():
                left.unlink()
            try:
                yield partial
                refuse_existing(folder)  # rename would replace an empty one
                partial.rename(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise cannot_be_made(folder, error) from error


@contextmanager
def _held(partial: Path, folder: Path) -> Iterator[None]:
    """Lock a folder that is being made, so that other processes refuse to use it, until the block or process ends."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(descriptor), partial.stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            refuse_existing(folder)  # it may be there by now
            problem = "is being made by another process"
            raise InputError(str(folder), problem, "Wait for it, or name another with --dir.")
        yield
    finally:
        os.close(descriptor)


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the search file of a search's folder atomically. Raises InputError: it cannot be written."""
    partial = folder / f".{FILE_NAME}.partial"
    try:
        partial.write_text(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True), encoding="utf-8")
        partial.replace(folder / FILE_NAME)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise InputError(str(folder / FILE_NAME), problem, "Check the folder and its disk.") from error


def check_store_url(url: str, place: str) -> None:
    """Refuse a URL that a search file may not have for its store; ``place`` names the key.

    Raises:
        InputError: not a database URL, or one with a password.
    """
    if "://" not in url:
        raise InputError(place, "is not a database URL", "Write it like postgresql://user@host/database.")
    if parse_place(url).password is not None:
        raise InputError(place, "holds a password, and the file is copied to the folder of the search", PASSWORD_HINT)


def _named(file: Path) -> tuple[str | None, str | None]:
    """The store's URL and the name of the search in a search file; None for what it does not have."""
    if not file.is_file():
        return None, None
    content = load_yaml(read_text(file, str(file)), str(file))
    if not isinstance(content, dict):
        return None, None
    store, name = content.get("store"), content.get("name")
    return (None if store is None else str(store)), (None if name is None else str(name))
