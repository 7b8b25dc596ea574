"""Makes foreign text printable: nothing that moves the cursor, hides or reorders letters, and a limited length.

Names of files and tensors, values of configurations and messages of libraries are written by others. Printed unchanged,
they can fake lines of output, set a terminal's title, or run on for megabytes.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CHARACTERS = 480
"""The maximum length of a message, so that it stays below 500 with the prefix that a command adds."""

_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Characters that print nothing although Unicode classifies them as letters or marks."""


def printable(text: str, most: int = MAX_CHARACTERS) -> str:
    """A text on one line of at most ``most`` characters, with invisible characters written as escapes (``\\x1b``).

    Omissions in the middle are marked by an ellipsis. A text that is printable and short enough is unchanged.
    """
    if len(text) > 2 * most:  # avoids examining megabytes character by character
        text = text[:most] + text[-most:]
    if not text.isprintable() or _INVISIBLE.search(text):
        text = "".join(map(_escaped, text))
    if len(text) <= most:
        return text
    start = 2 * most // 3
    return f"{text[:start]}…{text[len(text) - (most - start - 1) :]}"


def fitted(texts: Sequence[str], most: int = MAX_CHARACTERS) -> list[str]:
    """Make texts that are printed together printable, with a total of ``most`` characters; shortens the longest."""
    shown = [printable(text, most) for text in texts]
    room = dict.fromkeys(range(len(shown)), 0)
    left = most
    for rank, i in enumerate(sorted(room, key=lambda i: len(shown[i]))):
        room[i] = min(len(shown[i]), left // (len(shown) - rank))
        left -= room[i]
    return [printable(text, room[i]) for i, text in enumerate(shown)]


def ranges(numbers: Sequence[int], to: str = "-") -> str:
    """Ascending numbers as ranges: 0-9, 12, 20-29."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}{to}{run[-1]}" for run in runs)


def without_nan(content: Any) -> Any:
    """The same content for JSON, which has no NaN and infinities: such numbers become null."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    return [without_nan(value) for value in content] if isinstance(content, list | tuple) else content


def _escaped(character: str) -> str:
    if character.isprintable() and not _INVISIBLE.match(character):
        return character
    if unicodedata.category(character) == "Zs":  # spaces of other widths
        return character
    return character.encode("unicode_escape").decode("ascii")
