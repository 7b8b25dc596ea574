"""What keeps the service answering: slow checks, silent clients, streams that break off, and searches that are odd."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_service import BEARER, NAME, TOKEN, client_of, make_app, make_search, serving
from starlette.testclient import TestClient

from evomerge.service import connections
from evomerge.service.checking import MAX_WAITING, Checker
from evomerge.service.connections import Server, most_connections
from evomerge.store import Store, acquire
from evomerge.store.events import BeganAgain

API = "/api/v1"
HALF = b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    make_search(folder, candidates=8)
    return folder


@contextmanager
def served(root: Path, most: int) -> Iterator[int]:
    """The service on a port of its own, with so many connections at most."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Server(make_app(root), listening, most)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def is_healthy(port: int) -> bool:
    return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=60, trust_env=False).json() == {"status": "ok"}


def silent(port: int, *, begins: bytes = HALF) -> socket.socket:
    """A client that says half of a request, or nothing; it waits for less than REQUEST_S."""
    found = socket.create_connection(("127.0.0.1", port), timeout=15)
    found.sendall(begins)
    return found


def is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


# Connections


@pytest.mark.parametrize("begins", [b"", b"G", HALF, HALF + b"\r\ntoken="], ids=["nothing", "a letter", "head", "body"])
def test_clients_that_send_no_whole_request_make_room_for_others(root: Path, begins: bytes) -> None:
    with served(root, most=4) as port:
        clients = [silent(port, begins=begins) for _ in range(12)]
        assert is_healthy(port)
        assert [is_closed(client) for client in clients[:8]] == [True] * 8  # those that came first
        for client in clients:
            client.close()
        assert all(is_healthy(port) for _ in range(8))


def test_a_request_that_does_not_come_is_not_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 0.3)
    with served(root, most=10) as port:
        kept = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        begun = time.monotonic()
        clients = [silent(port, begins=begins) for begins in (b"", b"GET / HT", HALF, HALF + b"\r\nhalf a body")]
        assert all(is_closed(client) for client in clients)
        assert time.monotonic() - begun > 0.2
        with kept:  # a client that does send its requests keeps its connection
            assert all(kept.get("/healthz").is_success for _ in range(3))


def test_an_answer_that_nobody_reads_is_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "UNREAD_S", 0.3)
    with served(root, most=1) as port:
        ask = b"GET /static/plotly.min.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"  # megabytes
        client = silent(port, begins=ask)
        assert is_healthy(port)  # the one connection that there may be is free again
        client.close()


def test_there_are_descriptors_left_for_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((128, 64), (1024, 512), (10**6, 1000), (connections.resource.RLIM_INFINITY, 1000)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert most_connections() == most


def test_a_connection_that_cannot_be_accepted_is_logged_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(socket.socket()) as unused:
        server = Server(make_app(root), unused)
        with caplog.at_level(logging.WARNING):
            for _ in range(100):
                server._log_refusal(OSError(24, "Too many open files"))
    assert [record.getMessage() for record in caplog.records] == [
        "no connection can be accepted now: Too many open files"
    ]


def test_streams_that_break_off_leave_no_word(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ask = f"GET {API}/searches/{NAME}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    at_once = struct.pack("ii", 1, 0)  # a reset, not a farewell
    with served(root, most=100) as port:
        for hears in (0, 1, 1000) * 10:
            client = silent(port, begins=ask.encode())
            if hears:
                client.recv(hears)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            client.close()
        assert is_healthy(port)
    told = capfd.readouterr()
    assert told.out + told.err == ""


def test_open_streams_end_with_the_server_without_a_word(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as streams, serving(make_app(root)) as address:
        url = f"{address}{API}/searches/{NAME}/events"
        for _ in range(5):
            stream = streams.enter_context(httpx.stream("GET", url, headers=BEARER, timeout=30, trust_env=False))
            next(stream.iter_lines())
    told = capfd.readouterr()
    assert told.out + told.err == ""


def test_all_who_follow_a_search_share_one_store(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    opens = Store.open
    monkeypatch.setattr(Store, "open", lambda *a, **k: (opened.append(a), opens(*a, **k))[1])
    app = make_app(root)
    wanted = len(Store.open(root / NAME / "search.db").events())
    opened.clear()

    async def read(seq: int) -> bytes:
        text = b""
        async for chunk in app.state.streams.follow(NAME, seq):
            text += chunk
            if text.count(b"data: ") == wanted - seq:
                break
        return text

    async def run() -> list[bytes]:
        return await asyncio.gather(*(read(seq) for seq in (0, 0, 3, wanted - 1)))

    texts = asyncio.run(run())
    assert len(opened) == 1
    assert texts[0] == texts[1]
    assert texts[0].endswith(texts[2])
    assert texts[2].endswith(texts[3])


def test_followers_hear_of_a_search_that_begins_again(tmp_path: Path) -> None:
    """Its events are dropped then, and count from one."""
    folder = make_search(tmp_path, candidates=8)
    app = make_app(tmp_path)

    async def run() -> bytes:
        with Store.open(folder / "search.db") as store, acquire(store):
            newest = store.events()[-1].seq
            followed = app.state.streams.follow(NAME, newest)
            heard = asyncio.ensure_future(anext(followed))
            while NAME not in app.state.streams._feeds or app.state.streams._feeds[NAME]._store is None:
                await asyncio.sleep(0.01)
            with store.transaction(writes=True) as connection:
                connection.exec_driver_sql("DELETE FROM event")
            store.record_event(BeganAgain())
            async with asyncio.timeout(60):
                found: bytes = await heard
            await followed.aclose()
            return found

    assert b"began again" in asyncio.run(run())


# Checks


@contextmanager
def slow_checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Checks that take until the event is set."""
    free = threading.Event()

    async def exchange(self: Checker, question: str) -> bytes:
        while not free.is_set():
            await asyncio.sleep(0.01)
        return b'{"found": {"models": []}}\n'

    monkeypatch.setattr(Checker, "_exchange", exchange)
    try:
        yield free
    finally:
        free.set()


def test_checks_that_wait_take_nothing_from_the_rest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[int] = []
    with slow_checks(monkeypatch) as free, served(root, most=100) as port:
        url = f"http://127.0.0.1:{port}"

        def ask() -> None:
            body = {"sources": {"a": "base"}}
            found = httpx.post(f"{url}{API}/sources/inspect", json=body, headers=BEARER, timeout=60, trust_env=False)
            answered.append(found.status_code)

        clients = [threading.Thread(target=ask) for _ in range(60)]
        for client in clients:
            client.start()
        while len(answered) < 60 - 1 - MAX_WAITING:
            time.sleep(0.01)
        for path in ("/healthz", "/login", "/static/common.js", f"/searches/{NAME}", f"{API}/searches"):
            assert httpx.get(url + path, headers=BEARER, timeout=60, trust_env=False).status_code == 200
        free.set()
        for client in clients:
            client.join()
    assert sorted(answered) == [200] * (1 + MAX_WAITING) + [503] * (60 - 1 - MAX_WAITING)


def test_a_check_is_given_up_when_its_client_goes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evomerge.service.checking.ABANDONED_S", 0.1)
    with slow_checks(monkeypatch) as free, served(root, most=100) as port:
        url = f"http://127.0.0.1:{port}{API}/sources/inspect"
        ask = {"json": {"sources": {"a": "base"}}, "headers": BEARER, "trust_env": False}
        for _ in range(2 + MAX_WAITING):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, timeout=httpx.Timeout(60, read=0.2), **ask)  # type: ignore[arg-type]
        free.set()
        assert httpx.post(url, timeout=60, **ask).status_code == 200  # type: ignore[arg-type]


def test_a_check_that_takes_too_long_ends_and_the_next_is_answered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evomerge.service.checking.MAX_S", 0.1)
    with slow_checks(monkeypatch) as free, client_of(make_app(root)) as client:
        found = client.post(f"{API}/sources/inspect", json={"sources": {"a": "base"}})
        assert (found.status_code, found.json()["title"]) == (503, "The check did not finish")
        assert int(found.headers["retry-after"]) > 0
        free.set()
        assert client.post(f"{API}/sources/inspect", json={"sources": {"a": "base"}}).status_code == 200


# Odd searches


def change(*statements: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "search.db")) as connection:
            for each in statements:
                connection.execute(each)
            connection.commit()

    return apply


ODD: dict[str, Callable[[Path], None]] = {
    "no fingerprints": change("UPDATE search SET fingerprints = '{}'"),
    "no objective": change("UPDATE search SET fingerprints = json_set(fingerprints, '$.objectives', json('[]'))"),
    "settings of another kind": change("UPDATE search SET settings = '[1, 2]'"),
    "no settings": change("UPDATE search SET settings = '{}'"),
    "settings that are no JSON": change("UPDATE search SET settings = 'what?'"),
    "settings without an end": change(f"UPDATE search SET settings = '{'[' * 100_000}'"),
    "no budget": change("UPDATE search SET settings = json_remove(settings, '$.budget')"),
    "no lease": change("DELETE FROM lease"),
    "no search": change("DELETE FROM search"),
    "a beginning beyond all dates": change("UPDATE search SET created_at = 1e300"),
    "a beginning in words": change("UPDATE search SET created_at = 'soon'"),
    "an endless time": change("UPDATE search SET spent_s = 9e999"),
    "bytes that are no text": change("UPDATE search SET why = CAST(x'ff' AS TEXT)"),
    "no table": change("DROP TABLE objective"),
}
STRANGE: dict[str, Callable[[Path], None]] = {
    "an endless mean": change("UPDATE objective SET mean = 9e999 WHERE candidate IN (3, 5)"),
    "all means endless": change("UPDATE objective SET mean = -9e999"),
    "errors of letters": change("UPDATE objective SET stderr = NULL"),
    "half a letter": change(
        """UPDATE candidate SET status = 'failed', failure = '{"reason": "bad\\ud800", "message": "\\udfff"}'
           WHERE number = 5"""
    ),
}
PAGES = ("", "/candidates/6", "/compare", "/exports")
ANSWERS = ("", "/summary", "/candidates", "/candidates/6", "/figures/front", "/file")


@pytest.fixture(scope="module")
def odd_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    whole = make_search(folder, candidates=8)
    for name, apply in {**ODD, **STRANGE}.items():
        copy = folder / name
        copy.mkdir()
        for each in ("search.db", "search.yaml"):
            (copy / each).write_bytes((whole / each).read_bytes())
        apply(copy)
    bare = os.fsencode(folder) + b"/\xff\xfe"
    os.mkdir(bare)
    with open(bare + b"/search.db", "wb") as file:
        file.write((whole / "search.db").read_bytes())
    return folder


@pytest.fixture(scope="module")
def odd_client(odd_root: Path) -> Iterator[TestClient]:
    with client_of(make_app(odd_root)) as found:
        yield found


@pytest.mark.parametrize("path", ["/", f"{API}/searches", f"{API}/metrics", "/api/studies", "/new", "/dashboard"])
def test_an_odd_search_hides_no_other(odd_client: TestClient, path: str) -> None:
    found = odd_client.get(path, headers={"accept": "text/html"})
    assert found.status_code == 200
    assert path in ("/new", "/dashboard") or NAME in found.text


def test_an_odd_search_says_what_is_wrong_with_it(odd_client: TestClient) -> None:
    found = {each["name"]: each for each in odd_client.get(f"{API}/searches").json()["searches"]}
    assert len(found) == 1 + len(ODD) + len(STRANGE) + 1
    assert {name for name, each in found.items() if each["state"] == "unreadable"} == {*ODD, r"\udcff\udcfe"}
    assert all(found[name]["why"] for name in ODD)
    assert "fingerprints" in found["no fingerprints"]["why"].split("is damaged")[1]


@pytest.mark.parametrize("name", [*ODD, *STRANGE])
def test_the_pages_of_an_odd_search_answer(odd_client: TestClient, name: str) -> None:
    paths = [f"/searches/{name}{rest}" for rest in PAGES] + [f"{API}/searches/{name}{rest}" for rest in ANSWERS]
    answered = {path: odd_client.get(path, headers={"accept": "text/html"}).status_code for path in paths}
    assert set(answered.values()) <= {200, 404, 422}, answered
    assert (answered[f"/searches/{name}"], answered[f"{API}/searches/{name}"]) == (
        (422, 422) if name in ODD else (200, 200)
    )


def test_an_odd_model_hides_no_other(tmp_path: Path, root: Path) -> None:
    def model(name: str, config: bytes, file: str = "config.json") -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(config)

    model("good", b'{"model_type": "llama"}')
    model("nested", b"[" * 100_000)
    model("list", b"[]")
    model("no-text", b"\xff\xfe")
    model("digits", b'{"model_type": ' + b"9" * 100_000 + b"}")
    model("half-a-letter", b'{"model_type": "\\ud800"}')
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.json")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    with open(os.fsencode(tmp_path) + b"/\xff/config.json", "wb") as file:
        file.write(b"{}")
    model("lora", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/elsewhere/good"}).encode(),
          "adapter_config.json")  # fmt: skip
    model("of-the-hub", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/model"}).encode(),
          "adapter_config.json")  # fmt: skip
    model("of-nobody", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/elsewhere/gone"}).encode(),
          "adapter_config.json")  # fmt: skip
    app = make_app(root)
    app.state.settings = type(app.state.settings)(app.state.settings.root, TOKEN, ("testserver",), (tmp_path,))
    with client_of(app) as client:
        found = {each["name"]: each for each in client.get(f"{API}/sources").json()["sources"]}
    assert found["good"]["model_type"] == "llama"
    assert found["lora"]["reference"] == f"{tmp_path / 'good'}+{tmp_path / 'lora'}"
    assert found["of-the-hub"]["reference"] == f"org/model+{tmp_path / 'of-the-hub'}"
    assert found["of-nobody"]["reference"] is None
    assert {name for name, each in found.items() if each["adapter_of"]} == {"lora", "of-the-hub", "of-nobody"}
    assert {"pipe", "nested"}.isdisjoint(found)


@pytest.mark.parametrize("body", [{"\ud800": 1}, {"file": "\ud800"}, {"file": "x: \ud800"}, {"file": r'"\ud800": 1'}])
def test_half_a_letter_in_a_request_is_refused(odd_client: TestClient, body: dict[str, Any]) -> None:
    for path in (f"{API}/searches/validate", f"{API}/searches/{NAME}/exports", f"{API}/sources/inspect"):
        found = odd_client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert found.status_code == 422
    line = {"field": "x", **{key: value for key, value in body.items() if key == "file"}}
    assert odd_client.post("/new/line", content=json.dumps(line)).status_code in (200, 422)


# The dashboard


@pytest.mark.parametrize("after", ["x", "-1", "", "1e3", "9" * 50, "\u00b2"])
def test_a_number_of_the_dashboard_that_is_none_is_refused(odd_client: TestClient, after: str) -> None:
    study = next(
        each["study_id"]
        for each in odd_client.get("/api/studies").json()["study_summaries"]
        if each["study_name"] == NAME
    )
    assert odd_client.get(f"/api/studies/{study}", params={"after": after}).status_code == 422
    assert len(odd_client.get(f"/api/studies/{study}?after=2").json()["trials"]) == 5


@pytest.mark.parametrize("study", ["99", "x", "-1", "9" * 30, "\u0661"])
@pytest.mark.parametrize("rest", ["", "/param_importances", "/plot/contour"])
def test_a_study_of_the_dashboard_that_is_gone_is_missing(odd_client: TestClient, study: str, rest: str) -> None:
    assert odd_client.get(f"/api/studies/{study}{rest}").status_code == 404
    assert odd_client.get(f"/csv/{study}").status_code == 404


def test_the_dashboards_files_are_given_to_clients_that_unpack_nothing(odd_client: TestClient) -> None:
    for name, status in (("bundle.js", 200), ("nothing.js", 404), ("%2e%2e", 404)):
        request = odd_client.build_request("GET", f"/dashboard/static/{name}")
        del request.headers["accept-encoding"]
        assert odd_client.send(request).status_code == status


def test_a_server_leaves_the_handlers_of_others_alone(tmp_path: Path) -> None:
    closed: list[bool] = []

    class Handler(logging.StreamHandler):  # type: ignore[type-arg]
        def close(self) -> None:
            closed.append(True)
            super().close()

    handler = Handler(io.StringIO())
    with serving(make_app(tmp_path)) as address:
        assert httpx.get(f"{address}/healthz").status_code == 200
    assert not closed
    handler.close()
