"""Fingerprints of sources, by which a search notices when a model changes while it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from evomerge.checkpoints.folder import TEMPLATES
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.files import FileFingerprint


def fingerprint(source: Source, known: Mapping[str, FileFingerprint] | None = None) -> dict[str, FileFingerprint]:
    """Fingerprints of all files of a source, by file name; for adapters with the adapter's number as a prefix.

    A file with the size and modification time recorded in ``known`` is assumed unchanged and is not read again.
    """
    return {name: _of_file(file, (known or {}).get(name)) for name, file in named_files(source).items()}


def content_digest(files: Mapping[str, FileFingerprint]) -> str:
    """One digest (SHA-256, hex) of the contents of all files of a source, wherever they are stored."""
    listed = "".join(f"{name} {file['sha256']}\n" for name, file in sorted(files.items()))
    return hashlib.sha256(listed.encode()).hexdigest()


def named_files(source: Source) -> dict[str, Path]:
    """All files of a source by their names in fingerprints."""
    own = (source.folder, source.folder / TEMPLATES)
    adapters = list(dict.fromkeys(file.parent for file in source.files if file.parent not in own))
    by_name = {}
    for file in source.files:
        if source.is_table or file.parent in own:
            by_name[file.relative_to(source.folder).as_posix()] = file
        else:
            by_name[f"adapter {1 + adapters.index(file.parent)}/{file.name}"] = file
    return by_name


def check_fingerprints(source: Source, recorded: Mapping[str, FileFingerprint]) -> dict[str, FileFingerprint]:
    """Reject a source that has changed since ``recorded`` was taken; return its current fingerprints.

    A file that was only touched or copied counts as unchanged.

    Raises:
        InputError: naming the file that changed, appeared or vanished.
    """
    now = fingerprint(source, recorded)
    for name in sorted(recorded.keys() | now.keys()):
        before = recorded[name]["sha256"] if name in recorded else None
        after = now[name]["sha256"] if name in now else None
        if before != after:
            what = "is new" if before is None else "is gone" if after is None else "has changed"
            raise InputError(
                source.place,
                f"{name} of {source.name} {what} since the search began ({source.folder})",
                "Put the old file back, or start a new search.",
            )
    return now


class Untouched:
    """Checks that files of sources do not change while in use, because they are memory-mapped, not copied.

    Args:
        sources: freshly opened sources.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = list(sources)
        self._looks = {file: _look(file) for source in self._sources for file in source.files}

    def check(self) -> None:
        """Check the size and modification time of each file, which takes microseconds.

        Raises:
            InputError: naming the file that has changed or is gone.
        """
        for source in self._sources:
            for name, file in named_files(source).items():
                if (now := _look(file)) != self._looks[file]:
                    what = "has changed" if now else "is gone"
                    problem = f"{name} of {source.name} {what} while it was in use ({source.folder})"
                    hint = "Nothing that was scored since then counts. Put the old file back and resume."
                    raise InputError(source.place, problem, hint)


def _look(file: Path) -> tuple[int, int] | None:
    """Size in bytes and modification time in ns; None if there is no such file."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _of_file(file: Path, known: FileFingerprint | None) -> FileFingerprint:
    stat = file.stat()
    if known is not None and (known["size"], known["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        return known
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": digest, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
