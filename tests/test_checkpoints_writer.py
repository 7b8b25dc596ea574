from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers_checkpoints import save_model, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.writer import FolderWriter
from evomerge.errors import InputError

Tensors = dict[str, torch.Tensor]


def layout(tensors: Tensors) -> list[tuple[str, Sequence[int], torch.dtype]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]


def write(out: Path, tensors: Tensors, **options: Any) -> None:
    with FolderWriter(out, layout(tensors), **options) as folder:
        for name, tensor in tensors.items():
            folder.write(name, tensor)


SOME: Tensors = {
    "b.weight": torch.arange(6.0).reshape(2, 3).bfloat16(),
    "a.weight": torch.arange(5.0),
    "ü \"quoted\"": torch.arange(3.0).half(),
    "scalar": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = save_model(tiny_config(), tmp_path_factory.mktemp("models") / "plain")
    return open_source("a", str(folder), place="sources.a")


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---- what is written ----


def test_one_file_is_byte_for_byte_that_of_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "out", SOME)
    save_file(SOME, tmp_path / "reference", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "reference").read_bytes()
    assert files(tmp_path / "out") == ["model.safetensors"]


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.lists(st.integers(0, 4), max_size=3)


@given(
    content=st.dictionaries(st.text(max_size=6), st.tuples(shapes, dtypes), min_size=1, max_size=8),
    shard_bytes=st.integers(1, 200),
    random=st.randoms(use_true_random=False),
)
def test_any_tensors_in_any_order_come_back(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any], shard_bytes: int, random: Any
) -> None:
    content = {name: value for name, value in content.items() if name != "__metadata__" and name.isprintable()}
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in content.items()}
    out = tmp_path_factory.mktemp("any") / "out"
    order = list(tensors)
    random.shuffle(order)
    with FolderWriter(out, layout(tensors), shard_bytes) as folder:
        for name in order:
            folder.write(name, tensors[name])
    found: Tensors = {}
    for file in out.glob("*.safetensors"):
        part = load_file(file)
        reference = out.parent / "reference"
        save_file(part, reference, metadata={"format": "pt"})
        assert file.read_bytes() == reference.read_bytes()
        assert len(part) <= 1 or sum(t.numel() * t.element_size() for t in part.values()) <= shard_bytes
        found |= part
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("shard_bytes", [10_000_000, 4000, 1])
def test_a_written_model_loads_with_transformers(model: Source, tmp_path: Path, shard_bytes: int) -> None:
    out = tmp_path / "out"
    tensors = {name: model.read(name) for name in model.tensors}
    with FolderWriter(out, layout(tensors), shard_bytes) as folder:
        for name in reversed(tensors):
            folder.write(name, tensors[name])
        for file in model.files:
            if file.suffix != ".safetensors":
                folder.add_file(file)
        folder.add_text("README.md", "# ü\n")
    assert (out / "README.md").read_text("utf-8") == "# ü\n"
    one, other = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model.folder, out))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = open_source("b", str(out), place="sources.b")
    assert all(torch.equal(again.read(name), tensors[name]) for name in tensors)
    if shard_bytes == 4000:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
        assert "model-00001-of-00003.safetensors" in files(out)


def test_views_and_other_strides_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"transposed": whole.T, "part": whole[1:, ::2], "grad": whole.clone().requires_grad_()}
    write(tmp_path / "out", tensors)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    size, names = 1_000_000, [f"t{i}" for i in range(25)]
    process, used = psutil.Process(), []
    with FolderWriter(tmp_path / "out", [(name, (size,), torch.float32) for name in names]) as folder:
        for name in names:
            folder.write(name, torch.ones(size))
            used.append(process.memory_info().rss)
    assert max(used) - used[0] < 5 * 4 * size  # of 25


# ---- all or nothing ----


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with FolderWriter(tmp_path / "out", layout(SOME)) as folder:
            folder.write("a.weight", SOME["a.weight"])
            assert files(tmp_path) == [f".out.partial-{os.getpid()}"]
            raise error

    with pytest.raises(error):
        interrupted()
    assert files(tmp_path) == []


def test_a_forgotten_tensor_is_an_error(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path / "out", layout(SOME))
    with pytest.raises(RuntimeError, match="4 tensors were never written"), writer:
        writer.write("a.weight", SOME["a.weight"])
    assert files(tmp_path) == []


def test_wrong_tensors_are_errors(tmp_path: Path) -> None:
    def attempt(name: str, tensor: torch.Tensor, times: int = 1) -> None:
        with FolderWriter(tmp_path / "out", layout(SOME)) as folder:
            for _ in range(times):
                folder.write(name, tensor)

    with pytest.raises(KeyError, match="unknown"):
        attempt("unknown", torch.zeros(1))
    with pytest.raises(KeyError, match=r"a\.weight"):
        attempt("a.weight", SOME["a.weight"], times=2)
    with pytest.raises(ValueError, match=r"a\.weight is torch.float16"):
        attempt("a.weight", SOME["a.weight"].half())
    with pytest.raises(ValueError, match=r"a\.weight is torch.float32 \[1, 5\]"):
        attempt("a.weight", SOME["a.weight"][None])
    assert files(tmp_path) == []


def test_remains_of_a_killed_process_with_the_same_number_are_cleared(tmp_path: Path) -> None:
    remains = tmp_path / f".out.partial-{os.getpid()}"
    remains.mkdir()
    (remains / "model.safetensors").write_text("half")
    write(tmp_path / "out", SOME)
    assert files(tmp_path) == ["out"]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == SOME.keys()


def test_an_empty_folder_may_be_there_already(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", SOME)
    assert files(tmp_path / "out") == ["model.safetensors"]


def test_a_folder_made_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def overtaken() -> None:
        with FolderWriter(out, layout(SOME)) as folder:
            for name, tensor in SOME.items():
                folder.write(name, tensor)
            out.mkdir()
            (out / "precious").write_text("keep me")

    with pytest.raises(InputError, match="in the meantime"):
        overtaken()
    assert files(out) == ["precious"]
    assert files(tmp_path) == ["out"]


def refused(out: Path, problem: str, **options: Any) -> InputError:
    with pytest.raises(InputError, match=problem) as caught:
        FolderWriter(out, layout(SOME), **options)
    return caught.value


def test_places_that_cannot_be_written_are_refused_at_once(tmp_path: Path, model: Source) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("x")
    assert refused(full, "not empty").place == str(full)
    refused(full / "file", "is not a folder")
    refused(full / "file" / "out", "file is not a folder")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link", "is not a folder")
    (tmp_path / "alias").symlink_to(model.folder)
    refused(tmp_path / "alias" / "merged", "folder of a source", sources=[model.folder])
    refused(model.folder, "folder of a source", sources=[model.folder])
    assert files(tmp_path) == ["alias", "full", "link"]


# ---- full disks ----

Usage = namedtuple("Usage", "total used free")


def test_too_small_a_disk_is_refused_beforehand_with_the_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 32_000_100))
    error = refused(tmp_path / "out", r"32\.0 MB are needed \(5 tensors in 1 files .* but the disk has 32\.0 MB free")
    assert "another disk" in error.hint
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 33_000_000))
    FolderWriter(tmp_path / "out", layout(SOME))


@pytest.mark.parametrize("when", ["mkdir", "write", "text", "fsync"])
def test_a_disk_that_fills_up_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def attempt() -> None:
        with FolderWriter(tmp_path / "out", layout(SOME)) as folder:
            for i, (name, tensor) in enumerate(SOME.items()):
                if when == "write" and i == 2:
                    monkeypatch.setattr(torch.Tensor, "numpy", full)
                folder.write(name, tensor)
            if when == "text":
                monkeypatch.setattr(Path, "open", full)
            folder.add_text("README.md", "x")

    if when == "mkdir":
        monkeypatch.setattr(Path, "mkdir", full)
    if when == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"the disk is full: .* are needed in all") as caught:
        attempt()
    monkeypatch.undo()
    assert caught.value.place == str(tmp_path / "out")
    assert files(tmp_path) == []
    assert [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))] == []


def test_other_faults_of_the_disk_keep_their_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), FolderWriter(tmp_path / "out", layout(SOME)) as folder:
        folder.add_text("no/such/folder", "text")
    assert files(tmp_path) == []
