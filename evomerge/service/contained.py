"""Files that the service gives out: each lies in the folder that it is asked for in, and is no link."""

from __future__ import annotations

import stat
from pathlib import Path

from evomerge.service.problems import ProblemError


def contained(folder: Path, path: str) -> Path:
    """The plain file at a path below a folder.

    Raises:
        ProblemError: there is none (404): none at all, one outside, or a link on the way, which could lead there.
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
