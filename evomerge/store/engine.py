"""Opening the database: all that is particular to SQLite or PostgreSQL, and errors in words that a person can use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry

from evomerge.errors import InputError

BUSY_S = 30
"""How long a statement waits for another process's lock before it is an error."""

# By SQLite's primary result code (https://www.sqlite.org/rescode.html) and PostgreSQL's SQLSTATE.
_FULL = {13, "53100"}
_EXPLANATIONS: dict[int | str, tuple[str, str]] = {
    5: (f"has been locked by another process for {BUSY_S} s", "End the backup or program that holds it."),
    8: ("may not be written", "Check the permissions of the file and its folder."),
    10: ("cannot be read or written (disk I/O error)", "Check the disk, and that the folder still exists."),
    11: ("is damaged", "Restore it from a backup."),
    14: ("cannot be opened", "Check that the folder exists and may be written."),
    26: ("is not a store, or is damaged", "Restore it from a backup."),
}


class StoreFullError(InputError):
    """The disk under the store is full. Nothing that was acknowledged is lost, and the store can be used again."""


def parse_place(place: str | Path) -> URL:
    """A path is an SQLite file, anything with ``://`` a database URL of SQLAlchemy's.

    Raises:
        InputError: not a URL, or an SQLite database that is no file.
    """
    if isinstance(place, Path) or "://" not in place:
        return URL.create("sqlite", database=str(place))
    try:
        url = make_url(place)
    except ArgumentError as error:
        raise InputError(place, "is not a database URL", "Write it like postgresql://user@host/database.") from error
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise InputError(place, "names no file", "A store must outlive its process: give a path.")
    return url


def connect(url: URL) -> Engine:
    """An engine whose transactions read, or write when the execution option ``writes`` is set (also ``synced``).

    Raises:
        InputError: a database without its driver.
    """
    try:
        if url.get_backend_name() != "sqlite":
            return create_engine(url, pool_pre_ping=True)
        engine = create_engine(url, connect_args={"timeout": BUSY_S})
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        place = url.render_as_string(hide_password=True)
        raise InputError(place, f"needs a database driver ({error})", "Install it with pip.") from error
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")  # readers never wait for the writer, nor it for them
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # Python's driver would begin only before the first INSERT or UPDATE, after what was read to decide on it.
    options = connection.get_execution_options()
    if not options.get("writes"):
        connection.exec_driver_sql("BEGIN")
        return
    # A killed process loses nothing under NORMAL. FULL also outlives a power cut, with all that was written before it,
    # but waits for the disk (0.4 ms on an idle one, 8 ms on a busy one): once a second is enough.
    connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if options.get('synced') else 'NORMAL'}")
    # A transaction that reads first and writes later fails at once when another has written in between: take the
    # write lock at the start, where waiting for it is possible.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def check_intact(connection: Connection, place: str) -> None:
    """Look through an SQLite file for damage (0.4 ms a megabyte); database servers do so themselves.

    Raises:
        InputError: it is damaged; says where.
    """
    if connection.dialect.name == "sqlite":
        finding = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if finding != "ok":
            raise InputError(place, f"is damaged ({' '.join(finding.split())})", _EXPLANATIONS[11][1])


@contextmanager
def plain_errors(place: str) -> Iterator[None]:
    """Turn the database errors that a person can mend into InputErrors; let others through.

    Raises:
        StoreFullError: the disk is full.
        InputError: the database is locked, damaged, read-only or not there.
    """
    try:
        yield
    except DBAPIError as error:
        code = _code(error)
        if code in _FULL:
            mend = "Free some space; all that was recorded is intact."
            raise StoreFullError(place, "cannot grow: the disk is full", mend) from error
        if code in _EXPLANATIONS:
            raise InputError(place, *_EXPLANATIONS[code]) from error
        raise


def _code(error: DBAPIError) -> int | str | None:
    sqlite_code = getattr(error.orig, "sqlite_errorcode", None)
    if sqlite_code is not None:
        return int(sqlite_code) & 0xFF  # the upper bits say which kind of I/O error, and the like
    state = getattr(error.orig, "sqlstate", None)
    return None if state is None else str(state)
