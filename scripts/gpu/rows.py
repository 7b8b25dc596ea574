"""All rows of the kit, in the order in which they run."""

from __future__ import annotations

import check_bandwidth
import check_drops
import check_methods
import check_models
import check_passes
from kit import Row


def all_rows() -> list[Row]:
    """Cheap checks of single tensors first, then whole models."""
    parts = (check_passes, check_drops, check_methods, check_bandwidth, check_models)
    return [row for part in parts for row in part.rows()]
