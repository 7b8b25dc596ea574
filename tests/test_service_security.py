"""A table of attacks on the service: each is refused, and nothing of it is done."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from fastapi import FastAPI
from helpers_miniature import MINIATURES
from helpers_service import BEARER, NAME, TOKEN, client_of, make_app, make_search
from starlette.testclient import TestClient

from evomerge.errors import InputError
from evomerge.service import guard, processes
from evomerge.service.allowed import checked_file, located
from evomerge.service.checking import Checker
from evomerge.service.guard import MAX_BYTES, MAX_FAILURES, local_target
from evomerge.service.server import is_loopback, serve
from evomerge.store import Store

API = "/api/v1"
SEARCH = f"{API}/searches/{NAME}"
SECRET = "what nobody may read"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    above = tmp_path_factory.mktemp("above")
    (above / "secret.txt").write_text(SECRET)
    folder = make_search(above / "root")
    os.symlink(above / "secret.txt", folder / "logs" / "link.log")
    export = folder / "exports" / "c0003"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    (export / "inner").mkdir()
    (export / "inner" / "part.txt").write_text("a part")
    os.symlink(above / "secret.txt", export / "link.txt")
    os.symlink(above, export / "way")
    told = {"candidate": "c0003", "bytes": 2, "command": "evomerge export"}
    (folder / "exports" / ".c0003.json").write_text(json.dumps(told))
    os.symlink(above, folder / "exports" / "outside")
    (folder / "exports" / ".outside.json").write_text(json.dumps(told))
    return above / "root"


@pytest.fixture
def app(root: Path) -> FastAPI:
    return make_app(root)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with client_of(app) as found:
        yield found


@pytest.fixture
def stranger(app: FastAPI) -> Iterator[TestClient]:
    """Somebody without a token."""
    with TestClient(app, follow_redirects=False) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_is_done() -> Iterator[None]:
    """No attack may start a process, or have a model opened."""
    with mock.patch.object(processes, "start") as started, mock.patch.object(Checker, "_ask") as asked:
        yield
    started.assert_not_called()
    asked.assert_not_called()


def commands_of(root: Path) -> int:
    with Store.open(root / NAME / "search.db") as store, store.transaction() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM command").scalar_one())


# Who may come in

PLACES = [
    *(f"{SEARCH}{rest}" for rest in ("", "/events", "/logs/c0007.log", "/exports/c0003/files/config.json")),
    *(f"{API}/{rest}" for rest in ("searches", "metrics", "openapi.json")),
    *("/", f"/searches/{NAME}", "/nowhere"),
]


@pytest.mark.parametrize("path", PLACES)
def test_nothing_is_said_without_the_token(stranger: TestClient, path: str) -> None:
    response = stranger.get(path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert NAME not in response.text


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"x-token": TOKEN},
        {"proxy-authorization": f"Bearer {TOKEN}"},
        {"cookie": f"token={TOKEN}"},
    ],
    ids=str,
)
def test_a_wrong_token_or_one_in_another_place_is_none(stranger: TestClient, headers: dict[str, str]) -> None:
    assert stranger.get(f"{API}/searches", headers=headers).status_code == 401


def test_the_token_itself_is_no_cookie(stranger: TestClient, app: FastAPI) -> None:
    name = app.state.authenticator.cookie_name
    assert stranger.get(f"{API}/searches", headers={"cookie": f"{name}={TOKEN}"}).status_code == 401


def test_the_api_takes_no_token_from_the_address(stranger: TestClient) -> None:
    response = stranger.get(f"{API}/searches?token={TOKEN}")
    assert response.status_code == 401
    assert "set-cookie" not in response.headers


def test_health_and_the_way_in_are_open(stranger: TestClient) -> None:
    for path in (f"{API}/health", "/healthz"):
        assert stranger.get(path).json() == {"status": "ok"}
    assert stranger.get("/login").status_code == 200


def test_a_link_logs_in_once_and_the_token_leaves_the_address_bar(stranger: TestClient) -> None:
    entered = stranger.get(f"/?token={TOKEN}&order=asc")
    assert (entered.status_code, entered.headers["location"]) == (303, "/?order=asc")
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert stranger.get(f"{API}/searches").status_code == 200  # the client keeps cookies as a browser does


def test_the_form_logs_in_and_out(stranger: TestClient) -> None:
    wrong = stranger.post("/login", data={"token": "wrong", "next": "/new"})
    assert (wrong.status_code, wrong.headers["location"]) == (303, "/login?failed=1")
    assert stranger.get(f"{API}/searches").status_code == 401
    entered = stranger.post("/login", data={"token": TOKEN, "next": "/searches/a b?x=1"})
    assert (entered.status_code, entered.headers["location"]) == (303, "/searches/a%20b?x=1")
    assert stranger.get(f"{API}/searches").status_code == 200
    assert stranger.post("/logout", headers={"sec-fetch-site": "same-origin"}).status_code == 303
    assert stranger.get(f"{API}/searches").status_code == 401


def test_a_person_is_led_to_the_login_and_back(stranger: TestClient) -> None:
    response = stranger.get(f"/searches/{NAME}?x=1", headers={"accept": "text/html"})
    assert response.headers["location"] == f"/login?next=%2Fsearches%2F{NAME}%3Fx%3D1"


@pytest.mark.parametrize(
    "target", ["//evil.example", "/\\evil.example", "https://evil.example", "\\\\evil.example", "/\r\nset-cookie: a=b"]
)
def test_a_login_leads_to_no_other_site(stranger: TestClient, target: str) -> None:
    location = stranger.post("/login", data={"token": TOKEN, "next": target}).headers["location"]
    assert location.startswith("/")
    assert not location.startswith(("//", "/\\"))
    assert "\n" not in location
    assert local_target(target) == location
    linked = stranger.get(f"//evil.example/?token={TOKEN}").headers.get("location", "/")
    assert not linked.startswith(("//", "/\\", "http"))


def test_many_wrong_tokens_have_to_wait_and_the_right_one_never(
    stranger: TestClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"authorization": "Bearer no"}
    tries = [stranger.get(f"{API}/searches", headers=wrong) for _ in range(MAX_FAILURES)]
    assert {response.status_code for response in tries} == {401}
    for response in (
        stranger.get(f"{API}/searches", headers=wrong),
        stranger.get("/?token=no"),
        stranger.post("/login", data={"token": "no"}),
    ):
        assert response.status_code == 429
        assert 0 < int(response.headers["retry-after"]) <= 61
    # Behind a proxy all have one address.
    assert stranger.get(f"{API}/searches", headers=BEARER).status_code == 200
    assert stranger.get(f"/?token={TOKEN}").headers["location"] == "/"
    stranger.cookies.clear()
    assert stranger.post("/login", data={"token": TOKEN}).headers["location"] == "/"
    assert app.state.authenticator.lockout_s("another") == 0
    later = time.monotonic() + guard.FAILURES_S
    monkeypatch.setattr(guard.time, "monotonic", lambda: later)
    assert stranger.get(f"{API}/searches", headers=wrong).status_code == 401


def test_a_logout_ends_the_cookie_of_one_browser(stranger: TestClient, app: FastAPI) -> None:
    stranger.get(f"/?token={TOKEN}")
    copied = stranger.cookies.get(app.state.authenticator.cookie_name)
    with TestClient(app, follow_redirects=False) as other:
        other.get(f"/?token={TOKEN}")
        assert other.cookies.get(app.state.authenticator.cookie_name) != copied
        stranger.post("/logout", headers={"sec-fetch-site": "same-origin"})
        named = {"cookie": f"{app.state.authenticator.cookie_name}={copied}"}
        assert stranger.get(f"{API}/searches", headers=named).status_code == 401
        assert other.get(f"{API}/searches").status_code == 200
        with mock.patch.object(guard, "_MAX_COOKIES", 1):
            stranger.get(f"/?token={TOKEN}")
        assert stranger.get(f"{API}/searches").status_code == 200
        assert other.get(f"{API}/searches").status_code == 401  # the oldest login, where there are too many


def test_the_token_is_compared_in_constant_time(app: FastAPI) -> None:
    with mock.patch.object(guard.secrets, "compare_digest", return_value=True) as compared:
        assert app.state.authenticator.accepts("anything", "somebody")
    compared.assert_called_once_with(b"anything", TOKEN.encode())


@pytest.mark.parametrize("given", ["x", "Bearer", TOKEN[:-1], "\u00ff"])
def test_a_wrong_token_beside_a_cookie_does_not_come_in(stranger: TestClient, root: Path, given: str) -> None:
    stranger.get(f"/?token={TOKEN}")
    headers = {"authorization": f"Bearer {given}".encode("latin-1"), "origin": b"https://evil.example"}
    assert stranger.post(f"{SEARCH}/cancel", headers=headers).status_code == 401
    assert stranger.get(f"{API}/searches", headers=headers).status_code == 401
    assert commands_of(root) == 0


# Other sites


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "testserver.evil.example", "", "127.0.0.1.nip.io"]
)
def test_a_name_that_is_not_the_servers_is_refused(client: TestClient, host: str) -> None:
    response = client.get(f"{API}/searches", headers={"host": host})
    assert response.status_code == 421
    assert NAME not in response.text


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://testserver:81"},
        {"origin": "https://testserver"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "cross-site", "origin": "http://testserver"},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [f"{SEARCH}/cancel", f"{SEARCH}/exports", f"{API}/searches", "/logout"])
def test_a_form_of_another_site_does_nothing(
    stranger: TestClient, root: Path, headers: dict[str, str], path: str
) -> None:
    stranger.get(f"/?token={TOKEN}")  # the person has logged in
    response = stranger.post(path, headers=headers | {"content-type": "text/plain"}, content="{}")
    assert response.status_code == 403
    assert commands_of(root) == 0


def test_our_own_page_may_change_things(stranger: TestClient) -> None:
    stranger.get(f"/?token={TOKEN}")
    for headers in ({"sec-fetch-site": "same-origin"}, {"origin": "http://testserver"}):
        assert stranger.post(f"{SEARCH}/pause", headers=headers).status_code == 409  # no driver: it was let through


def test_another_site_does_nothing_where_everybody_is_let_in(root: Path) -> None:
    with TestClient(make_app(root, token=None)) as client:
        assert client.get(f"{API}/searches").status_code == 200
        assert client.post(f"{SEARCH}/pause").status_code == 409
        for more in ({}, BEARER, {"authorization": "Bearer x"}):
            assert client.post(f"{SEARCH}/pause", headers={"origin": "https://evil.example", **more}).status_code == 403
        assert client.get(f"{API}/searches", headers={"host": "evil.example"}).status_code == 421


@pytest.mark.parametrize("path", [f"{API}/searches", "/", "/nowhere", "/login", "/static/nothing.js", f"{API}/health"])
def test_every_answer_has_the_headers_that_keep_browsers_safe(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in headers


# Bodies


def test_a_body_that_is_too_large_is_refused(client: TestClient) -> None:
    content = b"x" * (MAX_BYTES + 1)
    assert client.post(f"{API}/searches", content=content).status_code == 413
    assert client.post(f"{API}/searches", content=b"{}", headers={"content-length": "-1"}).status_code == 413


def test_a_body_in_pieces_is_refused_when_it_becomes_too_large(client: TestClient) -> None:
    given = 0

    def pieces() -> Iterator[bytes]:
        nonlocal given
        for _ in range(100):
            given += 1
            yield b"x" * 2**16

    assert client.post(f"{API}/searches", content=pieces()).status_code == 413
    assert client.post(f"{API}/searches/validate", content=iter([b'{"file"', b': "a"}'])).status_code == 422


def test_a_body_that_breaks_off_does_nothing(app: FastAPI, root: Path) -> None:
    """A command needs no body; one that was announced and did not come is not carried out."""
    answered: list[Any] = []

    async def send(message: Any) -> None:
        answered.append(message)

    async def receive() -> dict[str, Any]:
        return pieces.pop(0)

    pieces = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    headers = [(b"host", b"testserver"), (b"authorization", BEARER["authorization"].encode())]
    scope = {"type": "http", "method": "POST", "path": f"{SEARCH}/cancel", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert answered == []
    assert commands_of(root) == 0


# Names


@pytest.mark.parametrize(
    "name", ["%2e%2e", "..%2froot", "%2e%2e%2fsecret.txt", "%2fetc", "%2e", "made-up%00", "made-up%2flogs", "~"]
)
@pytest.mark.parametrize("rest", ["", "/file", "/candidates", "/logs/driver.log", "/exports"])
def test_a_name_reaches_no_other_folder(client: TestClient, name: str, rest: str) -> None:
    response = client.get(f"{API}/searches/{name}{rest}")
    assert response.status_code in (404, 405)
    assert SECRET not in response.text


@pytest.mark.parametrize(
    "file", ["..%2fsearch.yaml", "%2e%2e%2f%2e%2e%2f%2e%2e%2fsecret.txt", "%2fetc%2fpasswd", "link.log", "%2e%2e",
             "%2e", "%00", "..%5csearch.yaml", "logs%2fc0007.log"],
)  # fmt: skip
def test_a_log_is_a_plain_file_of_the_logs(client: TestClient, file: str) -> None:
    response = client.get(f"{SEARCH}/logs/{file}")
    assert response.status_code == 404
    assert SECRET not in response.text


@pytest.mark.parametrize(
    ("export", "file"),
    [
        ("c0003", "link.txt"),
        ("c0003", "way/secret.txt"),
        ("c0003", "..%2f..%2fsearch.yaml"),
        ("c0003", "%2e%2e/%2e%2e/search.yaml"),
        ("c0003", "/etc/passwd"),
        ("c0003", "inner"),
        ("c0003", ""),
        ("outside", "secret.txt"),
        ("..", "search.yaml"),
        ("%2e%2e", "search.yaml"),
        ("none", "config.json"),
    ],
)
def test_a_file_of_an_export_is_a_plain_file_in_it(client: TestClient, export: str, file: str) -> None:
    response = client.get(f"{SEARCH}/exports/{export}/files/{file}")
    assert response.status_code in (404, 405)
    assert SECRET not in response.text
    assert client.get(f"{SEARCH}/exports/c0003/files/config.json").text == "{}"
    assert client.get(f"{SEARCH}/exports/c0003/files/inner/part.txt").text == "a part"
    shown = client.get(f"{SEARCH}/exports/c0003").json()["files"]
    assert [each["name"] for each in shown] == ["config.json"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", "a/b", ".hidden", "", "a\u0000b", "x" * 65])
def test_an_export_is_made_in_its_own_folder_alone(client: TestClient, name: str) -> None:
    assert client.post(f"{SEARCH}/exports", json={"candidate": "best", "name": name}).status_code == 422


def test_a_candidate_of_an_export_is_no_option_of_the_command(client: TestClient) -> None:
    for candidate in ("--no-verify", "c0003 --out /x", "../x", "c9999"):
        assert client.post(f"{SEARCH}/exports", json={"candidate": candidate}).status_code == 422


# Search files


def file_of(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": "attack",
        "sources": {name: str(MINIATURES / name) for name in ("base", "maths")},
        "base": "base",
        "space": {"method": "task_arithmetic"},
        "objectives": {"o": {"task": "mini_math_ja", "metric": "acc_ja"}},
        "budget": {"candidates": 5},
    }
    return content | changes


def objective(**keys: Any) -> dict[str, Any]:
    return {"objectives": {"o": {"metric": "acc", **keys}}}


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(lines)


ATTACKS: dict[str, dict[str, Any] | str] = {
    "a source outside": {"sources": {"base": "/etc", "maths": str(MINIATURES / "maths")}},
    "a source by ..": {"sources": {"base": "../../..", "maths": "maths"}},
    "a source by .. in the middle": {"sources": {"base": f"{MINIATURES}/../..", "maths": "maths"}},
    "a source in the home": {"sources": {"base": "~", "maths": "maths"}},
    "an adapter outside": {"sources": {"base": f"{MINIATURES}/base+/etc", "maths": "maths"}},
    "a source by URL": {"sources": {"base": "https://evil.example/model", "maths": "maths"}},
    "a hub name that climbs": {"sources": {"base": "a/../../..", "maths": "maths"}},
    "a Python function": objective(evaluator="python", file="x.py", items_file="x.jsonl", metrics={"acc": "maximize"}),
    "a Python function of ours": objective(
        evaluator="python", file=str(MINIATURES / "x.py"), items_file="x.jsonl", metrics={"acc": "maximize"}
    ),
    "consent to code": {"allow_task_code": True},
    "consent to code in an objective": objective(task="t", allow_task_code=True),
    "remote code": objective(task="t", trust_remote_code=True),
    "items outside": objective(evaluator="likelihood", file="/etc/passwd"),
    "items by ..": objective(evaluator="likelihood", file="../../../../etc/passwd"),
    "items that are Python": objective(evaluator="likelihood", file="x.py"),
    "a task folder outside": {"task_folders": ["/etc"]},
    "a task that is a path": objective(task="/etc/passwd"),
    "a data set that is a path": objective(evaluator="mgsm", language="ja", hub="/etc"),
    "a reward model outside": objective(evaluator="reward_model", model="/etc", file="x.jsonl"),
    "a winner outside": {"space": {"kind": "hybrid_space", "method": "task_arithmetic", "winner": "/etc/passwd"}},
    "a store elsewhere": {"store": "postgresql://evil.example/x"},
    "observers": {"observers": [{"kind": "mlflow", "uri": "https://evil.example"}]},
    "artifacts": {"artifacts": "s3://evil/x"},
    "a cluster": {"cluster": {"address": "ray://evil.example:10001"}},
    "an insecure cluster": {"cluster": {"insecure": True}},
    "a package for its workers": {"cluster": {"runtime_env": {"pip": ["evil"]}}},
    "a name that is a path": {"name": "../attack"},
    "a hidden name": {"name": ".attack"},
    "a bomb of aliases": bomb(),
    "a bomb of merges": "a: &a {x: 1}\n" + "\n".join(
        f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
    ),
    "an alias of itself": "a: &a [*a]",
    "depth": "[" * 5000,
    "depth in a block": "\n".join(" " * i + "a:" for i in range(300)),
    "length": "name: " + "x" * 70_000,
    "a tag that runs code": "!!python/object/apply:os.system ['touch /tmp/attacked']",
    "a number of many digits": "seed: " + "9" * 5000,
    "a null byte": yaml.safe_dump(file_of(sources={"base": "/a\0b", "maths": "maths"})),
    "no mapping": "[1, 2]",
    "nothing": "",
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("path", [f"{API}/searches", f"{API}/searches/validate"])
def test_a_search_file_that_reaches_out_is_refused(client: TestClient, root: Path, attack: str, path: str) -> None:
    content = ATTACKS[attack]
    text = content if isinstance(content, str) else yaml.safe_dump(file_of(**content))
    response = client.post(path, json={"file": text})
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert "root:" not in response.text  # of /etc/passwd
    assert sorted(each.name for each in root.iterdir()) == [NAME]
    assert not Path("/tmp/attacked").exists()


def test_a_plain_search_file_is_let_through() -> None:
    file = checked_file(yaml.safe_dump(file_of(sources={"base": "base", "maths": "org/model@main"})), [MINIATURES])
    assert file.sources == {"base": str(MINIATURES / "base"), "maths": "org/model@main"}
    shared = "x: &x {task: mini_math_ja, metric: acc_ja}\n"
    with pytest.raises(InputError, match="x: is not a known key"):  # the alias itself is fine
        checked_file(shared + yaml.safe_dump(file_of()), [MINIATURES])


def test_a_search_to_start_from_is_one_of_the_servers(tmp_path: Path) -> None:
    sources = {"base": "base", "maths": "org/model"}
    for named, path in (("first", tmp_path / "first"), (str(tmp_path / "first"), tmp_path / "first")):
        file = checked_file(yaml.safe_dump(file_of(sources=sources, start_from=named)), [MINIATURES, tmp_path])
        assert file.start_from == (path,)
    for elsewhere in ("../first", "/etc", ["first", "/etc"]):
        with pytest.raises(InputError, match="start_from"):
            checked_file(yaml.safe_dump(file_of(sources=sources, start_from=elsewhere)), [MINIATURES, tmp_path])


def test_a_link_that_leads_out_of_the_allowed_folders_is_outside(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    os.symlink("/etc", inside / "link")
    for reference in ("link", str(inside / "link"), "./link"):
        with pytest.raises(InputError, match="does not allow"):
            located(reference, "sources.a", [inside])
    (inside / "model").mkdir()
    assert located("model", "sources.a", [inside]) == str((inside / "model").resolve())


@pytest.mark.parametrize("reference", ["/etc", "..", "~/x", "https://evil.example/a", "file:///etc", "a/b/c", "x", ""])
def test_only_allowed_models_are_inspected(client: TestClient, reference: str) -> None:
    response = client.post(f"{API}/sources/inspect", json={"sources": {"a": reference}})
    assert response.status_code == 422
    assert client.post(f"{API}/sources/inspect", json={"sources": {"a": "base"}, "base": "/etc"}).status_code == 422


# The server


def refused_to_serve(folder: Path, **changes: Any) -> tuple[str, list[str]]:
    """Why a server does not start, and what it has printed until then."""
    told: list[str] = []
    given: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "sources": (), "names": (), "needs_token": True}
    with pytest.raises(InputError) as refused:
        serve(str(folder), **{"folder": folder, "insecure": False, **given, **changes}, say=told.append)
    return str(refused.value), told


def test_everybody_is_let_in_only_on_purpose(tmp_path: Path) -> None:
    why, _ = refused_to_serve(tmp_path, host="0.0.0.0", needs_token=False)
    assert "would let in everybody" in why
    assert all(is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.nip.io"))


def test_a_weak_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("sh0rt", "with a space", "with\na line"):
        monkeypatch.setenv("EVOMERGE_TOKEN", token)
        why, told = refused_to_serve(tmp_path)
        assert why.startswith("EVOMERGE_TOKEN")
        assert token not in why
        assert told == []


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        why, told = refused_to_serve(tmp_path, port=port)
    assert why.startswith(f"127.0.0.1:{port}: cannot be listened on")
    assert told == []  # a link to somebody else's server would give him the token
