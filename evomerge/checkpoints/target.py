"""Where a model folder is to be made, looked at before anything expensive: no torch is needed for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from evomerge.errors import InputError


def check_target(out: Path, sources: Sequence[Path] = ()) -> None:
    """See that a folder can be made at ``out``: nothing is there, or an empty folder, and not within a source.

    Raises:
        InputError: it cannot be made there.
    """
    out = out.absolute()
    place = str(out)
    for folder in sources:
        if out.resolve().is_relative_to(folder.resolve()):
            raise InputError(place, f"lies in the folder of a source ({folder.resolve()})", "Choose another folder.")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(place, "is not a folder", "Choose another name.")
    if out.exists() and any(out.iterdir()):
        raise InputError(place, "exists and is not empty", "Choose another folder, or remove it.")
    if not out.parent.is_dir():
        raise InputError(place, f"there is no folder {out.parent} to put it in", "Create it.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(place, f"the folder {out.parent} cannot be written to", "Choose another folder.")
