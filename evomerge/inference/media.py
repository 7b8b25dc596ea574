"""Content of items and prompts other than text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

IMAGE = "<image>"
"""Stands for a picture in prompts, whatever token the model itself uses."""


@dataclass(frozen=True)
class Media:
    """A piece of content other than text, in an item or a prompt.

    Attributes:
        kind: the kind of content.
        file: its file; None if a data set holds it.
        sha256: hash of the file's bytes, or of the pixels if there is no file, in hex; empty if not computed.
        held: the PIL image, if there is no file.
    """

    kind: Literal["image"]
    file: Path | None
    sha256: str = ""
    held: Any = field(default=None, compare=False, repr=False)
