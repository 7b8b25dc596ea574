"""Format 3: leases by a clock that nobody can set, and a count of the driver's writes.

If that clock has not been written yet, the database's clock is used. The count starts again with each driver.
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
