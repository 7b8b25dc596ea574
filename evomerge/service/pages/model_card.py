"""A model card as HTML that is safe whatever stands in it: no HTML of its own, no scripts as links.

Pictures become links: files of an export are for saving, and those of other sites are not to be loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

_FRONT = re.compile(r"\A---\n(.*?)\n---(?:\n|\Z)", re.DOTALL)
_BELOW = 3  # headings of the page that a card stands under
_DEEPEST = 6


@dataclass(frozen=True)
class Card:
    """A model card: its front matter as text, and the rest as HTML."""

    front: str
    body: Markup


def card_of(text: str, files: str) -> Card | None:
    """The card of an export whose files lie below the address ``files``; None of no text."""
    if not text:
        return None
    match = _FRONT.match(text)
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(text[match.end() :] if match else text)
    for token in _all(tokens):
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(_DEEPEST, int(token.tag[1]) + _BELOW)}"
        elif token.type == "link_open":
            token.attrs = {"href": _address(str(token.attrs["href"]), files), "rel": "noreferrer noopener"}
        elif token.type == "image":
            address = _address(str(token.attrs["src"]), files)
            token.type, token.content = "html_inline", Markup('<a href="{}">{}</a>').format(address, token.content)
    return Card(match[1] if match else "", Markup(reader.renderer.render(tokens, reader.options, {})))


def _all(tokens: Sequence[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _all(token.children or ())


def _address(address: str, files: str) -> str:
    """Where a link of the card leads: to the web, or to a file of the export."""
    if re.match(r"https?://", address) or address.startswith("#"):
        return address
    return files + quote(address.lstrip("/"), safe="%")
