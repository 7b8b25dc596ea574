"""Retries while a database server is unavailable: a restart, a fail-over, a network failure.

Every method of a store is one transaction. A transaction that was not committed is retried from its start for a limited
time. If the response to a commit was lost, the driver finds out whether it was applied: each of its writes increments
``lease.writes`` in the same transaction, so that row identifies the last one (``Store.writing``). So nothing is ever
written twice, and methods need no code for this. PostgreSQL's ``pg_xact_status`` is not sufficient: after a crash, the
number of a lost transaction may be given to another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from evomerge.errors import InputError
from evomerge.store.engine import ServerAwayError

OUTAGE_S = 60.0
"""How long to wait for a server. A restart after a crash takes seconds; anything longer needs a person."""

FIRST_PAUSE_S = 0.05  # a single lost connection can be replaced at once
LONGEST_PAUSE_S = 2.0  # between retries, so that hundreds of clients do not overload a server that is starting

Given = ParamSpec("Given")
Result = TypeVar("Result")


def with_retries(work: Callable[[], Result]) -> Result:
    """Call ``work``, and retry it while the database server is unavailable.

    Raises:
        InputError: the server was unavailable for OUTAGE_S. Everything acknowledged before is in the store.
    """
    try:
        return work()
    except ServerAwayError as error:
        lost = error
    deadline, pause = time.monotonic() + OUTAGE_S, FIRST_PAUSE_S
    while time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
        try:
            return work()
        except ServerAwayError as error:
            lost = error
    hint = "All that was recorded is intact; continue when the server is back: evomerge resume DIR"
    raise InputError(lost.place, f"{lost.problem} for more than {OUTAGE_S:.0f} s", hint) from lost


def retrying(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """Add retries to a method. Only its last transaction may write, because a retry starts from the beginning."""

    @wraps(method)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        return with_retries(lambda: method(*args, **kwargs))

    return run
