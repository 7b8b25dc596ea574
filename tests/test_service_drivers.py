"""The server as a process of its own: searches and exports that it starts live on when it is killed, and are found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from helpers_miniature import COMMAND, MINIATURES, environment
from helpers_service import TOKEN, make_search

from evomerge.errors import InputError
from evomerge.search.settings.rebudget import reread_budget
from evomerge.search.settings.sections import Budget
from evomerge.service.bodies import NewBudget
from evomerge.service.client import Client
from evomerge.service.drivers import RECORD_NAME, Drivers, DriverState
from evomerge.service.problems import ProblemError
from evomerge.service.processes import is_alive, last_error, read, start
from evomerge.service.root import Root
from evomerge.store import Store, acquire, current_holder
from evomerge.store.events import BeganAgain
from evomerge.store.lease import current_epoch

WAIT_S = 200.0

FILE = {
    "name": "small",
    "sources": {name: name for name in ("base", "maths", "japanese")},  # in the folder that the server allows
    "base": "base",
    "space": {"method": "task_arithmetic"},
    "objectives": {
        "mini_math_ja": {
            "task": "mini_math_ja", "metric": "acc_ja", "search": "validation[:12]", "held_out": "test[:12]",
        }
    },
    "optimizer": {"name": "cma", "population": 4},
    "budget": {"candidates": 2000},
    "confirm": {"top": 1},
}  # fmt: skip


def until(true: Callable[[], bool]) -> None:
    """Wait until something is so, for a bounded time."""
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


class Server:
    """A server process over a root, and a client of it."""

    def __init__(self, root: Path) -> None:
        command = [*COMMAND, "serve", str(root), "--port", "0", "--sources", str(MINIATURES)]
        env = environment() | {"EVOMERGE_TOKEN": TOKEN}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout is not None
        self.link = self.process.stdout.readline().strip()
        self.client = Client(self.link.partition("?")[0], TOKEN)

    def kill(self) -> str:
        """Kill it as nothing can be prepared for; what it has said since the link."""
        self.process.send_signal(signal.SIGKILL)
        return "".join(self.process.communicate())


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder of searches; what drives them at the end of the test is ended."""
    yield tmp_path
    for record in [*tmp_path.glob(f"*/{RECORD_NAME}"), *tmp_path.glob("*/exports/.*.json")]:
        told = read(record)
        if told is not None and is_alive(told):
            os.kill(told["pid"], signal.SIGKILL)


@pytest.fixture
def start_server(root: Path) -> Iterator[Callable[[], Server]]:
    """Starts servers over the root; those that are left are ended with the test."""
    started: list[Server] = []

    def begin() -> Server:
        started.append(Server(root))
        return started[-1]

    yield begin
    for server in started:
        if server.process.poll() is None:
            server.kill()


@pytest.mark.nightly  # a minute; the walk on the page starts, stops and exports a real search, too
@pytest.mark.timeout(900)
def test_a_search_and_an_export_outlive_the_server_and_are_found_again(
    root: Path, start_server: Callable[[], Server]
) -> None:
    server = start_server()
    assert server.link.endswith(f"/?token={TOKEN}")
    assert server.client.create(yaml.safe_dump(FILE)).state == "starting"
    with pytest.raises(InputError, match="starting already"):
        server.client.send_command("small", "resume")
    until(lambda: server.client.status("small").candidates.done >= 5)
    server.client.export("small", "maths", name="model", verify=False)
    assert TOKEN not in server.kill()

    with Store.open(root / "small" / "search.db") as store:
        holder = current_holder(store)
        assert holder is not None
        done = store.counts()["done"]
        until(lambda: store.counts()["done"] > done)  # it goes on without a server

    server = start_server()
    (found,) = server.client.searches()
    assert (found.name, found.driver, found.state) == ("small", True, "running")
    assert found.eta_s is not None
    server.client.send_command("small", "pause")  # so that the search takes no time from what is waited for
    until(lambda: server.client.status("small").state == "paused")
    until(lambda: server.client.export_state("small", "model").state != "running")
    export = server.client.export_state("small", "model")
    assert (export.state, export.progress) == ("done", 1.0), export.log
    assert {"config.json", "model.safetensors", "README.md"} <= {file.name for file in export.files}

    server.client.send_command("small", "resume")
    until(lambda: server.client.status("small").state == "running")
    assert server.client.change_budget("small", candidates=5000) == "the budget is 5000 candidates"
    until(lambda: server.client.status("small").budget.candidates == 5000)
    assert psutil.Process(holder.pid).is_running()  # the same one all the time
    server.client.send_command("small", "stop")
    until(lambda: not server.client.searches()[0].driver)
    asked = server.client.status("small").candidates.asked

    server.client.change_budget("small", candidates=asked + 2, resume=True)
    until(lambda: server.client.status("small").state == "finished")
    assert server.client.status("small").candidates.asked == asked + 2


def made_up(root: Path) -> Drivers:
    make_search(root, candidates=8)
    return Drivers(Root.of(str(root), root))


def test_a_driver_that_did_not_come_up_says_why(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drivers = made_up(root)
    program = root / "program"
    program.write_text("#!/bin/sh\necho going to\necho 'error: sources.one: is not there' >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr("evomerge.service.drivers.sys.executable", str(program))
    with Store.open(root / "made-up" / "search.db") as store:
        with acquire(store):
            assert drivers.state_of("made-up", store) == DriverState("starting", "", holds=True)  # it opens models
            store.set_state("running")
            assert drivers.state_of("made-up", store) == DriverState("running", "", holds=True)
        assert drivers.state_of("made-up", store) == DriverState("interrupted", "", holds=False)
        drivers.start("made-up", store)
        until(lambda: drivers.state_of("made-up", store).state != "starting")
        state = drivers.state_of("made-up", store)
    assert state == DriverState("interrupted", "error: sources.one: is not there", holds=False)
    assert (root / "made-up" / "driver.log").read_text().startswith("going to\n")


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("going to\n", ""),
        ("error: one: is gone\nresume: evomerge resume x\n", "error: one: is gone"),
        (
            "error: one\nTraceback (most recent call last):\n  File x\n    y\nTypeError: no y\nresume: x",
            "TypeError: no y",
        ),
        ("Traceback (most recent call last):\n  File x\nTypeError: no y\nerror: one\n", "error: one"),
    ],
)
def test_the_last_error_of_a_log_is_found(log: str, error: str) -> None:
    assert last_error(log) == error


def test_a_search_that_began_again_is_not_starting_for_ever(root: Path) -> None:
    """A driver that finds nothing scored drops all events, that of its own lease with them."""
    drivers = made_up(root)
    with Store.open(root / "made-up" / "search.db") as store:
        start(["sleep", "600"], root, root / "log", root / "made-up" / "driver.json", {"after": 0})
        assert drivers.state_of("made-up", store) == DriverState("finished", "8 candidates asked", holds=False)
        told = read(root / "made-up" / "driver.json")
        assert told is not None
        (root / "made-up" / "driver.json").write_text(json.dumps(told | {"after": current_epoch(store)}))
        assert drivers.state_of("made-up", store).state == "starting"
        with acquire(store):
            with store.transaction(writes=True) as connection:
                connection.exec_driver_sql("DELETE FROM event")
            store.record_event(BeganAgain())
            assert drivers.state_of("made-up", store) == DriverState("starting", "", holds=True)
            store.set_state("stopped")
        assert drivers.state_of("made-up", store).state == "stopped"  # though its process has not ended yet
        os.kill(told["pid"], signal.SIGKILL)


def test_the_budget_is_written_into_the_search_file(root: Path) -> None:
    drivers = made_up(root)
    path = root / "made-up" / "search.yaml"
    content = yaml.safe_load(path.read_text()) | {
        "sources": {"base": str(MINIATURES / "base"), "one": str(MINIATURES / "maths")},
        "optimizer": {"name": "cma"},
    }  # a whole one
    del content["racing"]
    path.write_text(yaml.safe_dump(content))
    with Store.open(root / "made-up" / "search.db") as store:
        told = drivers.change_budget("made-up", store, NewBudget(candidates=50, hours=2.5))
        assert told == "the budget is 50 candidates, 2.5 hours"
        assert yaml.safe_load(path.read_text()) == content | {
            "budget": {"candidates": 50, "hours": 2.5, "patience": None, "cost": None}
        }
        assert drivers.change_budget("made-up", store, NewBudget(candidates=None)) == "the budget is 2.5 hours"
        before = path.read_text()
        with pytest.raises(InputError, match="needs candidates, hours, patience or cost"):
            drivers.change_budget("made-up", store, NewBudget(hours=None))
        with pytest.raises(InputError, match="is 7, and 8 candidates have been asked for already"):
            drivers.change_budget("made-up", store, NewBudget(candidates=7))
        assert path.read_text() == before
    with Store.open(root / "made-up" / "search.db") as store, acquire(store):
        drivers.change_budget("made-up", store, NewBudget(candidates=60))
        assert store.take_commands() == ["reread"]
        assert reread_budget(root / "made-up", store) == Budget(candidates=60, hours=2.5)
        assert store.search().settings["budget"]["candidates"] == 60
        store.set_state("confirming")
        with pytest.raises(ProblemError, match="Not now"):
            drivers.change_budget("made-up", store, NewBudget(candidates=70))
        path.write_text("budget: 7")
        assert reread_budget(root / "made-up", store) is None
        assert store.events(kinds=("settings refused",), newest=1)[0].payload["why"].startswith("search.yaml")


def test_a_process_is_known_by_when_it_started(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    start(["sleep", "600"], tmp_path, tmp_path / "log", record, {"what": "a test"})
    told = read(record)
    assert told is not None
    assert told["what"] == "a test"
    assert is_alive(told)
    assert os.getsid(told["pid"]) == told["pid"]  # so that no signal to the server's terminal reaches it
    assert not is_alive(told | {"created": told["created"] - 60})  # another process had this number once
    assert not is_alive(told | {"host": "elsewhere"})
    os.kill(told["pid"], signal.SIGKILL)
    until(lambda: not is_alive(told))


def test_what_the_server_starts_does_not_know_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_TOKEN", TOKEN)
    start(["env"], tmp_path, tmp_path / "log", tmp_path / "record.json", {}, EVOMERGE_STORE="a store")
    until(lambda: not is_alive(read(tmp_path / "record.json")))
    text = (tmp_path / "log").read_text()
    assert "EVOMERGE_STORE=a store" in text
    assert TOKEN not in text
