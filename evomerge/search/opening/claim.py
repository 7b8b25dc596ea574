"""Which folder copies a search to object storage: one at a time, so that none overwrites another's later results.

A store that is a file knows its driver, but a copy of it elsewhere does not. So the copy includes ``driver.json``,
with a token that each new driver changes. A folder may keep copying while the token is the last that it knows: that of
its own last driver, or that of the copy from which it was fetched. Object storage has no locks. If two machines take
over a copy in the same second, both start, and the one that wrote first stops copying within a minute.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evomerge.errors import InputError
from evomerge.objects import Storage
from evomerge.store.fence import Holder

RECORD = "driver.json"
"""In the copy: the driver of the search, and the token."""

KEPT = ".artifacts.json"
"""In the folder: the URL of its copy, and its own tokens."""

BEAT_S = 60.0
"""How often a driver renews its claim."""

SILENT_S = 3 * BEAT_S
"""How long after the last renewal another folder may take over: one renewal may be lost, and one late."""


class TakenUpError(InputError):
    """The search continues in another folder: this one may no longer copy."""


class Claim:
    """A folder's right to copy, held from ``take`` to ``release``.

    Every method raises StorageError if the storage fails.
    """

    def __init__(self, storage: Storage, folder: Path) -> None:
        self._storage = storage
        self._kept = folder / KEPT
        self._token = ""

    def check(self) -> None:
        """Refuse a place that holds another folder's search.

        Raises:
            InputError: another search, or this one after another folder took over.
        """
        there, ours = _record(self._storage), self._tokens()
        if there is None or there["token"] in ours:
            return
        if not ours:
            url = self._storage.url
            hint = f"Continue it (evomerge resume {url}), or choose another name or another prefix."
            raise InputError(url, f"holds a search already, last driven by {_holder(there)}", hint)
        raise self._taken_up(there)

    def is_ours(self) -> bool:
        """Whether the folder exists and was the last to continue the copied search."""
        there = _record(self._storage)
        return there is not None and there["token"] in self._tokens()

    def take(self) -> None:
        """Take the right to copy. Raises InputError like ``check``."""
        self.check()
        ours = self._tokens()
        self._token = secrets.token_hex(8)
        # The old tokens stay until the new one is stored: this process may die in between.
        self._keep([*ours, self._token])
        self._write("driving")
        self._keep([self._token])

    def beat(self) -> None:
        """Renew the claim. Raises TakenUpError if another folder has the right now."""
        there = _record(self._storage)
        if there is not None and there["token"] != self._token:
            raise self._taken_up(there)
        self._write("driving")

    def release(self) -> None:
        """Release the claim, so that another folder can take it at once."""
        self._write("ended")

    def follow(self) -> None:
        """Let the folder, a copy of the current content of the storage, continue from it, unless its driver is running.

        Raises:
            InputError: the driver renewed its claim in the last SILENT_S, by the storage's clock.
        """
        there = _record(self._storage)
        if there is None:
            return
        holder = _holder(there)
        if there["state"] == "driving" and not holder.is_dead():
            silent_s = (self._storage.probe() - self._storage.modified(RECORD)).total_seconds()
            if silent_s < SILENT_S:
                problem = f"is driven by {holder}, which was last heard from {max(silent_s, 0):.0f} s ago"
                hint = f"Stop it first, or wait: {SILENT_S:.0f} s after its last sign of life it is free."
                raise InputError(self._storage.url, problem, hint)
        self._keep([there["token"]])

    def _taken_up(self, there: dict[str, Any]) -> TakenUpError:
        hint = (
            f"Continue from there (evomerge resume {self._storage.url} --dir NEW), or give this folder its own copy: "
            f"evomerge resume {self._kept.parent} --set artifacts=URL"
        )
        return TakenUpError(self._storage.url, f"was resumed from another folder, by {_holder(there)}", hint)

    def _write(self, state: str) -> None:
        content = {"token": self._token, "state": state, **asdict(Holder.this_process())}
        self._storage.write(RECORD, json.dumps(content).encode())

    def _tokens(self) -> list[str]:
        if not self._kept.is_file():
            return []
        kept = json.loads(self._kept.read_text())
        return list(kept["tokens"]) if kept["url"] == self._storage.url else []

    def _keep(self, tokens: list[str]) -> None:
        partial = self._kept.with_name(f"{KEPT}.partial")
        partial.write_text(json.dumps({"url": self._storage.url, "tokens": tokens}))
        partial.replace(self._kept)


def _record(storage: Storage) -> dict[str, Any] | None:
    content = storage.read(RECORD)
    if content is None:
        return None
    try:
        record: dict[str, Any] = json.loads(content)
        _holder(record), record["token"], record["state"]
    except (ValueError, LookupError, TypeError):
        raise InputError(storage.url, f"holds a {RECORD} of something else", "Choose another prefix.") from None
    return record


def _holder(record: dict[str, Any]) -> Holder:
    return Holder(record["host"], record["namespace"], record["pid"], record["started"])
