"""The Ray pool: a search on it, the death of a worker in the middle of a candidate, and what does not fit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers_miniature import evomerge, json_of, search_file

from evomerge.errors import InputError
from evomerge.search.folder import open_store
from evomerge.search.pools.ray import workers_that_fit
from evomerge.search.search_file import Cluster


@pytest.mark.parametrize(
    ("cluster", "resources", "fitting"),
    [
        ({"workers": 2}, {"CPU": 2.0}, 2),
        ({}, {"CPU": 4.0}, 4),
        ({"cpus_per_worker": 3}, {"CPU": 8.0}, 2),
        ({}, {"CPU": 64.0, "GPU": 8.0}, 8),
        ({"gpus_per_worker": 0.25}, {"CPU": 64.0, "GPU": 2.0}, 8),
        ({"gpus_per_worker": 0}, {"CPU": 4.0, "GPU": 2.0}, 4),
        ({"gpus_per_worker": 2, "workers": 3}, {"CPU": 64.0, "GPU": 8.0}, 3),
    ],
)
def test_how_many_workers_fit(cluster: dict[str, float], resources: dict[str, float], fitting: int) -> None:
    assert workers_that_fit(Cluster.model_validate(cluster), resources) == fitting


@pytest.mark.parametrize(
    ("cluster", "resources", "words"),
    [
        ({"workers": 3}, {"CPU": 2.0}, "3 x 1 CPU = 3 of 2"),
        ({"workers": 4, "gpus_per_worker": 1}, {"CPU": 8.0, "GPU": 2.0}, "4 x 1 GPU = 4 of 2"),
        ({"gpus_per_worker": 1}, {"CPU": 8.0}, "1 x 1 GPU = 1 of 0"),
    ],
)
def test_more_than_the_cluster_has_is_refused_with_the_arithmetic(
    cluster: dict[str, float], resources: dict[str, float], words: str
) -> None:
    with pytest.raises(InputError, match="too little") as caught:
        workers_that_fit(Cluster.model_validate(cluster), resources)
    assert words in str(caught.value)


class WorkerKiller(threading.Thread):
    """Ends one busy Ray worker of this test's own cluster with SIGKILL, as soon as candidates are being scored."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self.killed: int | None = None

    def run(self) -> None:
        from evomerge.store import Store

        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.killed is None:
            time.sleep(0.05)
            if not (self._folder / "search.db").exists():
                continue
            with Store.open(self._folder / "search.db") as store:
                busy = store.counts()["running"] and store.counts()["done"] >= 3
            if busy:
                self.killed = self._kill_a_worker()

    def _kill_a_worker(self) -> int | None:
        for process in psutil.Process().children(recursive=True):
            if "RayWorker.run" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                return process.pid
        return None


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[WorkerKiller]:
    thread = WorkerKiller(tmp_path / "search")
    thread.start()
    yield thread
    thread.join(1)


@pytest.mark.timeout(300)
def test_a_worker_killed_mid_candidate_loses_nothing(
    tmp_path: Path, killer: WorkerKiller, capsys: pytest.CaptureFixture[str]
) -> None:
    file = search_file(tmp_path, pool="ray", cluster={"workers": 2}, budget={"candidates": 21})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    assert killer.killed is not None
    rows = json_of(capsys, "top", tmp_path / "search", "--all", "--json")
    assert len(rows) == 21
    assert {row["status"] for row in rows} <= {"done", "cached"}
    with open_store(tmp_path / "search") as store:
        assert [row.attempts for row in store.candidates() if row.attempts != 1 and row.same_as is None] == [2]

    same = search_file(tmp_path, budget={"candidates": 21})
    assert evomerge("search", same, "--dir", tmp_path / "in-process") == 0
    alone = json_of(capsys, "top", tmp_path / "in-process", "--all", "--json")
    assert [(r["genome"], r["recipe_hash"], r["scores"]) for r in rows] == [
        (r["genome"], r["recipe_hash"], r["scores"]) for r in alone
    ]


@pytest.mark.timeout(120)
def test_when_no_worker_can_start_the_search_ends_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = search_file(tmp_path, pool="ray", cluster={"workers": 1}, device="cuda:7")
    assert evomerge("search", file, "--dir", tmp_path / "search") == 2
    error = capsys.readouterr().err
    assert "no worker could be started" in error
    assert "'cuda:7' cannot be used here" in error
    status = json_of(capsys, "status", tmp_path / "search", "--json")
    assert status["state"] == "interrupted"
    assert status["candidates"]["failed"] == 0
