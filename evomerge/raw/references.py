"""Recognises references to tables of tensors. Separate from the tables themselves, because it does not need torch."""

from __future__ import annotations

import os
from pathlib import Path

from evomerge.files import is_path

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
INDEX = "model_index.json"
"""The file that names the components of a diffusers folder."""


def is_table(reference: str, root: Path) -> bool:
    """Whether a reference names a table: a file of tensors, or a diffusers folder."""
    if not is_path(reference) or "+" in reference:
        return False
    path = os.path.join(root, os.path.expanduser(reference))
    if path.endswith((".safetensors", *PICKLED)):
        return not os.path.isdir(path)
    return os.path.isfile(os.path.join(path, INDEX))
