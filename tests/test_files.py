"""Files and texts of others: what is opened, how much of it is read, and how it is printed."""

from __future__ import annotations

import json
import os
import pickle
import socket
import stat
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.checkpoints.target import check_target, existing_parent
from evomerge.errors import InputError
from evomerge.files import open_file, parse_json, read_json, read_text
from evomerge.plugins import unknown_name
from evomerge.printable import printable

MAX_MESSAGE = 500


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _loop(path: Path) -> None:
    (path.parent / "other").symlink_to(path.name)
    path.symlink_to("other")


SPECIAL: dict[str, Callable[[Path], object]] = {
    "named pipe": os.mkfifo,
    "folder": Path.mkdir,
    "socket": _socket,
    "link that leads back": _loop,
    "link to a pipe": lambda path: [os.mkfifo(path.parent / "pipe"), path.symlink_to("pipe")],
    "device": lambda path: path.symlink_to("/dev/zero"),
    "does not exist": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", SPECIAL)
def test_only_plain_files_are_opened(kind: str, tmp_path: Path) -> None:
    SPECIAL[kind](tmp_path / "file")
    with pytest.raises(InputError) as raised:
        open_file(tmp_path / "file", "sources.maths")
    assert raised.value.place == "sources.maths"
    assert kind.removeprefix("link to a ") in str(raised.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_a_device_node_is_not_even_opened(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "config.json", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this container may not make device nodes")
    with pytest.raises(InputError, match="is a device"):
        read_json(tmp_path / "config.json", "here")


def test_names_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    for name in ("a\0b", "a" * 5000, "missing", "file/below"):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError):
            open_file(tmp_path / name, "here")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(InputError, match="too large"):
        read_json(file, "here")
    with pytest.raises(InputError, match="too large"):
        read_text(file, "here", most=10)


def test_text_is_read_in_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeffあ".encode())
    assert read_text(tmp_path / "a", "here", encoding="utf-8-sig") == "あ"
    (tmp_path / "a").write_bytes(b"a\xff")
    with pytest.raises(InputError, match="is not text"):
        read_text(tmp_path / "a", "here")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000 + "]" * 200_000,
        "[" * 120 + "]" * 120,
        '{"a":' * 101 + "1" + "}" * 101,
        "[" + "9" * 5000 + "]",
        "[" + "9" * 41 + "]",
        "[" + "1," * 6_000_000 + "1]",
        '"\\ud800"',
        '{"\\uDFFF": 1}',
        '["\\udc00\\ud800"]',
        "{",
        "",
        "\ufeff{}",
    ],
    ids=range(12),
)
def test_json_beyond_bounds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        parse_json(text.encode())
    assert len(str(raised.value)) < 200


def test_json_within_bounds_is_read() -> None:
    value = {"a": [1e30, 10**30, -(2**63), "\U0001f600", "\\ud800"], "b": [[]] * 50}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}


@pytest.mark.timeout(60)
def test_a_key_that_stands_twice_is_seen_among_many() -> None:
    pairs = ",".join(f'"n{i}":0' for i in range(200_000))
    assert len(parse_json(f"{{{pairs}}}".encode(), unique=True)) == 200_000
    for key in ("n0", "n199999"):
        with pytest.raises(ValueError, match=f"{key}' appears twice"):
            parse_json(f'{{{pairs},"{key}":1}}'.encode(), unique=True)


def test_everything_that_cannot_be_seen_is_escaped() -> None:
    hidden = [
        c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]
    shown = printable("".join(hidden), 100_000)
    assert shown.isascii()
    assert shown.isprintable()
    for text in ("plain", "日本語　テキスト", "C:\\new", "Ünï — ‘x’", "नमस्ते", "\U0001f600"):
        assert printable(text) == text


@pytest.mark.parametrize(
    "text", ["\x1b[2J\x1b]0;title\x07", "\nerror: all is well", "\u202egpj.exe", "a\u200bb", "\ud800"]
)
def test_messages_stay_on_one_line(text: str) -> None:
    for error in (InputError(text, "is wrong"), InputError("a", f"has {text}", "Mend it."), InputError("a", "b", text)):
        assert str(error).isprintable()
        str(error).encode()
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.place, again.problem) == (str(error), error.place, error.problem)


@pytest.mark.timeout(60)
def test_messages_have_an_end() -> None:
    million = "x" * 30_000_000
    for error in (
        InputError("search.yaml", f"has {million} in it", "Take it out."),
        InputError(million, "is wrong", million),
        InputError("a", "\x1b" * 400, "\u202e" * 400),
        unknown_name(million, ["maths", "japanese"], "task", "task"),
        unknown_name("qqqq", (f"benchmark_of_{i}" for i in range(14_000)), "task", "task"),
    ):
        assert len(f"error: {error}") < MAX_MESSAGE
    assert "Take it out." in str(InputError("search.yaml", f"has {million} in it", "Take it out."))


def test_an_unknown_name_lists_what_there_is() -> None:
    assert "There are: a1, b2." in str(unknown_name("zz", ["b2", "a1"], "here", "thing"))
    assert "more" in str(unknown_name("zz", (f"name{i}" for i in range(500)), "here", "thing"))
    assert "Did you mean 'maths'?" in str(unknown_name("math", ["maths"], "here", "thing"))


def test_a_folder_may_be_made_below_folders_that_are_not_there(tmp_path: Path) -> None:
    check_target(tmp_path / "out" / "models" / "merged")
    assert existing_parent(tmp_path / "out" / "models" / "merged") == tmp_path
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(InputError, match=f"{name} is not a folder"):
            check_target(tmp_path / name / "models" / "merged")


def test_a_message_in_a_message_ends_in_one_full_stop() -> None:
    assert str(InputError("c0001", "failed: use another, or leave it out.", "See its log.")).count(".") == 2
    assert str(InputError("c0001", "failed", "See its log.")) == "c0001: failed. See its log."
