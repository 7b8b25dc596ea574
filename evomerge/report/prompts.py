"""What a model is asked, for people: the rendered prompt and its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from evomerge.printable import printable

if TYPE_CHECKING:  # imports torch, which is not needed to read a store
    from evomerge.search.preparing.asking import Shown

_MAX_LINE = 2000
_MAX_LINES = 200


def prompt_lines(shown: Shown) -> Iterator[str]:
    """The prompt of one item: where it comes from, the text as the model reads it, and its tokens."""
    scored = f", of which the last {shown.scored} are scored" if shown.scored else ""
    yield f"{shown.place}: {printable(shown.item)}, {len(shown.tokens)} tokens{scored}"
    yield from text_lines("prompt", shown.prompt)
    if shown.answer:
        yield from text_lines("answer", shown.answer)
    yield f"  tokens  {token_text(shown)}"


def text_lines(title: str, text: str) -> Iterator[str]:
    """A multi-line text under a title, with each line made printable and marked with a bar."""
    lines = text.split("\n")
    for number, line in enumerate(lines[:_MAX_LINES]):
        yield f"  {title if number == 0 else '':{max(6, len(title))}} | {printable(line, _MAX_LINE)}"
    if len(lines) > _MAX_LINES:
        yield f"  {len(lines) - _MAX_LINES} more lines"


def token_text(shown: Shown) -> str:
    """The tokens as numbers, each with its text: 1 '<s>'."""
    return " ".join(f"{number} {printable(repr(text), 80)}" for number, text in shown.tokens)
