"""Opening the database: everything specific to SQLite or PostgreSQL, and error messages that people can act on."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.util import LRUCache

from evomerge.errors import InputError

PASSWORD_HINT = "Keep it in ~/.pgpass, or give the whole URL in the environment variable EVOMERGE_STORE."

BUSY_S = 30
"""How long a statement waits for another process's lock before it fails."""

CACHE_KB = 64 * 1024
"""The maximum page cache of a connection to an SQLite file. It holds most index pages of a hundred thousand candidates,
which every write would otherwise read again."""

IDLE_S = 15
"""After how long a server aborts an idle transaction and releases its locks. Ours take milliseconds; one that is idle
for this long belongs to a lost connection or a suspended process."""

# Options for libpq unless the URL sets them: a host that vanishes must not hang a driver for hours.
_LIBPQ = {
    "application_name": "evomerge",
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}

# By SQLite's primary result code (https://www.sqlite.org/rescode.html) and PostgreSQL's SQLSTATE.
_FULL = {13, "53100"}
_DAMAGE = re.compile("no such (table|column)|Could not decode to UTF-8")  # these have no codes of their own
_EXPLANATIONS: dict[int | str, tuple[str, str]] = {
    5: (f"has been locked by another process for {BUSY_S} s", "End the backup or program that holds it."),
    8: ("may not be written", "Check the permissions of the file and its folder."),
    10: ("cannot be read or written (disk I/O error)", "Check the disk, and that the folder still exists."),
    11: ("is damaged", "Restore it from a backup."),
    14: ("cannot be opened", "Check that the folder exists and may be written."),
    26: ("is not a store, or is damaged", "Restore it from a backup."),
    "25006": ("may not be written: the server is a read-only copy", "Give the address of the primary server."),
    "42501": ("may not be used like this by its user", "Grant the user all rights on the database and its schema."),
    "42703": ("holds tables of another program", "Give Evomerge a database or a schema of its own."),
    "55P03": (f"has been locked by another process for {BUSY_S} s", "End the process that holds it."),
}


class StoreFullError(InputError):
    """The store's disk is full. Nothing that was acknowledged is lost, and the store remains usable."""


class ServerAwayError(InputError):
    """The database server cannot be reached, or the connection to it was lost in the middle of a transaction."""


def parse_place(place: str | Path) -> URL:
    """Parse the place of a store: a path is an SQLite file, anything with ``://`` is an SQLAlchemy database URL.

    Raises:
        InputError: an invalid URL, a password where it would be shown, or an SQLite database in memory.
    """
    if isinstance(place, Path) or "://" not in place:
        return URL.create("sqlite", database=str(place))
    try:
        url = make_url(place)
    except (ArgumentError, ValueError) as error:
        shown = re.sub(r":[^:/]*@", ":***@", place)
        raise InputError(shown, "is not a database URL", "Write it like postgresql://user@host/database.") from error
    if "password" in url.query:
        shown = url.set(query={}).render_as_string(hide_password=True)
        raise InputError(shown, "has a password among its options", PASSWORD_HINT)
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise InputError(place, "names no file", "A store must outlive its process: give a path.")
    return url


def without_password(url: URL) -> URL:
    """The URL without its password, because files and events must never contain one."""
    return URL.create(url.drivername, url.username, None, url.host, url.port, url.database, url.query)


class _SQLite(SQLiteDialect_pysqlite):
    """SQLite's dialect, equal for all files, so that all stores share compiled statements.

    The service opens a store for each request, and compiling the statements each time took longer than running them.
    """

    supports_statement_cache = True

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


registry.register("sqlite.evomerge", __name__, _SQLite.__name__)
_COMPILED: LRUCache[Any, Any] = LRUCache(500)  # statements, the same as SQLAlchemy's default for an engine


def connect(url: URL) -> Engine:
    """An engine whose transactions read by default, and write with the execution option ``writes`` (or ``synced``).

    Raises:
        InputError: the kind of database is not supported, or its driver is not installed.
    """
    kind = url.get_backend_name()
    place = url.render_as_string(hide_password=True)
    if kind == "sqlite":
        path, shared = Path(url.database or ""), {"compiled_cache": _COMPILED}
        if path.is_file() and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
            return create_engine(
                "sqlite+evomerge://",
                creator=lambda: _connect_to_read(path),
                poolclass=QueuePool,
                execution_options=shared,
            )
        url = url.set(drivername="sqlite+evomerge")
        engine = create_engine(url, connect_args={"timeout": BUSY_S}, execution_options=shared)
        event.listen(engine, "connect", _set_up_sqlite)
        return engine
    if kind != "postgresql":
        raise InputError(place, "needs a database driver that Evomerge does not support", "Use SQLite or PostgreSQL.")
    options = {name: value for name, value in _LIBPQ.items() if name not in url.query}
    try:
        # Always psycopg, whatever the URL says: errors are interpreted by its attributes.
        url = url.set(drivername="postgresql+psycopg")
        engine = create_engine(url, connect_args=options, use_native_hstore=False)  # looking up its type costs a query
    except ModuleNotFoundError as error:
        raise InputError(place, f"needs a database driver ({error})", "pip install 'evomerge[postgresql]'") from error
    event.listen(engine, "connect", _set_up_postgresql)
    return engine


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """A connection to a file that this process may only read.

    SQLite shares a log with writers. If there is no log, nobody is writing, and SQLite must not try to create one.
    """
    mode = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "mode=ro&immutable=1"
    uri = f"file:{quote(str(path.absolute()))}?{mode}"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_S, check_same_thread=False)


def for_reading(engine: Engine) -> Engine:
    """The engine with transactions that see one consistent state, even over several queries."""
    if engine.dialect.name == "sqlite":
        return engine  # every transaction does so
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def _set_up_postgresql(connection: Any, _: ConnectionPoolEntry) -> None:
    connection.autocommit = True
    timeouts = f"SET lock_timeout = '{BUSY_S}s'; SET idle_in_transaction_session_timeout = '{IDLE_S}s'"
    connection.execute(timeouts)
    connection.autocommit = False


def _set_up_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")  # readers never wait for the writer, nor the writer for them
    cursor.execute(f"PRAGMA cache_size = -{CACHE_KB}")
    cursor.close()


def begin(connection: Connection) -> None:
    """Begin a transaction. As an event listener of the engine, this would make a driver 6% slower."""
    connection.begin()
    if connection.dialect.name == "sqlite":
        _begin_sqlite(connection)


def _begin_sqlite(connection: Connection) -> None:
    # Python's driver would begin only before the first INSERT or UPDATE, after the reads that the write depends on.
    options = connection.get_execution_options()
    if not options.get("writes"):
        connection.exec_driver_sql("BEGIN")
        return
    # With NORMAL, a killed process loses nothing. FULL also survives a power failure, including all earlier writes, but
    # waits for the disk (0.4 ms on an idle one, 8 ms on a busy one): once a second is enough.
    synchronous = "FULL" if options.get("synced") else "NORMAL"
    if connection.info.get("synchronous") != synchronous:
        connection.exec_driver_sql(f"PRAGMA synchronous = {synchronous}")
        connection.info["synchronous"] = synchronous
    # A transaction that reads first and writes later fails at once if another one has written in between: take the
    # write lock at the start, where waiting for it is possible.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def check_intact(connection: Connection, place: str) -> None:
    """Check an SQLite file for damage (0.4 ms per megabyte); database servers do so themselves.

    Raises:
        InputError: it is damaged; the message says where.
    """
    if connection.dialect.name == "sqlite":
        finding = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if finding != "ok":
            raise damaged(place, " ".join(finding.split()))


def damaged(place: str, what: str) -> InputError:
    """The error for a database that does not contain what was written to it."""
    return InputError(place, f"is damaged ({what})", _EXPLANATIONS[11][1])


@contextmanager
def plain_errors(place: str) -> Iterator[None]:
    """Turn database errors that a user can fix into InputErrors; others pass through.

    Raises:
        ServerAwayError: the connection to the server was lost, or cannot be made.
        StoreFullError: the disk is full.
        InputError: the database is locked, damaged, read-only or missing.
    """
    try:
        yield
    except DBAPIError as error:
        if is_lost(error):
            hint = "Check that the server runs, and its address, user and database."
            raise ServerAwayError(place, f"cannot be reached ({_first_line(error)})", hint) from error
        code = _code(error)
        if code in _FULL:
            hint = "Free some space; all that was recorded is intact."
            raise StoreFullError(place, "cannot grow: the disk is full", hint) from error
        if code in _EXPLANATIONS:
            raise InputError(place, *_EXPLANATIONS[code]) from error
        if isinstance(error.orig, sqlite3.OperationalError) and _DAMAGE.match(str(error.orig)):
            raise damaged(place, _first_line(error)[:200]) from error
        raise


def _code(error: DBAPIError) -> int | str | None:
    sqlite_code = getattr(error.orig, "sqlite_errorcode", None)
    if sqlite_code is not None:
        return int(sqlite_code) & 0xFF  # the upper bits have details, such as the kind of I/O error
    state = getattr(error.orig, "sqlstate", None)
    return None if state is None else str(state)


def is_lost(error: DBAPIError) -> bool:
    """Whether the connection was lost or could not be made. If a server refuses it, libpq gets no SQLSTATE."""
    if isinstance(error.orig, sqlite3.Error):
        return False
    return error.connection_invalidated or (isinstance(error, OperationalError) and _code(error) is None)


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0]
