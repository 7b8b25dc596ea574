"""The format of a database: created directly in an empty one, and reached from older formats by migrations.

Each increment of ``tables.SCHEMA_VERSION`` has a migration of that name in ``migrations/versions``, run by Alembic.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection, func, insert, inspect, select, update

from evomerge.errors import InputError
from evomerge.store import tables
from evomerge.store.fence import living_holders

_LOCK = 0x65766F6D65726765  # "evomerge": the advisory lock under which a PostgreSQL database changes its format
_MIGRATIONS = Path(__file__).parent / "migrations"


def make_tables(connection: Connection, place: str) -> None:
    """Create all tables if there are none; on a database server, migrate those of an older program.

    Raises:
        InputError: see ``migrate``.
    """
    _lock(connection)
    if not inspect(connection).has_table("search"):
        tables.metadata.create_all(connection)
        connection.execute(insert(tables.alembic_version), {"version_num": str(tables.SCHEMA_VERSION)})
    elif (
        connection.dialect.name != "sqlite"
    ):  # a file holds one search, so an existing one will be refused, not changed
        migrate(connection, place)


def migrate(connection: Connection, place: str) -> None:
    """Migrate a store to this program's format within the open transaction: completely or not at all.

    An SQLite file is copied first: search.db of format 1 to search.db.format-1. On PostgreSQL, concurrent migrations
    wait for each other.

    Raises:
        InputError: an older program is driving a search in it, its format is newer, or there is no disk space.
    """
    _lock(connection)
    before = _format(connection)
    if before == tables.SCHEMA_VERSION:  # another process was faster
        return
    ours = f"this Evomerge reads {tables.SCHEMA_VERSION}"
    if before > tables.SCHEMA_VERSION:
        raise InputError(place, f"is of format {before} ({ours})", "Update Evomerge to open it.")
    if holders := living_holders(connection):
        problem = f"is of format {before} ({ours}), and is driven by {holders[0]} just now"
        raise InputError(place, problem, "Look at it with the Evomerge that drives it, or wait for its end.")
    if connection.dialect.name == "sqlite":
        _copy(Path(place), Path(f"{place}.format-{before}"))
    _upgrade(connection, before)
    connection.execute(update(tables.search).values(schema_version=tables.SCHEMA_VERSION))


def _lock(connection: Connection) -> None:
    if connection.dialect.name != "sqlite":  # SQLite's writers have the file to themselves
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))


def _format(connection: Connection) -> int:
    if inspect(connection).has_table("alembic_version"):
        return int(connection.execute(select(tables.alembic_version.c.version_num)).scalar_one())
    # Created before there were migrations: the format is in the row of each search.
    return int(connection.execute(select(func.max(tables.search.c.schema_version))).scalar_one() or 1)


def _upgrade(connection: Connection, before: int) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    command.stamp(config, str(before))
    command.upgrade(config, str(tables.SCHEMA_VERSION))


def _copy(file: Path, copy: Path) -> None:
    """Copy a database as it was before this transaction, overwriting an incomplete copy."""
    partial = copy.with_name(f"{copy.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with closing(sqlite3.connect(file)) as old, closing(sqlite3.connect(partial)) as new:
            old.backup(new)
        partial.rename(copy)
    except (sqlite3.Error, OSError) as error:
        partial.unlink(missing_ok=True)
        problem = f"is of an older format, and cannot be copied to {copy.name} before it is changed ({error})"
        raise InputError(str(file), problem, "Make room in its folder, or let it be written to.") from error
