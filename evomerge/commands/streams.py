"""What a command prints on: streams that write what they can, and say once where they cannot.

A pipe whose reader has left, a full disk under a log, a closed descriptor and a terminal without the letters that we
print must neither end the work of hours nor end a command without a word.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from evomerge.errors import InputError


class Stream:
    """A text stream in whose place another one stands.

    Attributes:
        needed: whether what cannot be written ends the command, by an InputError; else it is let go, and the stream
            says so on stderr, once.
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
        """Throw away what could not be written: the interpreter would try again at its end, and complain."""
        try:
            self._stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def _miss(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError) and self.needed:
            raise error  # whoever read has enough: the command ends as others do
        if self.needed:
            problem = f"cannot be written ({error.strerror})"
            raise InputError("the output", problem, "Free some space, or send it elsewhere.") from error
        if not self._lost and self._stream is not sys.__stderr__:
            self._lost = True
            print(f"warning: the output cannot be written ({error.strerror}); the work goes on", file=sys.stderr)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Put streams that can always be written to in the place of stdout and stderr, while open."""
    for number in range(3):  # a file that is opened later must not become what others print on
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
    """Let work go on whose output cannot be written: what it does is in its store."""
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
    """The stream with a question mark for what its encoding has no letter for; nowhere, where it was closed."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    return stream
