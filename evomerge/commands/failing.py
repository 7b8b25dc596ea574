"""The exit code of a search that went to its end and found nothing."""

from __future__ import annotations

import sys

from evomerge.report.failures import all_failed
from evomerge.store import Store

FAILED = 1


def failure_code(store: Store) -> int:
    """0; or, where every candidate but the baselines failed, ``FAILED``, and stderr says why."""
    error = all_failed(store)
    if error is None:
        return 0
    print(f"error: {error}", file=sys.stderr)
    return FAILED
