"""Calibration texts: sources are run on them once, for methods that need to know the inputs of layers.

They are not items of the search: nothing is scored on them, and they need no answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from evomerge.errors import InputError
from evomerge.json_lines import read_lines, text_lines
from evomerge.plugins import unknown_name

_MIN_CHARACTERS = 20
"""Shorter texts say almost nothing about the inputs of layers."""

_MISSING_HINT = "Give texts for all sources that have none of their own, or for each of these."


@dataclass(frozen=True)
class Calibration:
    """Texts, read on first use, and how much of each is used.

    If the digest is known and all evidence is cached, they are never read.

    Attributes:
        read: returns the texts of sources without their own, in order; None if each source has its own.
        tokens: the maximum number of tokens used of each text.
        known_digest: the digest that a search has recorded, which the texts must match.
        own: by source, a function that returns the texts of its own task.
    """

    read: Callable[[], Sequence[str]] | None
    tokens: int
    known_digest: str | None = None
    own: Mapping[str, Callable[[], Sequence[str]]] = field(default_factory=dict)

    def texts_of(self, source: str) -> tuple[str, ...]:
        """The texts that a source is run on.

        Raises:
            InputError: they cannot be read, do not match the known digest, or there are none for this source.
        """
        shared, own = self._texts
        texts = own.get(source, shared)
        if texts is None:
            raise InputError("calibration", f"has no texts for {source}", _MISSING_HINT)
        return texts

    @property
    def all_texts(self) -> tuple[str, ...]:
        """All texts, the shared ones first and then those of single sources by name. Raises InputError: as above."""
        shared, own = self._texts
        return (*(shared or ()), *(text for source in sorted(own) for text in own[source]))

    @cached_property
    def _texts(self) -> tuple[tuple[str, ...] | None, dict[str, tuple[str, ...]]]:
        """The texts shared by sources without their own, and the texts of the others."""
        shared = None if self.read is None else tuple(self.read())
        own = {source: tuple(read()) for source, read in sorted(self.own.items())}
        if self.known_digest not in (None, self._digest_of(shared, own)):
            problem = f"these are not the texts with the digest {self.known_digest}, which the search began with"
            raise InputError("calibration", problem, "Put them back.")
        return shared, own

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 of everything that affects results. Raises InputError: as for ``texts_of``."""
        return self.known_digest or self._digest_of(*self._texts)

    def key_of(self, source: str) -> tuple[str, ...]:
        """A key that distinguishes the texts of a source from those of others, even if two sources have equal texts."""
        return (self.digest, source) if source in self.own else (self.digest,)

    def _digest_of(self, shared: Sequence[str] | None, own: Mapping[str, Sequence[str]]) -> str:
        content = [self.tokens, *(shared or ())] if not own else [self.tokens, shared, own]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def calibration_from(
    file: Path | None,
    prompts: int,
    tokens: int,
    place: str,
    known_digest: str | None = None,
    own: Mapping[str, tuple[Path, str]] | None = None,
) -> Calibration:
    """The first ``prompts`` texts of a file, of which ``tokens`` tokens each are used; ``read_texts`` reads them.

    Args:
        file: the file for sources without their own.
        place: where the file is named, for messages.
        known_digest: the digest that a search has recorded.
        own: by source, the file of its own texts and where it is named.
    """
    return Calibration(
        None if file is None else partial(read_texts, file, prompts, place),
        tokens,
        known_digest,
        {source: partial(read_texts, path, prompts, named_at) for source, (path, named_at) in (own or {}).items()},
    )


def check_all_have_texts(own: Mapping[str, str], has_shared: bool, sources: Collection[str]) -> None:
    """Reject texts for an unknown source, and a source without texts.

    Args:
        own: the sources that have texts of their own, with the place where each is named.
        has_shared: whether there are texts for the others.
        sources: all sources.

    Raises:
        InputError: naming the source.
    """
    for name, place in own.items():
        if name not in sources:
            raise unknown_name(name, sources, place, "source")
    if not has_shared and (missing := [name for name in sources if name not in own]):
        raise InputError("calibration", f"has no texts for {', '.join(missing)}", _MISSING_HINT)


def read_texts(file: Path, prompts: int, place: str) -> list[str]:
    """The first texts of a file: the ``text`` fields of JSON Lines, or the lines of any other file.

    Args:
        prompts: how many.
        place: where the file is named, for messages.

    Raises:
        InputError: the file cannot be read, has too few texts, or one that is invalid.
    """
    texts = []
    for line_place, text in islice(_texts(file, place), prompts):
        if len(text) < _MIN_CHARACTERS:
            problem = f"has {len(text)} characters; a text of fewer than {_MIN_CHARACTERS} calibrates nothing"
            raise InputError(line_place, problem, "Give whole sentences, such as prompts of the task.")
        texts.append(text)
    if not texts:
        raise InputError(place, "holds no texts", "Give whole sentences, a line each, such as prompts of the task.")
    if len(texts) < prompts:
        raise InputError(place, f"holds {len(texts)} of the {prompts} texts asked for", "Lower `calibration.prompts`.")
    return texts


def _texts(file: Path, place: str) -> Iterator[tuple[str, str]]:
    """Each text of a file, preceded by its place."""
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
