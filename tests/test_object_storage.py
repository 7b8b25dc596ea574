"""Models and searches in object storage: on disk, in memory, and over HTTP on moto's S3 server."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import yaml
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from helpers_miniature import MINIATURES, SHORT_MATHS, evomerge, search_file, short_search_file
from helpers_search import Killed, create_store, drive, dying, make_setup, table
from moto.server import ThreadedMotoServer
from rich.console import Console
from s3fs import S3FileSystem

from evomerge.commands.delivering import local_folder
from evomerge.commands.merge import merge
from evomerge.commands.models import export
from evomerge.commands.run import resume
from evomerge.errors import InputError
from evomerge.merging.building.delivery import LAST, SUMS, check_free, upload
from evomerge.objects import Storage, StorageError, check_url
from evomerge.search.opening import claim
from evomerge.search.opening.artifacts import Artifacts, copy_url, fetch
from evomerge.search.opening.claim import KEPT, RECORD, Claim
from evomerge.search.settings.search_file import load_search_file
from evomerge.store import Store, acquire
from evomerge.store.fence import Holder

SECRET = "not-for-anybodys-eyes"
OUT = "s3://bucket/model"
_count = itertools.count()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of a bucket on a server of our own, which the environment leads to."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://bucket"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that nobody used before, in each kind of storage."""
    bucket = tmp_path.as_uri() if request.param == "file" else request.getfixturevalue(request.param)
    return f"{bucket}/place-{next(_count)}"


@pytest.fixture
def dead_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process left behind looks like that of a machine that is gone."""
    monkeypatch.setattr(Holder, "is_dead", lambda self: True)


# ---- a folder in a storage -------------------------------------------------------------------------------------------


def test_files_come_back_as_they_were_put(url: str, tmp_path: Path) -> None:
    storage = Storage(url)
    assert storage.files() == {}
    assert storage.read("none") is None
    (tmp_path / "one").write_bytes(b"one" * 1000)
    storage.put(tmp_path / "one", "below/one")
    storage.write("two", b"2")
    storage.write("two", b"22")
    assert storage.files() == {"below/one": 3000, "two": 2}
    assert (storage.read("two"), storage.size("below/one")) == (b"22", 3000)
    storage.get("below/one", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == (tmp_path / "one").read_bytes()
    # A neighbour whose name begins in the same way is another place.
    Storage(f"{url}-2").write("three", b"3")
    assert set(storage.files()) == {"below/one", "two"}
    storage.remove(["two", "none"])
    storage.probe()
    assert set(storage.files()) == {"below/one"}


@pytest.mark.parametrize(
    "text",
    [
        f"s3://AKIA:{SECRET}@bucket/x",
        f"s3://AKIA:{SECRET}/with/slashes@bucket/x",
        f"s3://bucket/x?X-Amz-Signature={SECRET}",
        f"filecache::s3://me:{SECRET}@bucket",
    ],
)
def test_a_url_with_a_secret_is_refused_and_never_shown(text: str, tmp_path: Path) -> None:
    for use in (
        lambda: check_url(text, "OUT"),
        lambda: Storage(text),
        lambda: load_search_file(search_file(tmp_path, artifacts=text)),
        lambda: merge(_recipe(tmp_path), text),
        lambda: resume(text, ()),
    ):
        with pytest.raises(InputError, match=r"environment variables") as refusal:
            use()
        assert SECRET not in str(refusal.value)


@pytest.mark.parametrize("text", ["backup/searches", "s3://", "filecache::s3://bucket/x"])
def test_what_is_no_url_of_a_folder_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"search\.yaml: artifacts"):
        load_search_file(search_file(tmp_path, artifacts=text))


def test_a_container_in_an_account_is_no_password() -> None:
    check_url("abfs://container@account.dfs.core.windows.net/x", "OUT")


def test_a_storage_that_cannot_be_used_says_how_to_mend_it(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    with pytest.raises(InputError, match="bucket does not exist"):
        Storage("s3://no-such-bucket/x").probe()
    with pytest.raises(InputError, match="is not a known kind of storage"):
        Storage("nonsense://x/y")
    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"pip install 'evomerge\[s3\]'"):
        Storage("s3://bucket/x")


def test_no_message_shows_what_the_environment_keeps_secret(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", SECRET)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(f"{SECRET} may not, at http://me:hidden@host/x")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(StorageError, match=r"\*\*\* may not, at http://\*\*\*@host/x"):
        Storage(memory).probe()


# ---- models ----------------------------------------------------------------------------------------------------------


def _model(folder: Path, fill: bytes) -> Path:
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors", LAST, "tokenizer.json"):
        (folder / name).write_bytes(fill * (40 + len(name)))
    (folder / "same.txt").write_text("in every model")
    return folder


def _content(storage: Storage) -> dict[str, bytes | None]:
    return {name: storage.read(name) for name in storage.files()}


def _whole(storage: Storage, folder: Path) -> bool:
    found = _content(storage)
    return found.pop(SUMS, None) is not None and found == {f.name: f.read_bytes() for f in folder.iterdir()}


def _breaking(url: str, at: int) -> mock._patch[Any]:
    """Let the ``at``-th writing from now on fail; on a disk or in memory half of the file is there then."""
    count = itertools.count(1)

    def wrap(kind: type, name: str) -> Callable[..., Any]:
        original = getattr(kind, name)

        def method(self: Any, first: Any, second: Any, **options: Any) -> Any:
            if next(count) != at:
                return original(self, first, second, **options)
            if name != "mv":
                path, content = (first, second) if name == "pipe_file" else (second, Path(first).read_bytes())
                with self.open(path, "wb") as stream:
                    stream.write(content[: len(content) // 2])
            raise OSError("the line was cut")

        async def of_s3(self: Any, first: Any, second: Any, **options: Any) -> Any:
            if next(count) == at:
                raise OSError("the line was cut")
            return await original(self, first, second, **options)

        return of_s3 if kind is S3FileSystem else method

    kinds: dict[str, type] = {"file": LocalFileSystem, "memory": MemoryFileSystem, "s3": S3FileSystem}
    kind = kinds[url.partition(":")[0]]
    names = ("_put_file", "_pipe_file") if kind is S3FileSystem else ("put_file", "pipe_file", "mv")
    return mock.patch.multiple(kind, **{name: wrap(kind, name) for name in names})


def test_an_upload_that_breaks_anywhere_shows_no_model_and_is_gone_on_with(url: str, tmp_path: Path) -> None:
    one, two = _model(tmp_path / "one", b"1"), _model(tmp_path / "two", b"2")
    for at in itertools.count(1):
        for again in (one, two):  # the same model, or another, all of whose files have the same sizes
            with _breaking(url, at):
                storage = Storage(f"{url}/{at}-{again.name}")
                if _survives(one, storage):
                    assert _whole(storage, one)
                    assert at > len(list(one.iterdir()))
                    return
            assert LAST not in storage.files()
            check_free(storage)
            upload(again, storage)
            assert _whole(storage, again)


def _survives(folder: Path, storage: Storage) -> bool:
    try:
        upload(folder, storage)
    except StorageError as error:
        return "the line was cut" not in str(error)
    return True


def test_files_that_are_there_are_not_sent_again(memory: str, tmp_path: Path) -> None:
    one, storage = _model(tmp_path / "one", b"1"), Storage(memory)
    with _breaking(memory, 9), pytest.raises(StorageError):  # each writing counts twice, for it is moved in the end
        upload(one, storage)
    there = [name for name in storage.files() if not name.endswith(".partial") and name != SUMS]
    assert there
    sent: list[tuple[int, int]] = []
    with mock.patch.object(Storage, "put", autospec=True, side_effect=Storage.put) as put:
        upload(one, storage, lambda done, of: sent.append((done, of)))
    assert {call.args[2] for call in put.call_args_list} == {f.name for f in one.iterdir()} - set(there)
    assert sent[-1][0] == sent[-1][1] == sum(f.stat().st_size for f in one.iterdir())


def test_a_file_of_another_size_is_noticed(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storage, "size", lambda self, name: 7)
    with pytest.raises(StorageError, match="has 7 bytes of"):
        upload(_model(tmp_path / "one", b"1"), Storage(memory))


def test_a_place_that_holds_something_is_refused(url: str, tmp_path: Path) -> None:
    upload(_model(tmp_path / "one", b"1"), Storage(f"{url}/one"))
    with pytest.raises(InputError, match="holds a model already"):
        check_free(Storage(f"{url}/one"))
    Storage(f"{url}/two").write("thesis.tex", b"")
    with pytest.raises(InputError, match="is not empty"):
        check_free(Storage(f"{url}/two"))


@pytest.mark.parametrize("last", ["model_index.json", "model.safetensors"])
def test_what_has_no_configuration_of_its_own_goes_up_with_what_loads_it_last(
    memory: str, tmp_path: Path, last: str
) -> None:
    """A folder of diffusers, whose components are folders within, and tensors that stand alone."""
    (tmp_path / "m" / "unet").mkdir(parents=True)
    for name in ("unet/config.json", "unet/weights.safetensors", "recipe.yaml", last):
        (tmp_path / "m" / name).write_text(f"this is {name}")
    for at in range(1, 9):  # each writing counts twice, for it is moved in the end
        storage = Storage(f"{memory}/{last}-{at}")
        with _breaking(memory, at), pytest.raises(StorageError):
            upload(tmp_path / "m", storage)
        assert last not in storage.files()
        check_free(storage)
        upload(tmp_path / "m", storage)
        with pytest.raises(InputError, match="holds a model already"):
            check_free(storage)
        found = _content(storage)
        assert found.pop(SUMS)
        assert found == {
            file.relative_to(tmp_path / "m").as_posix(): file.read_bytes()
            for file in (tmp_path / "m").rglob("*") if file.is_file()
        }  # fmt: skip


def _recipe(folder: Path) -> Path:
    models = [{"model": str(MINIATURES / name), "parameters": {"weight": 0.5}} for name in ("base", "maths")]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "bfloat16"}))
    return path


def test_a_merge_lies_in_the_bucket_as_it_would_on_disk(s3: str, tmp_path: Path) -> None:
    merge(_recipe(tmp_path), tmp_path / "merged")
    merge(_recipe(tmp_path), f"{s3}/merged")
    # There is no way from the bucket to the sources' folders, so that its recipe has their names alone.
    for name in ("recipe.yaml", "README.md"):
        assert (tmp_path / "merged" / name).is_file()
    on_disk = {f.name: f.read_bytes() for f in (tmp_path / "merged").iterdir()}
    found = _content(Storage(f"{s3}/merged"))
    assert found.pop(SUMS, None) is not None
    assert found.keys() == on_disk.keys()
    assert {name for name in found if found[name] != on_disk[name]} == {"recipe.yaml"}


@pytest.mark.parametrize("fault", [OSError("the line was cut"), KeyboardInterrupt()], ids=["fault", "interrupt"])
def test_a_model_that_cannot_be_uploaded_is_kept_and_uploaded_later(
    fault: BaseException,
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "made"))
    (tmp_path / "made").mkdir()
    url, done = f"{memory}/merged", MemoryFileSystem.put_file

    def cut(self: MemoryFileSystem, file: str, path: str, **options: Any) -> None:
        if Path(file).name == LAST:
            raise fault
        done(self, file, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", cut)
        assert evomerge("merge", _recipe(tmp_path), url) not in (0, None)
    said = capsys.readouterr()
    (kept,) = (tmp_path / "made").glob("evomerge-*/merged")
    assert "is not complete" in said.err
    assert f"all of it is in {kept}. To upload the rest: evomerge upload {kept} {url}" in said.err
    assert "merged into" not in said.out
    assert LAST not in Storage(url).files()

    assert evomerge("upload", kept, url) == 0
    assert _content(Storage(url)).keys() == {SUMS, *(file.name for file in kept.iterdir())}
    assert evomerge("upload", kept, url) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_a_model_that_cannot_be_made_is_not_kept(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail() -> None:
        with local_folder(f"{memory}/m", Console(quiet=True)) as folder:
            folder.mkdir()
            raise InputError("sources.a", "has a fault of its own")

    with pytest.raises(InputError, match="of its own"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_is_not_uploaded(memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, problem in ((tmp_path, "holds no model"), (tmp_path / "none", "is not a folder")):
        assert evomerge("upload", folder, memory) == 2
        assert problem in capsys.readouterr().err
    assert Storage(memory).files() == {}


@pytest.mark.parametrize(
    "command",
    [
        ("moe", "recipe.yaml", OUT), ("extract", "tuned", OUT, "--base", "base"), ("transplant", "one", "two", OUT),
        ("consolidate", "checkpoint", OUT, "--model", "model"), ("merge", "recipe.yaml", "out", "--keep-stages", OUT),
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_command_that_writes_to_folders_alone_takes_no_url_for_a_folder(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evomerge(*command) == 2
    assert f"{OUT}: is a URL" in (said := capsys.readouterr().err)
    assert "evomerge upload" in said
    assert list(tmp_path.iterdir()) == []


# ---- searches --------------------------------------------------------------------------------------------------------

CANDIDATES = 30


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    drive(folder, make_setup(candidates=CANDIDATES))
    return table(folder)


def _folder(folder: Path) -> Path:
    """The folder of a search that has not begun."""
    create_store(folder, make_setup(candidates=CANDIDATES)).close()
    (folder / "search.yaml").write_text("name: made-up\n")
    (folder / "logs").mkdir()
    (folder / "logs" / "c0001.1.log").write_text("it failed")
    return folder


def _copier(url: str, folder: Path) -> Artifacts:
    artifacts = Artifacts(url, folder)
    artifacts.take()
    return artifacts


@pytest.mark.parametrize("killed_at", [4, 9, 20, 36])
def test_a_search_taken_up_from_its_copy_is_the_one_that_was_not_interrupted(
    killed_at: int, memory: str, tmp_path: Path, undisturbed: list[tuple[object, ...]], dead_drivers: None
) -> None:
    folder, url = _folder(tmp_path / "one"), copy_url(memory, "made-up")
    artifacts = _copier(url, folder)
    turns = itertools.count()

    def idle(control: object) -> None:
        # The store is open and its newest pages are in the log beside it, as in a real search.
        if next(turns) % 3 == 0:
            assert artifacts.turn()

    with dying(killed_at), pytest.raises(Killed):
        drive(folder, make_setup(candidates=CANDIDATES), idle=idle)
    shutil.rmtree(folder)
    fetch(url, tmp_path / "two")
    with Store.open(tmp_path / "two" / "search.db") as store:
        assert (len(store.candidates()) > 3) == (killed_at > 9)  # baselines, and with time some generations
    drive(tmp_path / "two", make_setup(candidates=CANDIDATES))
    assert table(tmp_path / "two") == undisturbed
    assert (tmp_path / "two" / "logs" / "c0001.1.log").read_text() == "it failed"


def test_what_did_not_change_is_not_copied_again(memory: str, tmp_path: Path) -> None:
    folder, storage = _folder(tmp_path / "one"), Storage(memory)
    for name in (".hidden/x", "search.db.partial", "observers/logs.lock", "model/config.json", "model/a.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "link").symlink_to(folder / "search.yaml")
    artifacts = _copier(memory, folder)
    with mock.patch.object(Storage, "put", autospec=True, side_effect=Storage.put) as put:
        assert artifacts.turn()
        order = [call.args[2] for call in put.call_args_list]
        (folder / "logs" / "c0001.1.log").write_text("it failed again")
        assert artifacts.turn()
    assert set(storage.files()) == {*order, RECORD}
    assert order == ["logs/c0001.1.log", "model/a.safetensors", "search.yaml", "model/config.json", "search.db"]
    assert [call.args[2] for call in put.call_args_list][len(order) :] == ["logs/c0001.1.log"]
    assert storage.read("logs/c0001.1.log") == b"it failed again"


def test_a_storage_that_fails_is_told_once_tried_again_and_ends_nothing(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    undisturbed: list[tuple[object, ...]],
) -> None:  # fmt: skip
    folder = _folder(tmp_path / "one")
    artifacts = _copier(memory, folder)
    turns = itertools.count()
    put = MemoryFileSystem.put_file

    def flaky(self: MemoryFileSystem, *args: Any, **options: Any) -> None:
        if turn < 5:
            raise OSError(f"{SECRET} was cut")
        put(self, *args, **options)

    monkeypatch.setenv("MY_SECRET", SECRET)
    monkeypatch.setattr(MemoryFileSystem, "put_file", flaky)
    turn = 0

    def idle(control: object) -> None:
        nonlocal turn
        turn = next(turns)
        assert artifacts.turn() == (turn >= 5)
        artifacts.poll(store)

    with Store.open(folder / "search.db") as store, acquire(store):
        for _ in range(8):
            idle(None)
        assert [event.payload["state"] for event in store.events(kinds=("artifacts",))] == ["failed", "copied"]
        told = json.dumps([event.payload for event in store.events()])
    assert "was cut" in told
    assert SECRET not in told + caplog.text
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert artifacts.close() is None
    assert json.loads(Storage(memory).read(RECORD) or b"")["state"] == "ended"


def test_a_copy_whose_driver_lives_is_not_taken_up(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = _copier(url, _folder(tmp_path / "one"))
    artifacts.turn()
    with pytest.raises(InputError, match="is driven by process"):
        fetch(url, tmp_path / "two")
    assert not (tmp_path / "two").exists()
    monkeypatch.setattr(claim, "SILENT_S", 0.0)  # it has been silent for long enough
    fetch(url, tmp_path / "two")
    with Store.open(tmp_path / "two" / "search.db") as store:
        assert store.search().name == "made-up"


def test_a_folder_that_was_left_behind_copies_no_more(
    memory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, dead_drivers: None
) -> None:
    one = _copier(memory, _folder(tmp_path / "one"))
    assert one.turn()
    fetch(memory, tmp_path / "two")
    two = _copier(memory, tmp_path / "two")
    assert two.turn()
    (tmp_path / "one" / "search.yaml").write_text("old")
    assert not one.turn()
    assert "was resumed from another folder" in str(one.close())
    assert [record.message for record in caplog.records if "copying ended" in record.message] != []
    assert Storage(memory).read("search.yaml") == b"name: made-up\n"
    with pytest.raises(InputError, match="was resumed from another folder"):
        Artifacts(memory, tmp_path / "one").take()
    two.close()
    _copier(memory, tmp_path / "two").close()  # it is still the last, and may go on


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_driver_that_dies_while_it_takes_its_place_can_come_back(at: int, memory: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "one")
    _copier(memory, folder)
    steps = itertools.count(1)

    def dies(original: Callable[..., None]) -> Callable[..., None]:
        def step(self: Claim, *args: Any) -> None:
            if next(steps) == at:
                raise Killed
            original(self, *args)

        return step

    with (
        mock.patch.multiple(Claim, _keep=dies(Claim._keep), _write=dies(Claim._write)),
        pytest.raises(Killed),
    ):
        _copier(memory, folder)
    assert _copier(memory, folder).turn()


def test_what_is_no_copy_of_a_search_is_refused(memory: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no search"):
        fetch(memory, tmp_path / "new")
    Storage(memory).write("search.yaml", b"name: made-up\n")
    with pytest.raises(InputError, match="no snapshot of the store"):
        fetch(memory, tmp_path / "new")
    Storage(memory).write(RECORD, b"[]")
    with pytest.raises(InputError, match="of something else"):
        fetch(memory, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_store_on_a_server_needs_no_snapshot(memory: str, tmp_path: Path) -> None:
    Storage(memory).write("search.yaml", b"name: made-up\nstore: postgresql://host/searches\n")
    fetch(memory, tmp_path / "new")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["search.yaml"]


def test_a_file_that_would_lie_elsewhere_is_refused(memory: str, tmp_path: Path) -> None:
    Storage(memory).write("search.yaml", b"name: made-up\n")
    with (
        mock.patch.object(Storage, "files", return_value={"search.yaml": 1, "../../stolen": 1}),
        pytest.raises(InputError, match="would lie elsewhere"),
    ):
        fetch(memory, tmp_path / "new")


def test_a_place_that_cannot_be_used_is_found_before_anything_is_made(
    memory: str, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = search_file(tmp_path, artifacts="s3://no-such-bucket/x")
    assert evomerge("validate", file) == 2
    assert evomerge("search", file, "--dir", tmp_path / "new") == 2
    assert "bucket does not exist" in capsys.readouterr().err
    other = _copier(copy_url(memory, "small"), _folder(tmp_path / "other"))
    assert evomerge("search", file, "--dir", tmp_path / "new", "--set", f"artifacts={memory}") == 2
    assert f"holds a search already, last driven by process {os.getpid()}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert other.turn()
    assert evomerge("search", file, "--dir", "s3://bucket/x") == 2
    assert "--dir: is a URL" in capsys.readouterr().err


def test_a_search_finishes_whatever_its_storage_does(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the line was cut")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    file = short_search_file(tmp_path, artifacts=memory, budget={"candidates": 5})
    folder = tmp_path / "search"
    for command in (["search", file, "--dir", folder], ["resume", folder]):
        assert evomerge(*command) == 1
        said = capsys.readouterr()
        assert "winner" in said.out
        assert said.err.endswith(
            f"error: {memory}/small: the copy of the search is not complete (cannot be written to (the line was cut)). "
            f"Nothing is lost: all of the search is in {folder}. To copy the rest: evomerge resume {folder}\n"
        )
    assert "the line was cut" in caplog.text
    monkeypatch.undo()
    assert evomerge("resume", folder) == 0
    assert set(Storage(f"{memory}/small").files()) == {"search.yaml", "search.db", RECORD}


def test_from_a_search_to_another_machine_and_a_model_over_http(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"{s3}/searches/small"
    file = short_search_file(
        tmp_path, objectives=SHORT_MATHS, artifacts=f"{s3}/searches", observers=[{"kind": "logs"}],
        budget={"candidates": 9},
    )  # fmt: skip
    assert evomerge("search", file) == 0
    assert set(Storage(url).files()) == {"search.yaml", "search.db", "logs/search.jsonl", RECORD}
    shutil.move("searches/small", "gone")
    more = "budget.candidates=13"
    assert resume(url, [more]) == 0
    assert (tmp_path / "searches" / "small" / KEPT).is_file()
    with pytest.raises(InputError, match="differs from the search that was started"):
        resume(url, ["seed=5"])  # the folder that was fetched before is gone on with
    before, after = table(Path("gone")), table(Path("searches/small"))
    assert len(after) == 13
    assert [row[:-1] for row in before] == [row[:-1] for row in after[:9]]  # but for who is on the front
    with pytest.raises(InputError, match="was resumed from another folder"):
        resume(Path("gone"), ())
    with pytest.raises(InputError, match="already exists"):
        resume(url, (), Path("gone"))
    capsys.readouterr()
    export(Path("searches/small"), f"{s3}/merged/one", "best", verify=True)
    assert capsys.readouterr().out.count("score exactly as recorded") == 2
    assert {LAST, SUMS, "README.md", "model.safetensors"} <= set(Storage(f"{s3}/merged/one").files())
    with pytest.raises(InputError, match="holds a model already"):
        export(Path("searches/small"), f"{s3}/merged/one", "best", verify=False)
