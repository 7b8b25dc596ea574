"""A model card as safe HTML, whatever it contains: HTML in it is escaped, and links cannot run scripts.

Pictures become links: an export's files are for download, and pictures from other sites must not be loaded.
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
_BELOW = 3  # how many levels the headings of a card are moved down
_DEEPEST = 6


@dataclass(frozen=True)
class Card:
    """A model card: its front matter as text, and the rest as HTML."""

    front: str
    body: Markup


def card_of(text: str, files: str) -> Card | None:
    """The card of an export whose files are below the URL ``files``; None if the text is empty."""
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
    """The target of a link in the card: a web page, or a file of the export."""
    if re.match(r"https?://", address) or address.startswith("#"):
        return address
    return files + quote(address.lstrip("/"), safe="%")
