"""Alembic's entry point: runs the migrations on the connection and in the transaction of ``schema.migrate``."""

from __future__ import annotations

from alembic import context

from evomerge.store import tables

context.configure(connection=context.config.attributes["connection"], target_metadata=tables.metadata)
context.run_migrations()
