"""A database server that is away for a while: a restart, a fail-over, a network cut.

Every method of a store is one transaction. One that the server did not commit is run again from its start, for a
bounded time. Where the answer to a commit was lost on the way, the driver looks whether it was done: each of its writes
counts up ``lease.writes`` in the same transaction, so that row says which was the last (``Store.writing``). So nothing
is written twice, whatever a method writes, and no method needs to know of it. PostgreSQL's own ``pg_xact_status`` does
not do: after a crash it may give the number of a transaction that was lost to another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from evomerge.errors import InputError
from evomerge.store.engine import ServerAwayError

OUTAGE_S = 60.0
"""How long a server is waited for. A restart after a crash takes seconds; what lasts longer needs a person."""

FIRST_PAUSE_S = 0.05  # a single connection that was cut is replaced at once
LONGEST_PAUSE_S = 2.0  # between two tries, so that hundreds of clients do not keep a starting server from starting

Given = ParamSpec("Given")
Result = TypeVar("Result")


def ride_out(work: Callable[[], Result]) -> Result:
    """Do ``work``, again and again while the database server is away.

    Raises:
        InputError: it was away for OUTAGE_S. What was acknowledged before is in the store.
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


def repeated(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """A method that rides out an outage. It may write in its last transaction only: it runs again from its start."""

    @wraps(method)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        return ride_out(lambda: method(*args, **kwargs))

    return run
