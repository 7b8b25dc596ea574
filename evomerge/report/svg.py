"""Helpers for the pictures of a search: SVG elements that are safe for any name and number."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

LIGHT = {"ground": "#ffffff", "ink": "#1f2328", "quiet": "#59636e", "guide": "#d1d9e0"}
DARK = {"ground": "#0d1117", "ink": "#e6edf3", "quiet": "#9198a1", "guide": "#30363d"}
COLOURS = (  # on light and dark backgrounds, each with a contrast of at least 4.5:1
    ("#0969da", "#58a6ff"), ("#bc4c00", "#f0883e"), ("#1a7f37", "#3fb950"),
    ("#8250df", "#bc8cff"), ("#bf3989", "#f778ba"), ("#0f766e", "#2dd4bf"),
)  # fmt: skip


def bound(rules: str, kind: str) -> str:
    """CSS rules scoped to pictures of this class, because one page may contain several."""
    return re.sub(r"([^{}]+)({[^}]*})", lambda m: ",".join(f".{kind} {s}" for s in m[1].split(",")) + m[2], rules)


def shape(parent: ET.Element, tag: str, kind: str, **numbers: float) -> ET.Element:
    """An element of the class ``kind``, with numbers rounded to a hundredth."""
    values = {name: f"{number:.2f}".rstrip("0").rstrip(".") for name, number in numbers.items()}
    return ET.SubElement(parent, tag, {"class": kind, **values})


def label(parent: ET.Element, text: str, kind: str, x: float, y: float) -> ET.Element:
    """A line of text."""
    element = shape(parent, "text", kind, x=x, y=y)
    element.text = legible(text)
    return element


def shortened(text: str, room: float, letter: float) -> str:
    """The text if it fits into ``room``, with ``letter`` as the width of a letter; otherwise its beginning."""
    most = max(1, int(room / letter))
    return text if len(text) <= most else text[: most - 1] + "…"


def legible(text: str) -> str:
    """The text without characters that XML cannot contain even if escaped."""
    return re.sub("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]", "\ufffd", text)
