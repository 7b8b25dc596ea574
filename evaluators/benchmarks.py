"""Recognises test items of well-known public benchmarks by their questions.

A search on such items finds the model that does best on them, so its score on the benchmark no longer means anything.
The search file must therefore consent to it. The questions themselves are not stored here, only hashes of them: one
file in ``data`` per benchmark, made by ``scripts/benchmark_hashes.py``.
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
"""How many hexadecimal digits of SHA-256 are kept, 48 bits: with 10,000 known questions, another text is mistaken for
one of them once in 3 * 10^10."""

_NOT_WORDS = re.compile(r"[\W_]+")
_LABELLED = re.compile(r"[^:：]{1,40}[:：](?P<rest>.+)")  # "Question: ...", in any language


def question_hash(question: str) -> str | None:
    """A hash of the letters and digits of a question; None for a text without any.

    Case, spaces, punctuation and character width are ignored, because copies of a benchmark differ in them.
    """
    plain = _NOT_WORDS.sub("", unicodedata.normalize("NFKC", question).casefold())
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_DIGITS] if plain else None


def benchmark_of(fields: Mapping[str, object]) -> str | None:
    """The benchmark that has one of the texts of an item as a test question; None if there is none.

    A question is recognised as a separate field, and as a line of a longer prompt, also after a label.
    """
    known = _known()
    hashes = (question_hash(text) for value in fields.values() if isinstance(value, str) for text in _questions(value))
    return next((known[hashed] for hashed in hashes if hashed in known), None)


def count(benchmarks: Iterable[str | None]) -> dict[str, int]:
    """How many items each benchmark has, given the benchmark of each item."""
    return dict(sorted(Counter(name for name in benchmarks if name is not None).items()))


@cache
def _known() -> dict[str, str]:
    """The benchmark of each hash. The English questions of MGSM are GSM8K's; they count as the latter."""
    files = sorted(DATA.glob("*.txt"), reverse=True)
    return {hashed: file.stem for file in files for hashed in file.read_text("ascii").split()}


def _questions(text: str) -> Iterator[str]:
    """The parts of a text that may be a question: the whole text, each line, and what follows a label."""
    yield text
    lines = text.splitlines()
    for line in lines:
        if len(lines) > 1:
            yield line
        if labelled := _LABELLED.match(line.strip()):
            yield labelled["rest"]
