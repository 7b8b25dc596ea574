"""Format 1: stores that were created before there were migrations."""

from __future__ import annotations

revision = "1"
down_revision = None


def upgrade() -> None:
    """Nothing: every store has at least this format."""
