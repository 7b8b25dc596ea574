"""Death of the driver's process at any moment, and what a resumed search has in common with one that lived."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_miniature import COMMAND, ROOT, environment, evomerge, json_of, short_search_file
from helpers_search import table

from evomerge.store import Store


def events(folder: Path) -> int:
    """How much has been recorded so far."""
    if not (folder / "search.db").exists():
        return 0
    with Store.open(folder / "search.db") as store:
        return len(store.events())


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kills", "candidates"), [(1, 17), pytest.param(3, 29, marks=pytest.mark.nightly)])
def test_kill_9_and_resume_gives_the_same_search_bit_for_bit(
    tmp_path: Path, kills: int, candidates: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = short_search_file(tmp_path, budget={"candidates": candidates})
    assert evomerge("search", file, "--dir", tmp_path / "whole") == 0
    expected = json_of(capsys, "top", tmp_path / "whole", "--all", "--json")

    folder = tmp_path / "killed"
    rng = random.Random(0)
    arguments: list[object] = ["search", file, "--dir", folder]
    for _ in range(kills):
        before = events(folder)
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
        )
        more = rng.randint(4, 18)
        while process.poll() is None and events(folder) < before + more:
            time.sleep(rng.random() / 50)
        assert process.poll() is None, process.communicate()[1].decode()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        arguments = ["resume", folder]
    assert evomerge("resume", folder) == 0
    assert json_of(capsys, "top", folder, "--all", "--json") == expected
    assert len(expected) == candidates
    assert table(folder) == table(tmp_path / "whole")  # down to the score of every item


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_kill_9_during_a_descent_and_resume_gives_the_same_search(tmp_path: Path) -> None:
    items = ROOT / "evaluators" / "tasks" / "data" / "mini_math_ja.search.jsonl"
    file = short_search_file(tmp_path, proxy={"file": str(items), "items": 24, "drawn": 8}, budget={"candidates": 11})
    assert evomerge("search", file, "--dir", tmp_path / "whole") == 0

    folder = tmp_path / "killed"
    process = subprocess.Popen([*COMMAND, "search", str(file), "--dir", str(folder)], env=environment())
    while process.poll() is None and told(folder) < 1:  # after the baselines comes a descent of 16 steps
        time.sleep(0.02)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Store.open(folder / "search.db") as store:
        assert not store.events(kinds=("descent",))
    assert evomerge("resume", folder) == 0
    assert table(folder) == table(tmp_path / "whole")


def told(folder: Path) -> int:
    """How many steps have been told."""
    if not (folder / "search.db").exists():
        return 0
    with Store.open(folder / "search.db") as store:
        return sum(step.kind == "tell" for step in store.steps())


@pytest.mark.nightly  # a process that imports everything; signals are those of test_control, resuming that of kill -9
@pytest.mark.timeout(300)
def test_ctrl_c_stops_with_code_130_and_the_line_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = short_search_file(tmp_path, budget={"candidates": 2000})
    folder = tmp_path / "search"
    process = subprocess.Popen(
        [*COMMAND, "search", str(file), "--dir", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    while process.poll() is None and events(folder) < 12:
        time.sleep(0.05)
    assert evomerge("resume", folder) == 2
    assert f"is driven by process {process.pid}" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out.strip().splitlines()[-1] == f"resume: evomerge resume {folder}"
    status = json_of(capsys, "status", folder, "--json")
    assert status["state"] == "stopped"
    assert status["candidates"]["running"] == 0


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kinds", ["asynchronous race,generations", "routed,mixture,prompts"])
def test_searches_that_are_killed_at_any_moment_are_those_that_were_not(kinds: str) -> None:
    """Two kills of each kind; the long one is ``scripts/kills.py`` as it is."""
    names = kinds.split(",")
    script = Path(__file__).resolve().parents[1] / "scripts" / "kills.py"
    command = [sys.executable, str(script), "--kills", str(2 * len(names)), "--kinds", kinds, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    rows = json.loads(done.stdout)
    assert [(row["kind"], row["kills"]) for row in rows] == [(name, 2) for name in names], done.stderr
    ends = [(row["differ"], row["doubled"], row["damaged"], row["hung"]) for row in rows]
    assert ends == [(0, 0, 0, 0)] * len(names), rows
    assert done.returncode == 0
