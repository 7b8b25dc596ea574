"""Checks where a model folder is to be created, before anything expensive; does not need torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from evomerge.errors import InputError
from evomerge.objects import was_url


def check_target(out: Path, sources: Sequence[Path] = ()) -> None:
    """Check that a folder can be created at ``out``: nothing exists there, or an empty folder, and not in a source.

    Parent folders need not exist yet.

    Raises:
        InputError: it cannot be created there.
    """
    refuse_url(out)
    out = out.absolute()
    place = str(out)
    for folder in sources:
        if out.resolve().is_relative_to(folder.resolve()):
            raise InputError(place, f"is in the folder of a source ({folder.resolve()})", "Choose another folder.")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(place, "is not a folder", "Choose another name.")
    if out.exists() and any(out.iterdir()):
        raise InputError(place, "exists and is not empty", "Choose another folder, or remove it.")
    above = existing_parent(out)
    if not above.is_dir():
        raise InputError(place, f"{above} is not a folder", "Choose another name.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(place, f"the folder {above} cannot be written to", "Choose another folder.")


def refuse_url(out: Path) -> None:
    """Raise InputError if a path was a URL: it would become a folder here that is called ``s3:``."""
    if was_url(out):
        hint = "Name a folder on this machine; `evomerge upload FOLDER URL` copies it to object storage."
        raise InputError(str(out).replace(":/", "://", 1), "is a URL, and this can only be written to a folder", hint)


def existing_parent(out: Path) -> Path:
    """The closest existing parent of ``out``."""
    return next(folder for folder in out.absolute().parents if os.path.lexists(folder))
