"""Robust output streams for commands: they write what they can, and report a failure once.

A closed pipe, a full disk under a log, a closed descriptor, or a terminal that cannot encode our characters must
neither end hours of work nor end a command silently.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from evomerge.errors import InputError


class Stream:
    """A wrapper of a text stream.

    Attributes:
        needed: whether output that cannot be written raises InputError and ends the command; otherwise it is discarded,
            with a single warning on stderr.
    """

    def __init__(self, stream: TextIO, *, needed: bool) -> None:
        self.needed = needed
        self._stream = stream
        self._lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._miss(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._miss(error)

    def close_quietly(self) -> None:
        """Discard what could not be written; otherwise the interpreter would try again at exit, and complain."""
        try:
            self._stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def _miss(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError) and self.needed:
            raise error  # the reader has closed the pipe: the command ends as other programs do
        if self.needed:
            problem = f"cannot be written ({error.strerror})"
            raise InputError("the output", problem, "Free some space, or send it elsewhere.") from error
        if not self._lost and self._stream is not sys.__stderr__:
            self._lost = True
            print(f"warning: the output cannot be written ({error.strerror}); continuing without it", file=sys.stderr)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Replace stdout and stderr by streams that can always be written to, while open."""
    for number in range(3):  # a file that is opened later must not become a standard stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = (Stream(_readable(stream), needed=stream is sys.stdout) for stream in before)
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            stream.close_quietly()


@contextmanager
def output_is_optional() -> Iterator[None]:
    """Let work continue if its output cannot be written, because its results are in the store."""
    out = sys.stdout
    if not isinstance(out, Stream):
        yield
        return
    out.needed, before = False, out.needed
    try:
        yield
        out.flush()
    finally:
        out.needed = before


def _readable(stream: TextIO | None) -> TextIO:
    """The stream with question marks for characters that it cannot encode; a null device if it is closed."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    return stream
