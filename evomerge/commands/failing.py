"""The exit code of a search that ran to its end and found nothing."""

from __future__ import annotations

import sys

from evomerge.report.failures import all_failed
from evomerge.store import Store

FAILED = 1


def failure_code(store: Store) -> int:
    """0, or ``FAILED`` with a message on stderr if every candidate except the baselines failed."""
    error = all_failed(store)
    if error is None:
        return 0
    print(f"error: {error}", file=sys.stderr)
    return FAILED
