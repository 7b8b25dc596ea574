"""Format 8: thumbnails of the pictures that items show. Searches of older programs have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "8"
down_revision = "7"


def upgrade() -> None:
    op.create_table(
        "thumbnail",
        sa.Column("search_id", sa.Integer(), primary_key=True),
        sa.Column("picture", sa.String(64), primary_key=True),
        sa.Column("image", sa.LargeBinary(), nullable=False),
    )
