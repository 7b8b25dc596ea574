"""Models at URLs are copied to a machine once, whoever wants them, and whole, whatever fails meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from helpers_miniature import MINIATURES

from evomerge.checkpoints import local_copy as module
from evomerge.checkpoints.local_copy import TRIES, local_copy
from evomerge.checkpoints.places import find_folder
from evomerge.checkpoints.source import open_source
from evomerge.errors import InputError
from evomerge.search.workers.worker import _check_content

PATTERNS = ["*.safetensors", "*.json"]
FILES = {"config.json": b'{"layers": 2}', "model.safetensors": b"weights" * 100, "notes.md": b"no part of it"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that are slept, which take none."""
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    return slept


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "shared" / "model"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("another layout")
    return folder


@pytest.fixture
def gets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are copied from the storage."""
    names: list[str] = []
    get = LocalFileSystem.get_file

    def counted(self: LocalFileSystem, path: str, *given: Any, **more: Any) -> Any:
        names.append(Path(path).name)
        time.sleep(0.01)
        return get(self, path, *given, **more)

    monkeypatch.setattr(LocalFileSystem, "get_file", counted)
    return names


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def failing(monkeypatch: pytest.MonkeyPatch, times: int, *, cut: bool = False) -> None:
    """Let the storage fail so many times: with an error, or by giving half a file."""
    get, left = LocalFileSystem.get_file, [times]

    def unsteady(self: LocalFileSystem, path: str, local: str, *given: Any, **more: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            Path(local).write_bytes(Path(path).read_bytes()[:3])
            if not cut:
                raise ConnectionResetError("the connection was reset")
            return None
        return get(self, path, local, *given, **more)

    monkeypatch.setattr(LocalFileSystem, "get_file", unsteady)


def test_of_many_that_want_a_model_at_once_one_copies_it(model: Path, gets: list[str]) -> None:
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: local_copy(f"file://{model}", "sources.a", PATTERNS), range(8)))
    assert len(set(folders)) == 1
    assert sorted(gets) == ["config.json", "model.safetensors"]
    assert content(folders[0]) == {name: FILES[name] for name in gets}
    local_copy(f"file://{model}", "sources.a", PATTERNS)
    assert len(gets) == 2


def test_a_model_that_is_written_anew_is_another_copy(model: Path) -> None:
    before = local_copy(f"file://{model}", "sources.a", PATTERNS)
    (model / "model.safetensors").write_bytes(b"better " * 100)
    os.utime(model / "model.safetensors", (1, 1))
    after = local_copy(f"file://{model}", "sources.a", PATTERNS)
    assert before != after
    assert (content(before)["model.safetensors"], content(after)["model.safetensors"]) == (
        FILES["model.safetensors"],
        b"better " * 100,
    )


def test_the_lock_of_a_process_that_dies_is_let_go_of_and_whole_files_stay(
    model: Path, gets: list[str], cache: Path
) -> None:
    folder = local_copy(f"file://{model}", "sources.a", PATTERNS)
    beside = folder.with_name(f"{folder.name}.partial")  # as of a process that was killed at its second file
    folder.rename(beside)
    (beside / "model.safetensors").rename(beside / "model.safetensors.partial")
    gets.clear()
    hold = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, str(folder.with_name(f"{folder.name}.lock"))]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder,
        ThreadPoolExecutor(1) as threads,
    ):
        assert holder.stdout is not None
        holder.stdout.readline()
        waits = threads.submit(local_copy, f"file://{model}", "sources.a", PATTERNS)
        try:
            time.sleep(0.1)
            assert not waits.done()
        finally:
            holder.kill()
        assert waits.result(10) == folder
    assert gets == ["model.safetensors"]
    assert content(folder) == {name: FILES[name] for name in ("config.json", "model.safetensors")}


@pytest.mark.parametrize("cut", [False, True], ids=["an error", "half a file"])
def test_a_storage_that_fails_is_given_longer_and_longer(
    model: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], cut: bool
) -> None:
    failing(monkeypatch, 3, cut=cut)
    assert content(local_copy(f"file://{model}", "sources.a", PATTERNS)).keys() == {"config.json", "model.safetensors"}
    assert len(pauses) == 3
    assert all(2**i <= pause < 2 ** (i + 1) for i, pause in enumerate(pauses))


def test_one_that_goes_on_failing_is_an_error_and_leaves_no_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], cache: Path
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, 1000)
        with pytest.raises(InputError, match=r"sources\.a.*the connection was reset"):
            local_copy(f"file://{model}", "sources.a", PATTERNS)
    assert len(pauses) == TRIES - 1
    assert [
        path.name for path in (cache / "evomerge" / "sources").iterdir() if path.suffix not in (".lock", ".partial")
    ] == []
    assert (local_copy(f"file://{model}", "sources.a", PATTERNS) / "config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///nowhere/at/all", "there is no model"),
        ("s3://user:secret@bucket/model", "holds a password"),
        ("gopher://bucket/model", "is not a known kind of storage"),
        ("s3://", "is not the URL of one folder"),
    ],
)
def test_a_url_that_names_no_model_is_refused_with_its_place(url: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        find_folder(url, "sources.a", None)
    assert "sources.a" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_disk_without_room_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"GB are free"):
        local_copy(f"file://{model}", "sources.a", PATTERNS)


def test_a_source_at_a_url_is_that_in_its_folder(tmp_path: Path) -> None:
    here = open_source("maths", str(MINIATURES / "maths"), place="sources.maths")
    there = open_source("maths", f"file://{MINIATURES / 'maths'}", place="sources.maths")
    assert there.folder != here.folder
    assert there.tensors.keys() == here.tensors.keys()
    with pytest.raises(InputError, match="has changed since"):
        _check_content(there, "another digest")
