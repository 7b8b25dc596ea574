"""Launch: what travels with a job, a search as a job of a real Ray cluster, and who may get in."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_miniature import environment, evomerge, search_file
from ray.job_submission import JobDetails, JobStatus, JobType

from evomerge.errors import InputError
from evomerge.search.clusters import launch as launching
from evomerge.search.clusters.launch import (
    INTERRUPTED,
    ListeningPort,
    check_secured,
    entrypoint,
    follow,
    job_client,
    launch,
    listeners,
    requires_token,
    running,
    stage,
    who_listens,
)
from evomerge.search.opening.session import create_search, fingerprints_of
from evomerge.search.preparing.prepare import prepare
from evomerge.search.settings.folder import open_store
from evomerge.search.settings.search_file import load_search_file
from evomerge.service.drivers import Drivers, DriverState
from evomerge.service.problems import ProblemError
from evomerge.service.ray_jobs import RayJobs
from evomerge.service.root import Root
from evomerge.store import Store

WAIT_S = 200.0

TOKEN = "only-of-this-test-" + "0" * 20
VENV = str(Path(sys.executable).parent)


def until(true: Callable[[], bool]) -> None:
    """Wait until something is so, for a bounded time."""
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


# ---- what travels ----------------------------------------------------------------------------------------------------


def with_file(folder: Path) -> Path:
    """A search file with an objective that reads a file beside it."""
    (folder / "items.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n' * 8)
    likely = {"evaluator": "likelihood", "metric": "log_likelihood", "file": "items.jsonl"}
    return search_file(folder, objectives={"likely": likely | {"prompt": "{question}", "answer": "{answer}"}})


def test_a_staged_search_is_the_same_search_from_its_own_folder(tmp_path: Path) -> None:
    file = load_search_file(with_file(tmp_path), ["budget.candidates=9"])
    staged = tmp_path / "staged"
    staged.mkdir()
    assert stage(file, staged) == []
    moved = staged.rename(tmp_path / "elsewhere")
    again = load_search_file(moved / "search.yaml")
    assert again.pool == "ray"
    assert again.cluster == file.cluster.model_copy(update={"address": "auto"})
    copy = Path(again.objectives["likely"].evaluator_keys["file"])
    assert copy.is_relative_to(moved)
    assert copy.read_bytes() == (tmp_path / "items.jsonl").read_bytes()
    changed = {"pool", "cluster", "objectives"}
    assert again.model_dump(exclude=changed) == file.model_dump(exclude=changed)
    keys = file.objectives["likely"].evaluator_keys | {"file": str(copy)}
    assert again.objectives["likely"].evaluator_keys == keys


def test_sources_stay_and_what_is_large_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = load_search_file(with_file(tmp_path))
    monkeypatch.setattr(launching, "_MAX_BYTES", 10)
    staged = tmp_path / "staged"
    staged.mkdir()
    assert stage(file, staged) == [str(tmp_path / "items.jsonl")]
    assert [path.name for path in staged.rglob("*")] == ["search.yaml"]
    content = yaml.safe_load((staged / "search.yaml").read_text())
    assert content["sources"] == file.sources
    assert content["data_folder"] == str(tmp_path)  # it may hold anything
    assert all(Path(source).is_absolute() for source in content["sources"].values())
    assert content["objectives"]["likely"]["file"] == str(tmp_path / "items.jsonl")


@pytest.mark.parametrize("name", ["search", "it's a; touch oops"])
def test_the_jobs_command_starts_a_search_and_resumes_one_that_is_there(tmp_path: Path, name: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "evomerge").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    (tools / "evomerge").chmod(0o755)
    job, folder = tmp_path / "job", tmp_path / "there" / name
    job.mkdir()
    (job / "search.yaml").write_text("name: x\n")

    def run() -> list[str]:
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["sh", "-c", entrypoint(folder)], cwd=job, env={"PATH": path}, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().split("|")[:-1]

    assert run() == ["search", f"{folder}.files/search.yaml", "--dir", str(folder)]
    assert Path(f"{folder}.files/search.yaml").read_text() == "name: x\n"
    folder.mkdir()
    (folder / "search.yaml").touch()  # in its folder wherever its store is
    assert run() == ["resume", str(folder)]
    assert {path.name for path in tmp_path.rglob("oops")} == set()


# ---- who may get in --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """A job server that answers whoever has no token with the status that the test names."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert "Authorization" not in self.headers
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("server", [200], indirect=True)
def test_an_open_cluster_is_refused_unless_a_person_consents(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # our own mode proves nothing when the cluster says otherwise
    with pytest.raises(InputError, match="requires no token"):
        check_secured(server, insecure=False)
    check_secured(server, insecure=True)


@pytest.mark.parametrize("server", [401, 403], indirect=True)
def test_a_cluster_that_asks_for_a_token_is_joined(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    check_secured(f"http://{server}", insecure=False)


def test_without_a_job_server_our_own_mode_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    for mode, secured in (("token", True), ("disabled", False), ("", False)):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        for job_server in (None, nobody):
            if secured:
                check_secured(job_server, insecure=False)
            else:
                with pytest.raises(InputError, match="requires no token"):
                    check_secured(job_server, insecure=False)


def test_ports_of_processes_of_ours_are_found_and_told_apart() -> None:
    code = (
        "import socket,sys\n"
        "near, far = socket.create_server(('127.0.0.1', 0)), socket.create_server(('0.0.0.0', 0))\n"
        "print(near.getsockname()[1], far.getsockname()[1], flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    near, far = map(int, child.stdout.readline().split())
    found = listeners()
    child.communicate("")
    assert {(each.host, each.port) for each in found} >= {("127.0.0.1", near), ("0.0.0.0", far)}
    ours = [each for each in found if each.port in (near, far)]
    told = who_listens(ours, secured=True, ports=True)
    assert told == (
        "Ray runs on this machine, open to whoever has its private token (docs/cluster.md, Who may get in). "
        f"On every interface: worker {far}. On this machine alone: worker {near}."
    )


def test_a_person_is_told_who_can_reach_a_cluster_without_its_ports() -> None:
    def told(host: str, secured: bool) -> str:
        found = [ListeningPort("gcs", host, 6379), ListeningPort("gcs", host, 6380)]
        assert who_listens(found, secured=secured, ports=True).count("gcs 6379 6380") == 1
        return who_listens(found, secured=secured, ports=False)

    assert "open to whoever has its private token" in told("::", True)
    assert "open to anybody: it requires no token" in told("::", False)
    assert "open to this machine alone" in told("127.0.0.1", False)
    assert "6379" not in told("::", True)


# ---- a job of a real cluster -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The job server of a Ray cluster of this test's own, in token mode."""
    pytest.importorskip("aiohttp_cors", reason="the job server comes with ray[default]")
    from ray._private.authentication_test_utils import reset_auth_token_state

    sessions = tempfile.mkdtemp(prefix="em-")  # short: Ray's sockets lie below it, and a socket's path is bounded
    url = f"http://127.0.0.1:{(port := free_port())}"
    secured = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    command = [
        f"{VENV}/ray", "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={port}",
        f"--ray-client-server-port={free_port()}", "--num-cpus=2", "--num-gpus=0", f"--temp-dir={sessions}",
        "--object-store-memory=100000000",
        f"--dashboard-agent-listen-port={free_port()}",  # which takes jobs; other clusters' tests run beside this one
    ]  # fmt: skip
    head = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=environment() | secured | {"PATH": f"{VENV}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while requires_token(url) is None and head.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in secured.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        reset_auth_token_state()
        yield url
    reset_auth_token_state()
    head.send_signal(signal.SIGTERM)  # it ends the processes that it has started, and no others
    head.wait(60)
    shutil.rmtree(sessions, ignore_errors=True)


def told_of(store: Store) -> list[Any]:
    """What decides a search: of each candidate its genome, its recipe and what it is worth."""
    rows = store.candidates()
    genomes = [None if row.genome is None else row.genome.tolist() for row in rows]
    return [(genome, row.recipe_hash, row.objectives) for genome, row in zip(genomes, rows, strict=True)]


class _Broken:
    """A job server whose job fails before it begins: its log stays empty."""

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in ():
            yield text

    def get_job_info(self, job: str) -> JobDetails:
        why = "Failed to set up runtime environment: no pip"
        return JobDetails(type=JobType.SUBMISSION, status=JobStatus.FAILED, entrypoint="x", message=why)


def test_a_job_that_fails_before_it_begins_says_why() -> None:
    shown: list[str] = []
    assert follow(_Broken(), "small-1", shown.append) == 1
    assert shown == ["error: the job has failed: Failed to set up runtime environment: no pip\n"]


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_search_runs_as_a_job_is_listed_left_and_followed_to_its_end(
    tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = search_file(tmp_path, budget={"candidates": 6}, confirm={"top": 1})
    folder = tmp_path / "on the cluster"
    assert launch(file, folder, ["cluster.workers=1"], cluster, detach=True, insecure=False) == 0
    told = capsys.readouterr().out
    (row,) = running(cluster)
    assert (row.name, row.folder) == ("small", str(folder))
    assert f"ray job logs --address {cluster} --follow {row.job}" in told

    client = job_client(cluster)
    shown: list[str] = []

    def interrupted(text: str) -> None:
        shown.append(text)
        raise KeyboardInterrupt

    assert follow(client, row.job, interrupted) == INTERRUPTED
    assert [each.job for each in running(cluster)] == [row.job]
    whole: list[str] = []
    assert follow(client, row.job, whole.append) == 0
    assert "".join(whole).startswith("".join(shown))
    assert "evomerge resume" in "".join(whole)
    assert running(cluster) == []
    assert evomerge("search", file, "--dir", tmp_path / "here") == 0
    with open_store(folder) as store, open_store(tmp_path / "here") as here:
        assert store.search().state == "finished"
        assert len(store.candidates()) == 6
        assert told_of(store) == told_of(here)  # of a job on a cluster, and of this process


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_the_service_starts_drivers_as_jobs(tmp_path: Path, cluster: str) -> None:
    environment = {"env_vars": {"HF_HUB_OFFLINE": "1"}}
    cluster_settings = {"workers": 1, "runtime_env": environment}
    path = search_file(tmp_path, budget={"candidates": 6}, confirm={"top": 1}, cluster=cluster_settings)
    root = Root.of(str(tmp_path / "searches"), tmp_path)
    folder = root.folder / "small"
    prepared = prepare(load_search_file(path))
    create_search(folder, prepared, fingerprints_of(prepared)).close()
    jobs = RayJobs(cluster, insecure=False)
    drivers = Drivers(root, jobs)
    whole = (folder / "search.yaml").read_text()
    with root.store("small") as store:
        (folder / "search.yaml").write_text(whole + "oops: 1\n")
        drivers.start("small", store)
        with pytest.raises(ProblemError, match="starting already"):
            drivers.start("small", store)
        until(lambda: drivers.state_of("small", store).why != "")
        assert drivers.state_of("small", store).why.startswith("error: search.yaml: oops")
        assert "error: search.yaml: oops" in (folder / "driver.log").read_text()

        (folder / "search.yaml").write_text(whole)
        drivers.start("small", store)
        (job,) = running(cluster)
        assert (job.name, job.folder) == ("small", str(folder))
        assert job_client(cluster).get_job_info(job.job).runtime_env == environment
        again = Drivers(root, RayJobs(cluster, insecure=False))  # as after a restart of the server
        assert again.state_of("small", store) == DriverState("starting", "", holds=False)
        until(lambda: again.state_of("small", store).state == "finished" and not again.state_of("small", store).holds)
        assert len(store.candidates()) == 6
        assert store.search().settings["cluster"] | cluster_settings == store.search().settings["cluster"]
        assert store.search().settings["pool"] == "ray"
        assert {row.worker.partition("-")[0] for row in store.candidates()} == {"ray"}
    assert not jobs.is_alive({"job": "never was"})
    assert jobs.last_error({"job": "never was"}) == ""


@pytest.mark.nightly
@pytest.mark.timeout(120)
def test_the_exit_code_is_that_of_the_job(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launching, "entrypoint", lambda folder: f"echo came to {folder}; exit 7")
    assert launch(search_file(tmp_path), tmp_path / "there", [], cluster, detach=False, insecure=False) == 7
    assert f"came to {tmp_path / 'there'}" in capsys.readouterr().out


@pytest.mark.nightly
def test_a_relative_folder_and_a_wrong_token_are_refused(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.authentication_test_utils import reset_auth_token_state

    file = search_file(tmp_path)
    with pytest.raises(InputError, match="full path"):
        launch(file, Path("here"), [], cluster, detach=True, insecure=False)
    with pytest.raises(InputError, match="no Ray job server answers"):
        running(f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 40)
    reset_auth_token_state()
    with pytest.raises(InputError, match="refuses our token"):
        running(cluster)
    monkeypatch.undo()
    reset_auth_token_state()
    with urllib.request.urlopen(
        urllib.request.Request(f"{cluster}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    ) as answer:
        assert answer.status == 200
