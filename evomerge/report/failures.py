"""The error of a search whose candidates all failed, or whose driver did."""

from __future__ import annotations

from collections import Counter

from evomerge.errors import InputError
from evomerge.store import Store, current_holder, summaries
from evomerge.store.events import DriverFailed, LeaseTaken, State


def all_failed(store: Store) -> InputError | None:
    """The error of a search whose candidates, except baselines, have all failed; None if any is scored or pending.

    It names the most frequent reason, and the latest candidate that failed for it, with its log.
    """
    counts = Counter(store.counts())
    counts.subtract(row.status for row in summaries.baselines(store))
    if {status for status, count in counts.items() if count} != {"failed"}:
        return None
    failures = {row.id: row.failure or {} for row in store.candidates(statuses=["failed"]) if row.step > 0}
    ((reason, count),) = Counter(failure.get("reason") for failure in failures.values()).most_common(1)
    example, failure = next(item for item in reversed(failures.items()) if item[1].get("reason") == reason)
    share = "" if count == len(failures) else f"{count} of them "
    problem = f"all {len(failures)} failed, {share}with '{reason}', such as {example}: {failure.get('message')}"
    return InputError(
        "candidates", problem, f"See {failure['log']} in the folder of the search." if failure.get("log") else ""
    )


def driver_failure(store: Store) -> str:
    """The error that ended the last driver; empty if there was none, or a driver has begun since."""
    failed = store.events(kinds=(DriverFailed.kind,), newest=1)
    if not failed:
        return ""
    since = [store.events(kinds=(kind,), since=failed[0].seq, oldest=1) for kind in (State.kind, LeaseTaken.kind)]
    return "" if any(since) else failed[0].read(DriverFailed).why


def is_driven(store: Store) -> bool:
    """Whether a driver holds the lease, and has not failed: it keeps the lease for a moment then."""
    return current_holder(store) is not None and not driver_failure(store)
