"""Exports that the service runs: each is a separate process that writes a complete model folder or nothing.

They are written to ``exports/NAME`` in the search's folder. A hidden file beside each one records its process, and
another holds its log, so that a restarted server finds it again.
"""

from __future__ import annotations

import shlex
import sys
import threading
from pathlib import Path
from typing import Any

from evomerge.report.naming import exported
from evomerge.search.settings.folder import STORE_VARIABLE
from evomerge.service import processes
from evomerge.service.bodies import Export, ExportFile, NewExport
from evomerge.service.contained import contained
from evomerge.service.problems import ProblemError
from evomerge.service.root import Root
from evomerge.store import SearchRow, Store
from evomerge.store.rows import candidate_id

FOLDER_NAME = "exports"
_KEPT = {"candidate", "bytes", "command"}  # in the record of an export, besides its process
_WRITTEN = 0.9  # the share of the progress for writing; the rest is for loading the model and scoring it again


class Exporter:
    """Starts exports of the searches in a root, and finds them."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._starting = threading.Lock()

    def start(self, search: str, store: Store, wanted: NewExport) -> Export:
        """Start an export of a candidate of a search, whose store is given.

        Raises:
            InputError: there is no such candidate, or the search's folder is not on this machine.
            ProblemError: an export with this name exists or is running (409).
        """
        folder = self._root.folder_of(search)
        number = exported(store, wanted.candidate)
        expected = _expected_bytes(store.search())
        candidate = candidate_id(number)
        name = wanted.name or candidate
        out = folder / FOLDER_NAME / name
        arguments = ["export", str(folder), str(out), "--candidate", candidate]
        arguments += [] if wanted.verify else ["--no-verify"]
        with self._starting:
            record = _record(out)
            if out.exists() or processes.is_alive(processes.read(record)):
                raise ProblemError(409, "An export of this name already exists", detail=name)
            out.parent.mkdir(exist_ok=True)
            _log(out).unlink(missing_ok=True)
            details = {"candidate": candidate, "bytes": expected, "command": shlex.join(["evomerge", *arguments])}
            more = {} if self._root.database is None else {STORE_VARIABLE: self._root.database}
            command = [sys.executable, "-m", "evomerge", *arguments]
            processes.start(command, self._root.folder, _log(out), record, details, **more)
        return _export(out, processes.read(record) or details)

    def all(self, search: str) -> list[Export]:
        """The exports of a search that were started by the service, by name."""
        folder = self._root.folder_of(search) / FOLDER_NAME
        if not folder.is_dir() or folder.is_symlink():
            return []
        exports = []
        for record in sorted(folder.glob(".*.json")):
            details = processes.read(record)
            if details is not None and details.keys() >= _KEPT:
                exports.append(_export(folder / record.name[1 : -len(".json")], details))
        return exports

    def one(self, search: str, name: str) -> Export:
        """One export by name. Raises ProblemError if there is none (404)."""
        for export in self.all(search):
            if export.id == name:
                return export
        raise ProblemError(404, "There is no such export")

    def file(self, search: str, name: str, path: str) -> Path:
        """A file of a finished export. Raises ProblemError if there is none (404)."""
        self.one(search, name)
        return contained(self._root.folder_of(search), f"{FOLDER_NAME}/{name}/{path}")


def _record(out: Path) -> Path:
    return out.with_name(f".{out.name}.json")


def _log(out: Path) -> Path:
    return out.with_name(f".{out.name}.log")


def _export(out: Path, details: dict[str, Any]) -> Export:
    done = out.is_dir() and not out.is_symlink()
    running = not done and processes.is_alive(details if "pid" in details else None)
    files = [file for file in sorted(out.iterdir()) if file.is_file() and not file.is_symlink()] if done else []
    return Export(
        id=out.name,
        candidate=details["candidate"],
        state="done" if done else "running" if running else "failed",
        progress=1.0 if done else _progress(out, details["bytes"]),
        folder=str(out),
        command=details["command"],
        files=[ExportFile(name=file.name, bytes=file.stat().st_size) for file in files],
        log="" if done else processes.tail(_log(out)),
    )


def _progress(out: Path, expected: int) -> float:
    """The progress of an export, from the bytes written under its temporary name."""
    written = 0
    for partial in out.parent.glob(f".{out.name}.partial-*"):
        try:
            written += sum(file.stat().st_size for file in partial.iterdir())
        except OSError:  # it has just been renamed
            continue
    return _WRITTEN * min(1.0, written / expected) if expected else 0.0


def _expected_bytes(search: SearchRow) -> int:
    """The approximate size of an export: that of the source that provides the tokenizer."""
    files = search.record.files.get(search.record.tokenizer_source, {})
    return sum(file["size"] for file in files.values())
