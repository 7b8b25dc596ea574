"""Format 5: the niche of each candidate, and whether it is the best there. Searches of older programs have neither."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "5"
down_revision = "4"


def upgrade() -> None:
    op.add_column("candidate", sa.Column("niche", sa.Text()))
    op.add_column("candidate", sa.Column("elite", sa.Boolean(), nullable=False, server_default=sa.false()))
