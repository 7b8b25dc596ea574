"""Calibration texts: what sources are run over, once, for methods that must know what their layers are given.

They are no items of the search: nothing is scored on them, and they need no answers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import InputError
from evomerge.files import parse_json, read_text

_LEAST_CHARACTERS = 20
"""What is shorter says next to nothing of what layers are given."""

_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Calibration:
    """Some texts, and how much of each counts.

    Attributes:
        texts: in order.
        tokens: the most of each text that counts.
    """

    texts: tuple[str, ...]
    tokens: int

    @property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 of all that the results follow from."""
        return hashlib.sha256(json.dumps([self.tokens, *self.texts]).encode()).hexdigest()[:16]


def read_calibration(file: Path, prompts: int, tokens: int, place: str) -> Calibration:
    """The first texts of a file: of lines of JSON under ``text``, and of any other file its lines.

    Args:
        prompts: how many.
        tokens: the most of each that counts.
        place: of the file's name, for messages.

    Raises:
        InputError: the file cannot be read, or holds too few texts, or one that is none.
    """
    texts: list[str] = []
    for number, line in enumerate(read_text(file, place, _MOST_BYTES).splitlines(), start=1):
        if len(texts) == prompts:
            break
        if not line.strip():
            continue
        text = _text_of(line, f"{place}: line {number}") if file.suffix == ".jsonl" else line.strip()
        if len(text) < _LEAST_CHARACTERS:
            problem = f"has {len(text)} characters; a text of fewer than {_LEAST_CHARACTERS} calibrates nothing"
            raise InputError(f"{place}: line {number}", problem, "Give whole sentences, such as prompts of the task.")
        texts.append(text)
    if len(texts) < prompts:
        raise InputError(
            place, f"holds {len(texts)} texts of the {prompts} that are asked for", "Lower `calibration.prompts`."
        )
    return Calibration(tuple(texts), tokens)


def _text_of(line: str, place: str) -> str:
    try:
        content = parse_json(line.encode())
    except ValueError as error:
        raise InputError(place, f"is no JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("text"), str):
        raise InputError(place, "has no `text`", 'A line reads {"text": "..."}.')
    text: str = content["text"]
    return text.strip()
