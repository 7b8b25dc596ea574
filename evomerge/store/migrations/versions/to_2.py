"""Format 2: whether a candidate may be on the front and be confirmed.

In format 1 every candidate was scored on all items and there were no constraints, so all candidates with scores may.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    op.add_column("candidate", sa.Column("eligible", sa.Boolean(), nullable=False, server_default=sa.false()))
    candidate = sa.table("candidate", sa.column("status", sa.String), sa.column("eligible", sa.Boolean))
    op.execute(sa.update(candidate).where(candidate.c.status.in_(["done", "cached"])).values(eligible=True))
