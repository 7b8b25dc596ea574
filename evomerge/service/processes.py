"""Processes that outlive the server: started in their own sessions, and found again through files that record them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from evomerge.errors import InputError
from evomerge.files import read_json

TOKEN_VARIABLE = "EVOMERGE_TOKEN"
"""The environment variable with the service's token. It is not passed on to child processes."""

_MAX_BYTES = 100_000  # the size of a record

_TRACEBACK = "Traceback (most recent call last)"

_SAME_S = 1.0  # tolerance when start times reported by psutil are compared


def start(
    arguments: Sequence[str], folder: Path, log: Path, record: Path, details: Mapping[str, Any], **environment: str
) -> None:
    """Start a command in ``folder``, appending its output to ``log``; ``record`` identifies it and holds ``details``.

    Raises:
        OSError: the process cannot be started, or the files cannot be written.
    """
    inherited = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    with log.open("ab") as output:
        process = subprocess.Popen(
            arguments, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=inherited | environment, start_new_session=True,
        )  # fmt: skip
    threading.Thread(target=process.wait, daemon=True).start()  # reap it, or it becomes a zombie
    started = {"pid": process.pid, "created": _created(process.pid), "host": socket.gethostname()}
    write(record, {**details, **started})


def write(record: Path, content: Mapping[str, Any]) -> None:
    """Write a record atomically."""
    partial = record.with_name(f".{record.name}.partial")
    partial.write_text(json.dumps(dict(content)), encoding="utf-8")
    partial.replace(record)


def read(record: Path) -> dict[str, Any] | None:
    """The content of a record; None if there is none or it cannot be read."""
    try:
        content = read_json(record, record.name, _MAX_BYTES)
    except InputError:
        return None
    return content if isinstance(content, dict) else None


def is_alive(record: Mapping[str, Any] | None) -> bool:
    """Whether the recorded process is running on this machine."""
    if record is None or record.get("host") != socket.gethostname() or record.get("created") is None:
        return False
    try:
        process = psutil.Process(record["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
    except psutil.NoSuchProcess:
        return False
    return abs(process.create_time() - float(record["created"])) < _SAME_S  # the pid may have been reused


def tail(log: Path, characters: int = 4000) -> str:
    """The end of a log; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - characters))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def last_error(log: str) -> str:
    """The last error in the output of a command: its message, or the exception of a traceback; empty without one."""
    found, in_traceback = "", False
    for line in log.splitlines():
        if line.startswith("error: "):
            found, in_traceback = line, False
        elif line.startswith(_TRACEBACK):
            in_traceback = True
        elif in_traceback and line and not line.startswith(" "):
            found, in_traceback = line, False
    return found


def _created(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:  # it has already ended
        return None
