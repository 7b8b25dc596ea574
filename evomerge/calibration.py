"""Calibration texts: what sources are run over, once, for methods that must know what their layers are given.

They are no items of the search: nothing is scored on them, and they need no answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from evomerge.errors import InputError
from evomerge.json_lines import read_lines, text_lines

_LEAST_CHARACTERS = 20
"""What is shorter says next to nothing of what layers are given."""


@dataclass(frozen=True)
class Calibration:
    """Some texts, read when they are first needed, and how much of each counts.

    Whoever knows their digest and has all evidence of them never reads them.

    Attributes:
        read: gives the texts, in order.
        tokens: the most of each text that counts.
        known_digest: the digest that a search has recorded, which the texts must have.
    """

    read: Callable[[], Sequence[str]]
    tokens: int
    known_digest: str | None = None

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Raises InputError: they cannot be read, or are not those of the known digest."""
        texts = tuple(self.read())
        if self.known_digest not in (None, self._digest_of(texts)):
            problem = f"these are not the texts with the digest {self.known_digest}, which the search began with"
            raise InputError("calibration", problem, "Put them back.")
        return texts

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 of all that the results follow from. Raises InputError: as ``texts``."""
        return self.known_digest or self._digest_of(self.texts)

    def _digest_of(self, texts: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps([self.tokens, *texts]).encode()).hexdigest()[:16]


def calibration_from(file: Path, prompts: int, tokens: int, place: str, known_digest: str | None = None) -> Calibration:
    """The first ``prompts`` texts of a file, of which ``tokens`` tokens count each; ``read_texts`` reads them.

    Args:
        place: of the file's name, for messages.
        known_digest: as a search has recorded it.
    """
    return Calibration(partial(read_texts, file, prompts, place), tokens, known_digest)


def read_texts(file: Path, prompts: int, place: str) -> list[str]:
    """The first texts of a file: of lines of JSON under ``text``, and of any other file its lines.

    Args:
        prompts: how many.
        place: of the file's name, for messages.

    Raises:
        InputError: the file cannot be read, or holds too few texts, or one that is none.
    """
    texts = []
    for line_place, text in islice(_texts(file, place), prompts):
        if len(text) < _LEAST_CHARACTERS:
            problem = f"has {len(text)} characters; a text of fewer than {_LEAST_CHARACTERS} calibrates nothing"
            raise InputError(line_place, problem, "Give whole sentences, such as prompts of the task.")
        texts.append(text)
    if len(texts) < prompts:
        raise InputError(place, f"holds {len(texts)} of the {prompts} texts asked for", "Lower `calibration.prompts`.")
    return texts


def _texts(file: Path, place: str) -> Iterator[tuple[str, str]]:
    """Each text of a file after its place."""
    if file.suffix != ".jsonl":
        for line_place, text in text_lines(file, place):
            yield line_place, text.strip()
        return
    example = '{"text": "..."}'
    for line in read_lines(file, place, example=example):
        given = line.fields.get("text")
        if not isinstance(given, str):
            raise InputError(line.place, "has no `text`", f"Write a line such as {example}.")
        yield line.place, given.strip()
