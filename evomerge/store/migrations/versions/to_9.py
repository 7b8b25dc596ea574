"""Format 9: thumbnails of the pictures that were made with candidates. Searches of older programs have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "9"
down_revision = "8"


def upgrade() -> None:
    op.create_table(
        "drawing",
        sa.Column("search_id", sa.Integer(), primary_key=True),
        sa.Column("candidate", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("evaluator", sa.String(200), primary_key=True),
        sa.Column("split", sa.String(20), primary_key=True),
        sa.Column("item", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("image", sa.LargeBinary(), nullable=False),
    )
