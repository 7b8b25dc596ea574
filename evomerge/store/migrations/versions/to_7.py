"""Format 7: the distance of each candidate from the base. Not measured in searches of older programs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "7"
down_revision = "6"


def upgrade() -> None:
    op.add_column("candidate", sa.Column("change", sa.Double()))
