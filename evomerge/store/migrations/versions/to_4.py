"""Format 4: the answers of models, and the texts of items. Searches of older programs have neither."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"


def upgrade() -> None:
    op.create_table(
        "answer",
        sa.Column("search_id", sa.Integer(), primary_key=True),
        sa.Column("candidate", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("evaluator", sa.String(200), primary_key=True),
        sa.Column("split", sa.String(20), primary_key=True),
        sa.Column("attempt", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("items", sa.LargeBinary(), nullable=False),
        sa.Column("texts", sa.LargeBinary(), nullable=False),
    )
    op.create_table(
        "item",
        sa.Column("search_id", sa.Integer(), primary_key=True),
        sa.Column("evaluator", sa.String(200), primary_key=True),
        sa.Column("split", sa.String(20), primary_key=True),
        sa.Column("texts", sa.LargeBinary(), nullable=False),
    )
