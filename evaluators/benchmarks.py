"""Which items are test items of well-known public benchmarks, told by what they ask.

A search on such items finds the model that does best on them, and its number there says nothing any more. So the search
file must consent to it. The texts themselves are not here, only hashes of the questions: one file of ``data`` for each
benchmark, made by ``scripts/benchmark_hashes.py``.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"

HASH_DIGITS = 12
"""Hexadecimal digits of SHA-256 that are kept, 48 bits: where 10,000 questions are known, another text is taken for one
of them once in 10^10."""

_NOT_WORDS = re.compile(r"[\W_]+")
_LABELLED = re.compile(r"[^:：]{1,40}[:：](?P<rest>.+)")  # "Question: ...", in any language


def question_hash(question: str) -> str | None:
    """A hash of the letters and digits of a question; None for a text without any.

    Case, spaces, punctuation and the width of characters count for nothing: copies of a benchmark differ in them.
    """
    plain = _NOT_WORDS.sub("", unicodedata.normalize("NFKC", question).casefold())
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_DIGITS] if plain else None


def benchmark_of(fields: Mapping[str, object]) -> str | None:
    """The benchmark that has one of the texts of an item as a test question; None where none has.

    A question is known as a field of its own, and as a line of a longer prompt, also behind a label.
    """
    known = _known()
    hashes = (question_hash(text) for value in fields.values() if isinstance(value, str) for text in _questions(value))
    return next((known[hashed] for hashed in hashes if hashed in known), None)


def count(benchmarks: Iterable[str | None]) -> dict[str, int]:
    """How many items each benchmark has, from the benchmark of each item."""
    return dict(sorted(Counter(name for name in benchmarks if name is not None).items()))


@cache
def _known() -> dict[str, str]:
    """The benchmark of each hash. The English questions of MGSM are GSM8K's: the first name counts."""
    files = sorted(DATA.glob("*.txt"), reverse=True)
    return {hashed: file.stem for file in files for hashed in file.read_text("ascii").split()}


def _questions(text: str) -> Iterator[str]:
    """The parts of a text that may be a question: all of it, each line, and what stands behind a label."""
    yield text
    lines = text.splitlines()
    for line in lines:
        if len(lines) > 1:
            yield line
        if labelled := _LABELLED.match(line.strip()):
            yield labelled["rest"]
