"""Format 7: how far each candidate is from the base. Of those of older programs nobody has measured it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "7"
down_revision = "6"


def upgrade() -> None:
    op.add_column("candidate", sa.Column("change", sa.Double()))
