"""Items from JSON Lines files, for every evaluator that reads them: templates, and the two splits.

A hash of what an item asks decides its split, so adding items to a file moves no item from one split to the other.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from evaluators.base import Split
from evomerge.errors import InputError
from evomerge.json_lines import Line


class Splittable(Protocol):
    """An item: ``hash`` covers all of it, ``asks`` is the part that decides its split."""

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


def check_template(text: str) -> str:
    """Return a valid template: ``{question}`` for a field, ``{{`` for a brace. Otherwise raise ValueError."""
    for _, field, form, conversion in string.Formatter().parse(text):
        if field is not None and (not field.isidentifier() or form or conversion):
            raise ValueError(f"{{{field}}} is not a field; write {{question}}, and {{{{ for a brace")
    return text


def template_fields(template: str) -> set[str]:
    """The names of the fields in a template."""
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


def fill(key: str, template: str, line: Line) -> str:
    """Fill a template with the fields of a line; ``key`` is the template's name in the search file.

    Raises:
        InputError: a field is missing, or is neither text nor a number.
    """
    for field in sorted(template_fields(template)):
        if not isinstance(line.fields.get(field), str | int | float):
            has = ", ".join(sorted(line.fields)) or "nothing"
            problem = f"has no text or number in its field {field!r}; it has: {has}"
            raise InputError(line.place, problem, f"Fix the item, or the template `{key}: {template!r}`.")
    return template.format_map(line.fields)


def split_items(
    read: Callable[[Path], Sequence[Item]], file: Path, held_out_file: Path | None, held_out: float
) -> dict[Split, list[Item]]:
    """The items of both splits, from two files, or without a second file by the share ``held_out`` of the first.

    Raises:
        InputError: an empty split, or an item that is in both; and whatever ``read`` raises.
    """
    all_items = read(file)
    splits: dict[Split, list[Item]]
    if held_out_file is not None:
        splits = {"search": list(all_items), "held_out": list(read(held_out_file))}
        ours = {item.hash for item in all_items}
        if shared := [item for item in splits["held_out"] if item.hash in ours]:
            problem = f"is an item of {file} too, with {len(shared) - 1} more"
            raise InputError(shared[0].place, problem, "Leave it out of one of the two files.")
    else:  # by question, so that a question with two answers is never in both splits
        to_held_out = [int(digest(item.asks), 16) / 16**16 < held_out for item in all_items]
        splits = {
            "search": [item for item, held in zip(all_items, to_held_out, strict=True) if not held],
            "held_out": [item for item, held in zip(all_items, to_held_out, strict=True) if held],
        }
    for split, items in splits.items():
        if not items:
            problem = f"leaves no items for the {split} split, of {len(all_items)} items"
            hint = "Give more items, another share as `held_out:`, or a `held_out_file:`."
            raise InputError(str(file), problem, hint)
    return splits
