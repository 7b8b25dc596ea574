"""What Alembic runs: the migrations, on the connection and in the transaction that ``schema.migrate`` gives it."""

from __future__ import annotations

from alembic import context

from evomerge.store import tables

context.configure(connection=context.config.attributes["connection"], target_metadata=tables.metadata)
context.run_migrations()
