"""Object storage: a folder named by a URL such as s3://bucket/prefix, in any storage that fsspec supports.

The storage's own library finds the credentials in its environment variables and files. URLs here never contain
credentials, and no message shows any.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from evomerge.errors import InputError

PARTIAL = ".partial"
"""The suffix of a file being written, in a storage where others could see an incomplete file."""

_PROBE = ".evomerge-probe-"

# In these storages objects appear atomically, and there are no folders: creating one could create a bucket.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_EXTRAS = {"s3": "s3", "s3a": "s3"}  # this project's extra with the packages for a kind of URL

_SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSWORD", re.IGNORECASE)
_SECRET_LENGTH = 8  # shorter values are not secrets, and would match ordinary words
_WITH_PASSWORD = re.compile(r"://[^/\s@]*:[^/\s@]*@")
_FORMER_URL = re.compile(r"[a-z0-9+]{2,}:/")
_MAX_SHOWN = 300  # characters of a message from a storage's library


_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "created")
"""Metadata of a file that changes when it is rewritten, the most reliable first."""


class FileVersion(NamedTuple):
    """A file in a storage: its size in bytes, and its tag or time there, if the storage provides one."""

    size: int
    tag: str


class StorageError(InputError):
    """The storage cannot be reached, or rejects an operation. It may succeed when retried."""


def is_url(text: str) -> bool:
    """Whether a place is a URL and not a path."""
    return "://" in text


def was_url(path: Path) -> bool:
    """Whether a path was a URL, of whose slashes a path keeps one: ``s3:/bucket/x``."""
    return _FORMER_URL.match(str(path)) is not None


def check_url(url: str, place: str) -> None:
    """Reject anything but the URL of a folder in a storage, and URLs with secrets; ``place`` says where it was given.

    Raises:
        InputError: the message never contains the URL.
    """
    if not is_url(url):
        raise InputError(place, "is not a URL", "Write it like s3://bucket/prefix.")
    rest = url.partition("://")[2]
    if ":" in rest.rpartition("@")[0] or "?" in rest:
        hint = "Leave it out: the storage's own environment variables and files hold it, as AWS_PROFILE or ~/.aws do."
        raise InputError(place, "holds a password, a key or options, and URLs are written down and shown", hint)
    if "::" in url or not rest.strip("/"):
        raise InputError(place, "is not the URL of one folder", "Write it like s3://bucket/prefix.")


class Storage:
    """A folder in object storage. Names of its files are relative to it, including subfolders: ``logs/c0001.log``.

    Every method raises StorageError if the storage cannot be reached or rejects the operation.

    Args:
        url: the folder's URL; the folder need not exist.
        place: named in messages if the URL cannot be used at all: a key of the search file, or an argument.

    Raises:
        InputError: the URL contains a secret, is of an unknown kind, or needs a package that is missing.
    """

    def __init__(self, url: str, place: str | None = None) -> None:
        check_url(url, place or "the URL of the storage")
        self.url = url.rstrip("/")
        self.name = self.url.rpartition("/")[2]
        kind = url.partition("://")[0]
        self._has_folders = kind not in _OBJECT_STORES
        _check_kind(kind, place or self.url)
        from fsspec.core import url_to_fs

        # Other processes write there too, so listings must not be cached.
        options = {} if self._has_folders else {"use_listings_cache": False}
        with self._faults("opened"):
            self._system, root = url_to_fs(self.url, skip_instance_cache=True, **options)
        self._root = str(root).rstrip("/")

    def probe(self) -> datetime:
        """Check that files can be written, inspected and removed here; return the storage's own time."""
        name = _PROBE + secrets.token_hex(4)
        self.write(name, b"evomerge")
        try:
            return self.modified(name)
        finally:
            self.remove([name])

    def files(self) -> dict[str, int]:
        """All files here and in subfolders, with their sizes in bytes, except remains of an interrupted probe."""
        with self._faults("listed"):
            entries = self._system.find(self._root, detail=True)
        above = f"{self._root}/"
        inside = {path[len(above) :]: entry for path, entry in entries.items() if path.startswith(above)}
        return {name: int(entry["size"]) for name, entry in sorted(inside.items()) if not name.startswith(_PROBE)}

    def versions(self) -> dict[str, FileVersion]:
        """The files here, without subfolders, each with its size and metadata that changes when it is rewritten."""
        with self._faults("listed"):
            found = self._system.find(self._root, maxdepth=1, detail=True)
        above = f"{self._root}/"
        inside = {path[len(above) :]: each for path, each in found.items() if path.startswith(above)}
        return {
            name: FileVersion(int(each["size"]), next((str(each[key]) for key in _TAGS if each.get(key)), ""))
            for name, each in sorted(inside.items())
            if not name.startswith(_PROBE)
        }

    def put(self, file: Path, name: str, progress: Callable[[int], None] = lambda sent: None) -> None:
        """Upload a file atomically; ``progress`` is called with the number of bytes sent so far."""
        from fsspec.callbacks import Callback

        callback = Callback(hooks={"sent": lambda size, value, **_: progress(value)})
        self._whole(name, lambda path: self._system.put_file(str(file), path, callback=callback))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file atomically."""
        self._whole(name, lambda path: self._system.pipe_file(path, content))

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if there is none."""
        with self._faults("read"):
            try:
                content: bytes = self._system.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
            return content

    def get(self, name: str, file: Path) -> None:
        """Download a file; parent folders of ``file`` are created."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._faults("read"):
            self._system.get_file(f"{self._root}/{name}", str(file))

    def size(self, name: str) -> int:
        """The size of a file there, in bytes."""
        with self._faults("looked at"):
            return int(self._system.info(f"{self._root}/{name}")["size"])

    def modified(self, name: str) -> datetime:
        """When a file was last written, by the storage's clock."""
        with self._faults("looked at"):
            written_at: datetime = self._system.modified(f"{self._root}/{name}")
            return written_at

    def remove(self, names: Sequence[str]) -> None:
        """Remove files one by one, ignoring those that do not exist."""
        with self._faults("removed from"):
            for name in names:
                if self._system.exists(f"{self._root}/{name}"):
                    self._system.rm_file(f"{self._root}/{name}")

    def _whole(self, name: str, write: Callable[[str], None]) -> None:
        path = f"{self._root}/{name}"
        with self._faults("written to"):
            if not self._has_folders:
                write(path)
                return
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            write(path + PARTIAL)
            self._system.mv(path + PARTIAL, path)

    @contextmanager
    def _faults(self, done: str) -> Iterator[None]:
        """Convert exceptions to StorageError: every storage has its own, few of them OSErrors."""
        try:
            yield
        except Exception as error:
            hint = "Check the URL, the network, and the credentials in the environment."
            raise StorageError(self.url, f"cannot be {done} ({_public(error)})", hint) from None


def _check_kind(kind: str, place: str) -> None:
    """Reject a kind of storage that is unknown or not installed."""
    import fsspec

    try:
        fsspec.get_filesystem_class(kind)
    except ImportError as error:
        hint = f"pip install 'evomerge[{_EXTRAS[kind]}]'" if kind in _EXTRAS else f"{error}."
        raise InputError(place, f"{kind}:// needs a package that is not installed here", hint) from None
    except ValueError:
        hint = "Known are s3://, gs://, abfs://, file:// and others of fsspec's."
        raise InputError(place, f"{kind}:// is not a known kind of storage", hint) from None


def _public(error: Exception) -> str:
    """The message of an exception, on one line, without secrets from the environment."""
    text = (str(error).strip() or type(error).__name__).partition("\n")[0]
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SECRET_LENGTH:
            text = text.replace(value, "***")
    return _WITH_PASSWORD.sub("://***@", text)[:_MAX_SHOWN]
