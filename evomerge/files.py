"""Reads files written by others: only regular files, and only up to a size limit for each kind.

A FIFO in place of a file would block forever, and a device could deliver an endless stream of bytes. So a file is
opened once, checked through its handle, and read through the same handle.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import TypedDict  # pydantic requires it before Python 3.12

from evomerge.errors import InputError

JSON_BYTES = 64_000_000
"""The maximum bytes of a JSON file; the largest existing tokenizers take half of it."""

TEXT_BYTES = 64_000_000

GGUF = ".gguf"
"""The suffix of a file that is a complete model."""

TENSORS = ".safetensors"
"""The suffix of a file of tensors; a table of tensors is a model in a single such file."""

_MAX_VALUES = 5_000_000  # in one JSON text; as Python objects they take about 500 MB
_MAX_DEEP = 100
_MAX_DIGITS = 40  # 10**30 is what tokenizers write for "no limit"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


class FileFingerprint(TypedDict):
    """The content of a file (SHA-256, hex) and its metadata (size in bytes, modification time in ns)."""

    sha256: str
    size: int
    mtime_ns: int


def open_file(file: Path, place: str, most: int | None = None) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        place: the place for error messages, as in ``InputError``.
        most: the maximum bytes of a file of this kind.

    Raises:
        InputError: there is no such file, it may not be read, is not a regular file, or is larger than ``most``.
    """
    try:
        check_plain(file, place, most)  # before opening it, since merely opening a device can have effects
        stream = open(file, "rb", opener=_opener)  # noqa: SIM115
    except (OSError, ValueError) as error:  # a null byte in the name raises ValueError
        raise InputError(place, f"{file} {_why_not(error)}") from None
    try:
        _check(file, os.fstat(stream.fileno()), place, most)  # the file may have been replaced before it was opened
    except InputError:
        stream.close()
        raise
    return stream


def check_plain(file: Path, place: str, most: int | None = None) -> None:
    """Reject, without opening it, what is not a regular file or is larger than ``most`` bytes.

    Raises:
        InputError: it is rejected.
        OSError: it does not exist.
    """
    _check(file, os.stat(file), place, most)


def read_bytes(file: Path, place: str, most: int) -> bytes:
    """All bytes of a regular file.

    Raises:
        InputError: as for ``open_file``.
    """
    with open_file(file, place, most) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise _too_large(file, len(content), place, most)
    return content


def read_text(file: Path, place: str, most: int = TEXT_BYTES, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a regular file.

    Args:
        errors: how to handle invalid bytes, as for ``bytes.decode``.

    Raises:
        InputError: as for ``open_file``, or it is not text in this encoding.
    """
    try:
        return read_bytes(file, place, most).decode(encoding, errors)
    except UnicodeDecodeError as error:
        problem = (
            f"{file.name} cannot be read: it is not text in {encoding.upper()} ({error.reason} at byte {error.start})"
        )
        raise InputError(place, problem, f"Save it as {encoding.upper()}.") from None


def read_json(file: Path, place: str, most: int = JSON_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: as for ``open_file`` or ``parse_json``.
    """
    raw = read_bytes(file, place, most)
    try:
        return parse_json(raw)
    except ValueError as error:
        raise InputError(place, f"{file.name} is not JSON ({error})", "Download it again.") from None


def parse_json(raw: bytes, *, unique: bool = False) -> Any:
    """The value of a JSON text in UTF-8, with limits on the number of values, nesting depth and digits.

    Args:
        unique: reject a key that occurs twice in an object; otherwise the last value is used.

    Raises:
        ValueError: it is not JSON, exceeds a limit, or contains half of a surrogate pair, which cannot be encoded.
    """
    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if values > _MAX_VALUES:
        raise ValueError(f"it holds more than {_MAX_VALUES:,} values")
    try:
        content = json.loads(raw.decode("utf-8"), parse_int=_integer, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(f"it is nested more than {_MAX_DEEP} deep") from None
    _check_depth(content)
    if _SURROGATE.search(raw):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
    return content


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_path(text: str) -> bool:
    """Whether a text can be a file name that can be encoded: without null bytes or halves of surrogate pairs."""
    return "\0" not in text and text == text.encode("utf-8", "ignore").decode()


def _opener(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)  # does not block on a FIFO that was put there meanwhile


def _check(file: Path, status: os.stat_result, place: str, most: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        named = "" if place == str(file) else f"{file} "
        raise InputError(place, f"{named}is {kind}, not a plain file")
    if most is not None and status.st_size > most:
        raise _too_large(file, status.st_size, place, most)


def _too_large(file: Path, size: int, place: str, most: int) -> InputError:
    return InputError(place, f"{file} is too large: {size:,} bytes; such a file can have {most:,}")


def _why_not(error: OSError | ValueError) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOENT, errno.ENOTDIR):
        return "does not exist"
    if number == errno.ELOOP:
        return "is a link that leads back to itself"
    return f"cannot be read ({error.strerror if isinstance(error, OSError) else error})"


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it holds a whole number of {len(digits):,} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated[:100]!r} appears twice")
    return content


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(_MAX_DEEP):
        level = [
            value
            for outer in level
            for value in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {_MAX_DEEP} deep")


def is_model_here(path: str) -> bool:
    """Whether there is a model at a path: a folder, or a GGUF file."""
    # Unlike the methods of Path, these return False for names that no file can have.
    return os.path.isdir(path) or (path.endswith(GGUF) and os.path.isfile(path))


def split_expert(reference: str, root: Path | None) -> tuple[str, int | None]:
    """The folder and index in `folder#3`, one of several experts in a folder. An existing folder of that name wins."""
    folder, mark, number = reference.rpartition("#")
    if not mark or not folder or re.fullmatch(r"[0-9]{1,4}", number) is None:
        return reference, None
    if os.path.isdir(os.path.join(root or Path(), os.path.expanduser(reference))):
        return reference, None
    return folder, int(number)


def with_expert(folder: str, expert: int | None) -> str:
    """A reference to one expert in a folder, in the form that ``split_expert`` reads."""
    return folder if expert is None else f"{folder}#{expert}"


def absolute_reference(reference: str, root: Path) -> str:
    """Make the path of an existing folder absolute; anything else is unchanged (a hub id, or an error later)."""
    if not is_path(reference):
        return reference
    folder = os.path.join(root, os.path.expanduser(reference))
    is_folder = is_model_here(folder) or (folder.endswith(TENSORS) and os.path.isfile(folder))
    if "+" in reference and not is_folder:  # a model and its adapters
        return "+".join(absolute_reference(part, root) for part in reference.split("+"))
    inner, expert = split_expert(reference, root)
    if expert is not None:
        return with_expert(absolute_reference(inner, root), expert)
    return os.path.realpath(folder) if is_folder or reference.startswith((".", "/", "~")) else reference
