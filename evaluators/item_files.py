"""Items from files of JSON lines, for every evaluator of such files: reading, templates, and the two splits.

A hash of what an item asks decides of its split, so that a longer file moves no item from one to the other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from evaluators.base import Split
from evomerge.errors import InputError
from evomerge.files import open_file, parse_json

ITEMS_BYTES = 2_000_000_000
"""Most bytes of a file of items."""

_LINE_BYTES = 8_000_000  # an item of as many is beyond any model's context


@dataclass(frozen=True)
class Line:
    """The JSON object on one line of a file; ``place`` says where it was read, for people."""

    fields: Mapping[str, Any]
    place: str


class Splittable(Protocol):
    """An item: ``hash`` is of all of it, ``asks`` of it is what decides of its split."""

    @property
    def hash(self) -> str: ...

    @property
    def asks(self) -> object: ...

    @property
    def place(self) -> str: ...


Item = TypeVar("Item", bound=Splittable)


def digest(content: object) -> str:
    """First 16 hex digits of the SHA-256 of the content as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(file: Path) -> Iterator[Line]:
    """The objects of a file in order; blank lines are passed over.

    Raises:
        InputError: a file that cannot be read, or a line that is no JSON object.
    """
    for place, line in text_lines(file):
        try:
            fields = parse_json(line.encode())
        except ValueError as error:
            raise InputError(place, f"is not JSON that can be used ({error})") from None
        if not isinstance(fields, dict):
            hint = 'Write a line such as {"prompt": "1 + 1 =", "answer": "2"}.'
            raise InputError(place, "is not a JSON object", hint)
        yield Line(fields, place)


def text_lines(file: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file of items that are not blank, each after its place.

    Raises:
        InputError: the file cannot be read, or a line is not UTF-8, or too long for an item.
    """
    if not file.is_symlink() and not file.exists():
        hint = "A path is relative to the folder of the search file."
        raise InputError(str(file), "there is no such file of items", hint)
    with open_file(file, str(file), ITEMS_BYTES) as stream:
        for number in itertools.count(1):
            raw = stream.readline(_LINE_BYTES + 1)  # in bytes, for text would also be cut inside of it, at U+2028
            if not raw:
                return
            place = f"{file}, line {number}"
            if len(raw) > _LINE_BYTES:
                raise InputError(place, f"has more than {_LINE_BYTES:,} bytes", "Write one item on each line.")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"is not UTF-8 (byte {raw[error.start]:#04x} at {error.start + 1})"
                raise InputError(place, problem, "Save the file as UTF-8.") from None
            if line.strip():
                yield place, line.rstrip("\n")


def check_template(text: str) -> str:
    """The template itself, when it is one: ``{question}`` for a field, ``{{`` for a brace. Else ValueError."""
    for _, field, form, conversion in string.Formatter().parse(text):
        if field is not None and (not field.isidentifier() or form or conversion):
            raise ValueError(f"{{{field}}} is not a field; write {{question}}, and {{{{ for a brace")
    return text


def template_fields(template: str) -> set[str]:
    """The fields that a template stands for."""
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


def fill(key: str, template: str, line: Line) -> str:
    """The template with the fields of the line; ``key`` is the template's name in the search file.

    Raises:
        InputError: a field is missing, or is neither text nor number.
    """
    for field in sorted(template_fields(template)):
        if not isinstance(line.fields.get(field), str | int | float):
            has = ", ".join(sorted(line.fields)) or "nothing"
            problem = f"has no text or number in its field {field!r}; it has: {has}"
            raise InputError(line.place, problem, f"Mend the item, or the template `{key}: {template!r}`.")
    return template.format_map(line.fields)


def split_items(
    read: Callable[[Path], Sequence[Item]], file: Path, held_out_file: Path | None, held_out: float
) -> dict[Split, list[Item]]:
    """The items of both splits: those of the two files, or without a second the share ``held_out`` of the one.

    Raises:
        InputError: an empty split, or an item that is in both; and what ``read`` raises.
    """
    all_items = read(file)
    splits: dict[Split, list[Item]]
    if held_out_file is not None:
        splits = {"search": list(all_items), "held_out": list(read(held_out_file))}
        ours = {item.hash for item in all_items}
        if shared := [item for item in splits["held_out"] if item.hash in ours]:
            problem = f"is an item of {file} too, with {len(shared) - 1} more"
            raise InputError(shared[0].place, problem, "Leave it out of one of the two files.")
    else:  # by what is asked, so that a question never is in both splits with two answers
        to_held_out = [int(digest(item.asks), 16) / 16**16 < held_out for item in all_items]
        splits = {
            "search": [item for item, held in zip(all_items, to_held_out, strict=True) if not held],
            "held_out": [item for item, held in zip(all_items, to_held_out, strict=True) if held],
        }
    for split, items in splits.items():
        if not items:
            problem = f"gives no item to the {split} split, of {len(all_items)} items"
            hint = "Give more items, another share as `held_out:`, or a `held_out_file:`."
            raise InputError(str(file), problem, hint)
    return splits
