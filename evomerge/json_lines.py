"""JSON Lines and plain text files, read line by line, each line with its place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import InputError
from evomerge.files import open_file, parse_json

_MAX_BYTES = 2_000_000_000  # per file
_LINE_BYTES = 8_000_000  # a longer item would exceed any model's context


@dataclass(frozen=True)
class Line:
    """The JSON object on one line of a file; ``place`` says where it was read, for messages."""

    fields: Mapping[str, Any]
    place: str


def read_lines(
    file: Path, name: str | None = None, *, example: str = '{"prompt": "1 + 1 =", "answer": "2"}'
) -> Iterator[Line]:
    """The objects of a file in order; blank lines are skipped.

    Args:
        name: the file's name in places; its path if None.
        example: an example of a line, for messages.

    Raises:
        InputError: a file that cannot be read, or a line that is not a JSON object.
    """
    for place, line in text_lines(file, name):
        try:
            fields = parse_json(line.encode())
        except ValueError as error:
            raise InputError(place, f"is not JSON that can be used ({error})") from None
        if not isinstance(fields, dict):
            raise InputError(place, "is not a JSON object", f"Write a line such as {example}.")
        yield Line(fields, place)


def text_lines(file: Path, name: str | None = None) -> Iterator[tuple[str, str]]:
    """The non-blank lines of a file, each preceded by its place.

    Args:
        name: the file's name in places; its path if None.

    Raises:
        InputError: the file cannot be read, or a line is not UTF-8, or too long.
    """
    if not file.is_symlink() and not file.exists():
        which = "" if name is None else f": {file}"
        hint = "A path is relative to the folder of the search file."
        raise InputError(name or str(file), f"there is no such file{which}", hint)
    with open_file(file, name or str(file), _MAX_BYTES) as stream:
        for number in itertools.count(1):
            raw = stream.readline(_LINE_BYTES + 1)  # in bytes, because text would also be split at U+2028
            if not raw:
                return
            place = f"{name or file}, line {number}"
            if len(raw) > _LINE_BYTES:
                raise InputError(place, f"has more than {_LINE_BYTES:,} bytes", "Break it into several lines.")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"is not UTF-8 (byte {raw[error.start]:#04x} at {error.start + 1})"
                raise InputError(place, problem, "Save the file as UTF-8.") from None
            if line.strip():
                yield place, line.rstrip("\n")
