"""Format 6: how long workers and their GPUs were used for a search. Unknown for searches of older programs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "6"
down_revision = "5"


def upgrade() -> None:
    for name in ("worker_s", "gpu_s", "held_s"):
        op.add_column("search", sa.Column(name, sa.Double(), nullable=False, server_default="0"))
