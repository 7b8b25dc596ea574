"""Format 3: leases by a clock that nobody can set, and a count of the driver's writes.

Where that clock has not been written yet, the database's decides. The count starts with each driver.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    op.add_column("lease", sa.Column("writes", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("lease", sa.Column("boot", sa.String(64)))
    op.add_column("lease", sa.Column("expires_since_boot", sa.Double()))
