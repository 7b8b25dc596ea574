"""Searches that fail: what their records say, and the exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from evomerge.errors import InputError, described
from evomerge.report.failures import all_failed
from evomerge.store import Store
from evomerge.store.engine import ServerAwayError
from evomerge.store.events import DriverFailed

FAILED = 1


def failure_code(store: Store) -> int:
    """0, or ``FAILED`` with a message on stderr if every candidate except the baselines failed."""
    error = all_failed(store)
    if error is None:
        return 0
    print(f"error: {error}", file=sys.stderr)
    return FAILED


@contextmanager
def recorded(store: Store) -> Iterator[None]:
    """Record the exception that ends a driver, for `status` and the page.

    Whoever looks at the search need not see the driver's output: it may be that of a job on another machine.
    """
    try:
        yield
    except ServerAwayError:  # the store's own failure
        raise
    except Exception as error:
        with suppress(InputError):  # it may have failed too, or belong to another driver now
            store.record_event(DriverFailed(why=described(error)))
        raise
