"""What a reference to a table of tensors looks like. Apart from the tables themselves, because it needs no torch."""

from __future__ import annotations

import os
from pathlib import Path

from evomerge.files import is_path

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
INDEX = "model_index.json"
"""Names the components of a folder of diffusers."""


def is_table(reference: str, root: Path) -> bool:
    """Whether a reference is to a table: a file of tensors, or a folder of diffusers."""
    if not is_path(reference) or "+" in reference:
        return False
    path = os.path.join(root, os.path.expanduser(reference))
    if path.endswith((".safetensors", *PICKLED)):
        return not os.path.isdir(path)
    return os.path.isfile(os.path.join(path, INDEX))
