"""What a search reads, keeps or prints on is changed, cut, deleted or full while it runs: a clear word, never a wrong
winner."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_miniature import COMMAND, MINIATURES, environment, evomerge, search_file

from evomerge.store import Store

ITEMS = 6

# Scores at once, and does at the given call what a test wants done to a search that is at work. The trial before a
# search, of one item, is no call of it.
FUNCTION = """\
from pathlib import Path
import os, shutil
here = Path(__file__).parent
def score(items, generate):
    if len(items) == 1:
        return [1.0]
    calls = here / "calls"
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    if len(calls.read_text()) == {at}:
        {do}
    return [1.0] * len(items)
"""


def with_function(folder: Path, do: str, *, at: int = 9, **changes: Any) -> Path:
    (folder / "score.py").write_text(FUNCTION.format(at=at, do=do))
    (folder / "items.jsonl").write_text("".join(json.dumps({"q": n}) + "\n" for n in range(2 * ITEMS)))
    function = {
        "evaluator": "python", "file": str(folder / "score.py"), "items_file": str(folder / "items.jsonl"),
        "metrics": {"s": "maximize"}, "metric": "s",
    }  # fmt: skip
    for name in ("base", "maths", "japanese"):
        shutil.copytree(MINIATURES / name, folder / name)
    sources = {name: str(folder / name) for name in ("base", "maths", "japanese")}
    return search_file(folder, sources=sources, objectives={"o": function}, allow_task_code=True, **changes)


def scored(folder: Path) -> int:
    with Store.open(folder / "search.db") as store:
        counts = store.counts()
    return counts["done"] + counts["cached"]


@pytest.mark.parametrize(
    "do",
    [
        "shutil.copy(here / 'japanese/model.safetensors', here / 'maths/model.safetensors')",
        pytest.param("os.truncate(here / 'maths/model.safetensors', 1000)", marks=pytest.mark.nightly),  # as below
        "os.utime(here / 'base/model.safetensors', (1, 1))",
        "(here / 'japanese/tokenizer.json').write_text('{}')",
        "shutil.rmtree(here / 'maths')",
    ],
    ids=["overwritten", "cut", "touched", "tokenizer", "deleted"],
)
def test_a_source_that_changes_stops_the_search_before_anything_of_it_counts(
    do: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = with_function(tmp_path, do)
    assert evomerge("search", file, "--dir", tmp_path / "s") == 2
    told = capsys.readouterr()
    assert "while it was in use" in told.err
    assert "sources." in told.err
    assert scored(tmp_path / "s") == 8
    assert "winner" not in told.out


def test_a_source_that_changes_in_the_confirmation_names_no_winner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = with_function(tmp_path, "os.truncate(here / 'maths/model.safetensors', 1000)", at=14)
    assert evomerge("search", file, "--dir", tmp_path / "s") == 2
    assert "while it was in use" in capsys.readouterr().err
    assert scored(tmp_path / "s") == 13
    with Store.open(tmp_path / "s" / "search.db") as store:
        assert not store.events(kinds=("winner",))


@pytest.mark.parametrize(
    "do",
    [
        "shutil.rmtree(here / 's')",
        "(here / 's/search.db').unlink()",
        "os.replace(here / 'calls', here / 's/search.db')",
    ],
    ids=["folder", "store", "replaced"],
)
def test_a_store_that_is_deleted_under_a_search_ends_it_with_a_word(
    do: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = with_function(tmp_path, do, budget={"candidates": 60})
    assert evomerge("search", file, "--dir", tmp_path / "s") == 2
    told = capsys.readouterr()
    assert "was deleted or replaced" in told.err
    assert "Traceback" not in told.err


def test_a_folder_that_is_renamed_under_a_search_is_still_its_own(tmp_path: Path) -> None:
    file = with_function(tmp_path, "os.rename(here / 's', here / 'renamed')")
    assert evomerge("search", file, "--dir", tmp_path / "s") == 0
    assert scored(tmp_path / "renamed") == 13


def test_a_mapped_file_that_is_cut_ends_the_process_with_a_word(tmp_path: Path) -> None:
    code = (
        "import mmap, sys\n"
        "from evomerge.search.workers.bus_errors import explain_bus_errors\n"
        "explain_bus_errors('error: it was cut')\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "seen = mmap.mmap(file.fileno(), 0)\n"
        "file.truncate(10)\n"
        "print(seen[50_000])\n"
    )
    (tmp_path / "file").write_bytes(bytes(100_000))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: it was cut\n")


# What a person fixes -------------------------------------------------------------------------------------------------


def test_where_nothing_was_scored_a_mended_function_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = with_function(tmp_path, "pass")
    function = tmp_path / "score.py"
    right = function.read_text()
    function.write_text(right.replace("[1.0] *", "[1.0 / 0] *"))
    assert evomerge("search", file, "--dir", tmp_path / "s") == 2
    assert "every source and average failed" in capsys.readouterr().err
    function.write_text(right)
    assert evomerge("resume", tmp_path / "s") == 0
    assert "starts over" in capsys.readouterr().out
    assert scored(tmp_path / "s") == 13


def test_where_nothing_was_scored_any_key_may_change(tmp_path: Path) -> None:
    file = with_function(tmp_path, "pass")
    function = tmp_path / "score.py"
    right = function.read_text()
    function.write_text(right.replace("return [1.0] *", "raise ValueError('no') #"))
    assert evomerge("search", file, "--dir", tmp_path / "s") == 2
    function.write_text(right)
    (tmp_path / "items.jsonl").write_text((tmp_path / "items.jsonl").read_text() + json.dumps({"q": 99}) + "\n")
    again = ("--set", "seed=7", "--set", "optimizer.population=5", "--set", "budget.candidates=9")
    assert evomerge("resume", tmp_path / "s", *again) == 0
    assert scored(tmp_path / "s") == 9
    assert evomerge("resume", tmp_path / "s", "--set", "seed=8") == 2


def test_an_export_that_is_not_verified_needs_no_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = with_function(tmp_path, "pass", budget={"candidates": 6})
    assert evomerge("search", file, "--dir", tmp_path / "s") == 0
    (tmp_path / "items.jsonl").unlink()
    arguments = ("export", tmp_path / "s", tmp_path / "out", "--candidate", "c0005")
    assert evomerge(*arguments) == 2
    assert "items.jsonl" in capsys.readouterr().err
    assert evomerge(*arguments, "--no-verify") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


# Output ---------------------------------------------------------------------------------------------------------------


@pytest.mark.nightly  # ten seconds, most of them of three processes that start
@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("{} 2> err | head -n 2 > out", id="closed pipe"),
        pytest.param("{} > /dev/full 2> err", id="full disk"),
        pytest.param("{} >&- 2>&-", id="all closed"),
    ],
)
def test_a_search_goes_on_without_its_output(shell: str, tmp_path: Path) -> None:
    file = with_function(tmp_path, "pass", budget={"candidates": 5}, confirm={"top": 1})
    command = shell.format(f"{' '.join(COMMAND)} search {file} --dir s")
    script = f"{command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment(), timeout=120)
    err = (tmp_path / "err").read_text() if (tmp_path / "err").exists() else ""
    assert done.returncode == 0, err
    assert "Traceback" not in err
    assert "Exception" not in err
    assert ("cannot be written" in err) == ("full 2> err" in shell or "head" in shell)
    with Store.open(tmp_path / "s" / "search.db") as store:
        assert store.search().state == "finished"
        assert store.events(kinds=("winner",))


def test_every_table_can_be_printed_in_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = with_function(tmp_path, "pass", budget={"candidates": 5}, confirm={"top": 1})
    assert evomerge("search", file, "--dir", tmp_path / "of" / "s") == 0
    surroundings = environment() | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([*COMMAND, "status", "of/s"], cwd=tmp_path, env=surroundings, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout
    monkeypatch.chdir(tmp_path)
    commands = (["top", "of/s"], ["show", "of/s", "best"], ["list", "of"])
    for command, encoding in zip(commands, ("ascii", "cp1252", "koi8-r"), strict=True):
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", err)
            assert evomerge(*command) == 0
        assert (out.tell() > 0, err.tell()) == (True, 0), command


def test_a_command_whose_output_cannot_be_written_says_so(tmp_path: Path) -> None:
    file = search_file(tmp_path, name="s")
    (tmp_path / "searches").mkdir()
    assert file.is_file()
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    assert done.returncode == 2
    assert "the output: cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


# Fails on an item without "a"; scores hang on the model: on how many letters it answers with.
COUNTING = """\
def score(items, generate):
    answers = generate([item["q"] for item in items], max_new_tokens=4)
    return [item["a"] + len(set(answer)) / 2 for item, answer in zip(items, answers)]
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a search `s` that cannot be confirmed: a held-out item lacks a field."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "score.py").write_text(COUNTING)
    for name, first in (("search", 0), ("held_out", 50)):
        lines = [{"q": f"{n} plus {n} is", "a": n} for n in range(first, first + ITEMS)]
        if name == "held_out":
            del lines[3]["a"]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    function = {
        "evaluator": "python", "file": str(folder / "score.py"), "items_file": str(folder / "search.jsonl"),
        "held_out_file": str(folder / "held_out.jsonl"), "metrics": {"s": "maximize"}, "metric": "s",
    }  # fmt: skip
    file = search_file(folder, objectives={"o": function}, allow_task_code=True, budget={"candidates": 5})
    assert evomerge("search", file, "--dir", folder / "s") == 2
    return folder


@pytest.fixture
def unconfirmed(begun: Path) -> Iterator[Path]:
    """That folder; what a test does to its search and its files is undone."""
    kept = begun.with_name(f"{begun.name}-kept")
    shutil.copytree(begun, kept)
    yield begun
    shutil.rmtree(begun)
    kept.rename(begun)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def complete_item(folder: Path) -> None:
    edit(folder / "held_out.jsonl", '{"q": "53 plus 53 is"}', '{"q": "53 plus 53 is", "a": 53}')


def changes(folder: Path) -> list[list[str]]:
    """For each time that evaluators were seen to score as before, the candidates that showed it."""
    with Store.open(folder / "search.db") as store:
        return [event.payload["scored"] for event in store.events(kinds=("evaluators changed",))]


def search_scores(folder: Path) -> list[list[float]]:
    with Store.open(folder / "search.db") as store:
        return [store.scores(row.number, "search")[0].metrics["s"].tolist() for row in store.candidates()]


def test_a_held_out_item_put_right_is_gone_on_with(unconfirmed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search, before = unconfirmed / "s", search_scores(unconfirmed / "s")
    complete_item(unconfirmed)
    assert evomerge("confirm", search) == 0
    ((scored,),) = changes(search)
    assert scored in capsys.readouterr().out
    assert search_scores(search) == before
    with Store.open(search / "search.db") as store:
        (evaluator,) = store.search().fingerprints["evaluators"]
        assert '"a": 53' in store.item_texts(evaluator["version"], "held_out")[3][0]
        assert store.events(kinds=("winner",))
    assert evomerge("resume", search, "--set", "budget.candidates=6") == 0
    assert len(changes(search)) == 1  # it is known by now
    assert evomerge("export", search, unconfirmed / "out") == 0
    assert (unconfirmed / "out/model.safetensors").is_file()


def test_a_function_put_right_is_gone_on_with(unconfirmed: Path) -> None:
    edit(unconfirmed / "score.py", 'item["a"]', 'item.get("a", 0)')
    assert evomerge("resume", unconfirmed / "s", "--set", "budget.candidates=6") == 0
    assert len(changes(unconfirmed / "s")) == 1
    edit(unconfirmed / "score.py", "/ 2", "/ 2.0")  # and once more, when the held-out split is scored too
    assert evomerge("confirm", unconfirmed / "s") == 0
    assert len(changes(unconfirmed / "s")) == 2


def test_an_export_sees_for_itself_that_a_changed_function_scores_as_recorded(unconfirmed: Path) -> None:
    edit(unconfirmed / "score.py", 'item["a"]', 'item.get("a", 0)')
    assert evomerge("export", unconfirmed / "s", unconfirmed / "out", "--candidate", "c0004") == 0
    edit(unconfirmed / "score.py", "/ 2", "/ 2 + (item['q'][0] == '4')")
    assert evomerge("export", unconfirmed / "s", unconfirmed / "other", "--candidate", "c0004") == 2
    assert not (unconfirmed / "other").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "item"),
    [
        ("score.py", "/ 2", "/ 2 + (item['q'][0] == '4')", "search.jsonl, line 5"),
        ("score.py", 'item["a"] +', 'item["a"] * (1 + item["a"] // 5 / 1e4) +', "search.jsonl, line 6"),
        ("score.py", "/ 2", "/ 3", "search.jsonl, line "),
        ("score.py", 'item["a"] +', '[][item["a"]] +', "again"),
        ("search.jsonl", '"a": 3', '"a": 4', "search.jsonl, line 4"),
        ("search.jsonl", '{"q": "5 plus 5 is", "a": 5}\n', "", "item 5"),
        ("search.jsonl", '"2 plus 2 is"', '"2 plus 3 is"', "search.jsonl, line 3"),
    ],
    ids=["one item", "one item, a little", "all items", "broken", "reference", "fewer", "question"],
)
def test_what_scores_otherwise_is_refused_with_the_first_item_that_differs(
    unconfirmed: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, item: str
) -> None:
    edit(unconfirmed / file, old, new)
    complete_item(unconfirmed)
    with Store.open(unconfirmed / "s/search.db") as store:
        before = store.search()
    capsys.readouterr()
    assert evomerge("resume", unconfirmed / "s", "--set", "budget.candidates=6") == 2
    told = capsys.readouterr()
    assert item in told.err
    assert "resume:" not in told.out
    with Store.open(unconfirmed / "s/search.db") as store:
        assert store.search() == before
    assert not changes(unconfirmed / "s")


def test_held_out_items_stay_once_they_are_scored(unconfirmed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete_item(unconfirmed)
    assert evomerge("confirm", unconfirmed / "s") == 0
    edit(unconfirmed / "held_out.jsonl", '"a": 55', '"a": 54')
    assert evomerge("confirm", unconfirmed / "s") == 2
    assert "held_out.jsonl, line 6 is not the one that was scored" in capsys.readouterr().err
    edit(unconfirmed / "held_out.jsonl", '55 plus 55 is", "a": 54', '55 plus 55 is", "a": 55')
    edit(unconfirmed / "score.py", "/ 2", "/ 2 + (item['a'] == 52)")  # which a held-out item alone shows
    assert evomerge("confirm", unconfirmed / "s") == 2
    assert "held_out.jsonl, line 3 has " in capsys.readouterr().err
