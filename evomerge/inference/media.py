"""What items and prompts hold beside text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

IMAGE = "<image>"
"""Stands in prompts for a picture, whatever the model's own token for one is."""


@dataclass(frozen=True)
class Media:
    """What an item or a prompt holds beside text.

    Attributes:
        kind: what kind of thing it is.
        file: where it lies; None where a data set holds it.
        sha256: of the file's bytes, or of the pixels where there is no file, in hex; empty where nobody has looked.
        held: the picture as PIL has it, where there is no file.
    """

    kind: Literal["image"]
    file: Path | None
    sha256: str = ""
    held: Any = field(default=None, compare=False, repr=False)
