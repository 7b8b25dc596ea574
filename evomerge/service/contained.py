"""Files that the service serves: each must be inside the requested folder, and not a symlink."""

from __future__ import annotations

import stat
from pathlib import Path

from evomerge.service.problems import ProblemError


def contained(folder: Path, path: str) -> Path:
    """The regular file at a path below a folder.

    Raises:
        ProblemError: there is no such file, it is outside the folder, or the path contains a symlink (404).
    """
    missing = ProblemError(404, "There is no such file")
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise missing
    target = folder
    try:
        for i, part in enumerate(parts):
            target = target / part
            mode = target.lstat().st_mode
            if not (stat.S_ISREG(mode) if i == len(parts) - 1 else stat.S_ISDIR(mode)):
                raise missing
    except (OSError, ValueError):
        raise missing from None
    return target
