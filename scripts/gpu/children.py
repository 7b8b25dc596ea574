"""Runs rows in a child process, so that a crash in one row does not affect the others.

A child runs one row after another and reports on its standard output, as JSON lines: {"rows": names}, the rows that it
will run, then for each {"starts": name} and {"name", "ok", "figure", "seconds", "printed"}, where "printed" is the
number of bytes that it has written to its standard error so far. It exits after an error that makes the device unusable
for its process. Whatever ends it (a signal, the kernel when memory runs out, the time limit), the running row has
failed, and another child continues with the rest.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from results import Result


class NothingRanError(Exception):
    """A child ended before it reported its rows; the message is what it printed."""


def run_rows(wanted: Sequence[str], command: Callable[[Sequence[str]], list[str]], limit_s: float) -> Iterator[Result]:
    """Run rows and yield their results in order, as soon as they are known.

    Args:
        wanted: names of the rows; empty for all.
        command: (names) -> the command line of a child that runs these rows, or all.
        limit_s: the longest time that a row may take, in seconds; that of the first includes the start of its process.

    Raises:
        NothingRanError: no row could be started, for example because of an unknown name.
    """
    left, is_planned = list(wanted), False
    while left or not is_planned:
        with Child(command(left), limit_s) as child:
            running, is_new = "", True
            for report in child.reports():
                if "rows" in report:
                    left, is_planned = report["rows"], True
                elif "starts" in report:
                    running, is_new = report["starts"], False
                else:
                    running = ""
                    left.remove(report["name"])
                    log = child.printed(report.pop("printed"))
                    yield Result(**report, log="" if report["ok"] else log)
            if not is_planned:
                raise NothingRanError(child.printed())
            if left and (running or is_new):  # a child may end between two rows, but not before its first one
                name = running or left[0]
                left.remove(name)
                yield Result(name, False, child.end(), child.seconds(), child.printed())


class Child:
    """A process that runs rows, and its output.

    Args:
        command: its command line.
        limit_s: the process is killed if it reports nothing for this many seconds.
    """

    def __init__(self, command: Sequence[str], limit_s: float) -> None:
        self._limit_s = limit_s
        self._is_late = False
        self._heard_at = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="evomerge-gpu-")
        self._log = Path(self._folder.name) / "log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self._printed = self._log.open("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._printed.close()
        self._folder.cleanup()

    def reports(self) -> Iterator[dict[str, Any]]:
        """The reports of the child, until it ends."""
        assert self._process.stdout is not None
        lines = iter(self._process.stdout)
        while True:
            timer = threading.Timer(self._limit_s, self._end_late)
            timer.start()
            line = next(lines, None)
            timer.cancel()
            if line is None:
                self._process.wait()
                return
            self._heard_at = time.monotonic()
            yield json.loads(line)

    def _end_late(self) -> None:
        self._is_late = True
        self._process.kill()

    def printed(self, end: int | None = None) -> str:
        """The output of the child since the last call, up to byte ``end`` or to the present end."""
        size = -1 if end is None else end - self._printed.tell()
        return self._printed.read(size).decode("utf-8", "replace")

    def seconds(self) -> float:
        """The seconds since the last report, or since the start."""
        return time.monotonic() - self._heard_at

    def end(self) -> str:
        """How the child ended, as a text."""
        if self._is_late:
            return f"took longer than {self._limit_s:.0f} s"
        code = self._process.returncode
        return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
