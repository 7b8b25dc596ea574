"""Rows run in a process beside this one, so that no end of a row is the end of the others.

A child runs one row after another and reports on its standard output, as JSON lines: {"rows": names} that it is to run,
then for each {"starts": name} and {"name", "ok", "figure", "seconds", "printed"}, where "printed" is how many bytes it
has written to its standard error by then. After an error that spoils the device for its process it ends by itself.
Whatever ends it (a signal, the kernel for want of memory, the time limit), the row that was running has failed, and
another child goes on with the rest.
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
    """A child ended before it knew what to run; the message is what it printed."""


def run_rows(wanted: Sequence[str], command: Callable[[Sequence[str]], list[str]], limit_s: float) -> Iterator[Result]:
    """The results of rows, in order, as they come.

    Args:
        wanted: names of the rows; all where empty.
        command: (names) -> the command of a child that runs these, or all.
        limit_s: the longest that a row may take; the start of its process counts with the first.

    Raises:
        NothingRanError: such as for a name that is none of a row.
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
            if left and (running or is_new):  # a child may end between two rows, but not before its first
                name = running or left[0]
                left.remove(name)
                yield Result(name, False, child.end(), child.seconds(), child.printed())


class Child:
    """A process that runs rows, and what it prints.

    Args:
        command: of the process.
        limit_s: how long it may say nothing before it is ended.
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
        """What the child reports, until its end."""
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
        """What the child has printed since the last call, up to byte ``end`` or to now."""
        size = -1 if end is None else end - self._printed.tell()
        return self._printed.read(size).decode("utf-8", "replace")

    def seconds(self) -> float:
        """Since the last report, or since the start."""
        return time.monotonic() - self._heard_at

    def end(self) -> str:
        """How the child ended, for people."""
        if self._is_late:
            return f"took longer than {self._limit_s:.0f} s"
        code = self._process.returncode
        return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
