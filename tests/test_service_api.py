"""The API against the store's own numbers, the stream of events, and its OpenAPI document."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import pytest
import schemathesis
import yaml
from fastapi import FastAPI
from helpers_miniature import evomerge
from helpers_miniature import json_of as json_of_command
from helpers_service import BEARER, NAME, TOKEN, client_of, make_app, make_search, serving
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from sqlalchemy import URL, Connection, Engine
from starlette.testclient import TestClient

from evomerge.errors import InputError
from evomerge.front import extend_front
from evomerge.report.comparing import compared
from evomerge.report.status import status_of
from evomerge.service import processes
from evomerge.service.checking import Checker
from evomerge.service.client import Client
from evomerge.service.summary import sparkline
from evomerge.store import Store, acquire, reading, summaries
from evomerge.store.engine import begin, connect
from evomerge.store.events import CopyingState
from evomerge.testing.store_fixtures import content

API = "/api/v1"
HOST = {"host": "testserver"}
SEARCH = f"{API}/searches/{NAME}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    make_search(folder)
    return folder


@pytest.fixture(scope="module")
def app(root: Path) -> FastAPI:
    return make_app(root)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with client_of(app) as found:
        yield found


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with Store.open(root / NAME / "search.db") as found:
        yield found


def json_of(client: TestClient, path: str, **query: Any) -> Any:
    response = client.get(path, params=query)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_list_says_of_a_search_what_the_store_says(client: TestClient, store: Store) -> None:
    (found,) = json_of(client, f"{API}/searches")["searches"]
    status = status_of(store)
    assert found == json_of(client, f"{SEARCH}/summary")
    assert (found["name"], found["state"], found["driver"]) == (NAME, "finished", False)
    assert found["counts"] == status.candidates.model_dump()
    assert status.best is not None
    assert found["best"]["id"] == status.best.id
    assert found["best"]["objectives"]["o0"]["mean"] == status.best.objectives["o0"].mean
    sources = {row.label: row.objectives["o0"].mean for row in store.candidates() if row.origin == "source"}
    assert found["best_source"]["label"] == max(sources, key=sources.__getitem__)
    assert found["best_role"] == "knee"
    assert found["sparkline"] == sorted(found["sparkline"])
    assert found["eta_s"] is None
    assert found["gpu_hours"] is None


def test_a_search_is_shown_as_the_command_line_shows_it(client: TestClient, store: Store) -> None:
    expected = json.loads(status_of(store).model_dump_json()) | {"name": NAME}
    assert json_of(client, SEARCH) == expected


@pytest.mark.parametrize(
    "path",
    [
        *(f"/searches/{NAME}{rest}" for rest in ("", "/candidates/6", "/compare", "/exports", "/report.html")),
        *(f"{SEARCH}{rest}" for rest in ("", "/summary", "/front", "/candidates", "/candidates/6", "/figures/front",
                                         "/compare?a=0&b=6")),
    ],
)  # fmt: skip
def test_a_request_opens_the_store_of_its_search_once_and_no_other_and_reads_one_state(
    root: Path, client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (root / "other").mkdir(exist_ok=True)
    (root / "other" / "search.db").write_bytes((root / NAME / "search.db").read_bytes())
    opened: list[str] = []
    begun: list[Connection] = []

    def counted(url: URL) -> Engine:
        opened.append(str(url.database))
        return connect(url)

    def counted_begin(connection: Connection) -> None:
        begun.append(connection)
        begin(connection)

    monkeypatch.setattr(reading, "connect", counted)
    monkeypatch.setattr(reading, "begin", counted_begin)
    answered = client.get(path, headers={"accept": "text/html"})
    shutil.rmtree(root / "other")
    assert answered.status_code == 200, answered.text
    assert opened == [str(root / NAME / "search.db")]
    assert len(begun) == 2  # one finds the search, and all is read in the other


def test_a_sparkline_is_the_best_so_far_at_equal_steps() -> None:
    rng = np.random.default_rng(0)
    for asked in (1, 5, 24, 25, 100, 1000):
        means = rng.random(asked)
        best = np.maximum.accumulate(means)
        steps = [(i, float(means[i])) for i in range(asked) if i == 0 or best[i] > best[i - 1]]
        found = sparkline(steps, asked)
        assert len(found) == min(asked, 24)
        ends = range(1, asked + 1) if asked <= 24 else [-(-asked * (i + 1) // 24) for i in range(24)]
        assert found == [best[end - 1] for end in ends]
    assert sparkline([], 10) == []


@pytest.mark.parametrize("sort", ["number", "o0", "o1"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_together_are_the_whole_list_in_order(client: TestClient, store: Store, sort: str, order: str) -> None:
    found: list[dict[str, Any]] = []
    query: dict[str, Any] = {"sort": sort, "order": order, "limit": 7}
    while True:
        page = json_of(client, f"{SEARCH}/candidates", **query)
        found += page["candidates"]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]

    sign = -1 if order == "desc" else 1

    def key(row: Any) -> Any:
        if sort == "number":
            return sign * row.number
        return sign * row.objectives[sort].mean, not row.on_front, row.number

    rows = sorted(store.candidates(), key=key)
    assert [each["number"] for each in found] == [row.number for row in rows]
    for each, row in zip(found, rows, strict=True):
        assert each["objectives"] == {name: value.model_dump() for name, value in row.objectives.items()}
        assert each["seconds"] == pytest.approx(sum(row.timings.values()))
        same = ("step", "origin", "label", "status", "same_as", "worker", "eligible", "on_front", "finished_at")
        assert {name: each[name] for name in same} == {name: getattr(row, name) for name in same}


def test_filters_are_those_of_the_store(client: TestClient, store: Store) -> None:
    def numbers(**query: Any) -> list[int]:
        return [row["number"] for row in json_of(client, f"{SEARCH}/candidates", limit=500, **query)["candidates"]]

    rows = store.candidates()
    assert numbers(origin="source") == [row.number for row in rows if row.origin == "source"]
    assert numbers(front=True) == [row.number for row in store.front()]
    assert numbers(status="done") == [row.number for row in rows if row.status == "done"]
    assert numbers(status="failed") == []
    assert numbers(status="done", origin="average", front=False) == [r.number for r in rows if r.origin == "average"]
    front = json_of(client, f"{SEARCH}/front")["candidates"]
    losses = {row.number: row.losses for row in rows if row.losses is not None}
    assert [row["number"] for row in front] == sorted(extend_front({}, losses))


def test_a_candidate_is_shown_with_recipe_and_genome(client: TestClient, store: Store) -> None:
    found, row = json_of(client, f"{SEARCH}/candidates/7"), store.candidate(7)
    assert row.genome is not None
    assert list(found["genome"].values()) == row.genome.tolist()
    assert list(found["genome"]) == ["w0", "w1", "w2", "w3"]
    assert found["timings"] == row.timings
    assert found["losses"] == row.losses
    assert found["recipe_hash"] == row.recipe_hash
    assert "task_arithmetic" in found["recipe"]
    assert "task_arithmetic" in found["mergekit"]
    missing = client.get(f"{SEARCH}/candidates/30")
    assert (missing.status_code, missing.headers["content-type"]) == (404, "application/problem+json")


@pytest.mark.parametrize("objective", ["o0", "o1"])
def test_two_candidates_are_compared_on_their_own_scores(client: TestClient, store: Store, objective: str) -> None:
    found = json_of(client, f"{SEARCH}/compare", a=3, b=9, objective=objective)
    expected = [each.model_dump() for each in compared(store, 3, 9) if each.split == "search"]
    assert found["comparisons"] == expected
    assert found["objective"] == objective
    for side, number in (("a", 3), ("b", 9)):
        (scores,) = [s for s in store.scores(number, "search") if s.evaluator == f"v{objective[1]}"]
        assert [item[side]["score"] for item in found["items"]] == scores.metrics["acc"].tolist()
        assert [item["item"] for item in found["items"]] == scores.items.tolist()
    assert json_of(client, f"{SEARCH}/compare", a=3, b=9, split="held_out")["items"] == []


def test_light_queries_agree_with_the_rows(store: Store) -> None:
    rows = store.candidates()
    means, errors, items = summaries.measured(store, "o0", np.array([row.number for row in rows]))
    assert means.tolist() == [row.objectives["o0"].mean for row in rows]
    assert errors.tolist() == [row.objectives["o0"].stderr for row in rows]
    assert items.tolist() == [row.objectives["o0"].n for row in rows]
    alone, _, _ = summaries.measured(store, "o0", np.array([3, 4, 10**6]))
    assert alone[:2].tolist() == means[3:5].tolist()
    assert np.isnan(alone[2])
    numbers, genomes = summaries.genomes(store)
    assert numbers.tolist() == [row.number for row in rows if row.genome is not None]
    np.testing.assert_array_equal(genomes, np.stack([row.genome for row in rows if row.genome is not None]))
    assert summaries.columns(store, ["worker", "timings"]) == {
        "worker": [row.worker for row in rows],
        "timings": [row.timings for row in rows],
    }
    light = [{key: value for key, value in content(row).items() if key not in ("recipe", "genome")} for row in rows]
    page = summaries.page(store, summaries.Order(), 10**4)
    assert [content(row) for row in page] == light
    assert [content(row) for row in summaries.candidates(store, [9, 3])] == [light[3], light[9]]
    assert summaries.last_event(store) == store.events()[-1].seq
    some = summaries.events_after(store, 5, 7)
    assert some == [event for event in store.events() if event.seq > 5][:7]


def test_the_search_file_and_logs_are_given(client: TestClient, root: Path) -> None:
    assert client.get(f"{SEARCH}/file").text == (root / NAME / "search.yaml").read_text()
    assert client.get(f"{SEARCH}/logs/c0007.log").text == "what c0007 said\n"
    assert client.get(f"{SEARCH}/logs/c0008.log").status_code == 404


def test_metrics_are_read_by_prometheus(client: TestClient, store: Store) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    text = client.get(f"{API}/metrics").text
    samples = {
        (s.name, s.labels.get("status", "")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples[("evomerge_search_candidates", "done")] == store.counts()["done"]
    assert samples[("evomerge_search_driven", "")] == 0


def test_a_faulty_request_names_its_field(client: TestClient) -> None:
    response = client.get(f"{SEARCH}/candidates", params={"limit": 0})
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["faults"][0]["field"] == "limit"
    unknown = client.get(f"{SEARCH}/candidates", params={"sort": "o7"}).json()
    assert "o7" in unknown["faults"][0]["problem"]
    for cursor in ("x", "WzFd", "W251bGxd", "WzFlOTk5LCAxXQ=="):  # rubbish, [1], [null], [1e999, 1]
        assert client.get(f"{SEARCH}/candidates", params={"sort": "o0", "cursor": cursor}).status_code == 422


def test_a_search_that_cannot_be_read_is_in_the_list(tmp_path: Path) -> None:
    make_search(tmp_path, "good", candidates=8)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "search.db").write_bytes(b"no database" * 500)
    with client_of(make_app(tmp_path)) as client:
        states = {each["name"]: each["state"] for each in json_of(client, f"{API}/searches")["searches"]}
        assert states == {"good": "finished", "bad": "unreadable"}
        assert client.get(f"{API}/searches/bad").status_code == 422


# Events


async def read_events(
    app: FastAPI, wanted: int, path: str = f"{SEARCH}/events", **headers: str
) -> list[dict[str, str]]:
    """The first events of a stream, read as a browser does; then the client goes away."""
    found: list[dict[str, str]] = []
    text = ""
    enough = asyncio.Event()
    path, _, query = path.partition("?")

    async def receive() -> dict[str, Any]:
        await enough.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal text
        text += message.get("body", b"").decode()
        *whole, text = text.split("\n\n")
        for block in whole:
            lines = [line.partition(": ") for line in block.splitlines() if not line.startswith(":")]
            found.extend([{key: value for key, _, value in lines}] if lines else [])
        if len(found) >= wanted:
            enough.set()

    named = {"host": "testserver", **BEARER, **headers}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(key.replace("_", "-").encode(), value.encode()) for key, value in named.items()],
        "client": ("testclient", 1), "server": ("testserver", 80),
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 30)  # type: ignore[arg-type]
    return found


def test_events_are_streamed_from_the_first_on(app: FastAPI, store: Store) -> None:
    events = store.events()
    found = asyncio.run(read_events(app, len(events)))
    assert [int(each["id"]) for each in found] == [event.seq for event in events]
    assert not any("event" in each for each in found)  # of one kind, for a browser: a kind that is new is heard too
    assert [json.loads(each["data"])["kind"] for each in found] == [event.kind for event in events]
    assert json.loads(found[3]["data"])["payload"] == events[3].payload


def test_a_stream_goes_on_after_the_last_event_that_was_seen(app: FastAPI, store: Store) -> None:
    seqs = [event.seq for event in store.events()]
    resumed = asyncio.run(read_events(app, 5, last_event_id=str(seqs[20])))
    assert [int(each["id"]) for each in resumed][:5] == seqs[21:26]
    since = asyncio.run(read_events(app, 5, f"{SEARCH}/events?since={seqs[20]}"))
    assert since[:5] == resumed[:5]


def test_what_happens_later_comes_too(tmp_path: Path) -> None:
    folder = make_search(tmp_path, candidates=8)
    app = make_app(tmp_path)

    async def run() -> list[dict[str, str]]:
        with Store.open(folder / "search.db") as store, acquire(store):
            newest = store.events()[-1].seq
            reading = asyncio.create_task(read_events(app, 1, last_event_id=str(newest)))
            store.record_event(CopyingState(state="ended", why="a thing"))
            return await reading

    (event, *_) = asyncio.run(run())
    found = json.loads(event["data"])
    assert (found["kind"], found["payload"]) == ("artifacts", {"state": "ended", "why": "a thing"})


def test_the_name_of_a_search_that_is_there_is_refused_before_anything_is_opened(client: TestClient) -> None:
    content = {
        "name": NAME,
        "sources": {"base": "base", "maths": "maths"},
        "base": "base",
        "space": {"method": "task_arithmetic"},
        "objectives": {"maths": {"task": "no_such_task", "metric": "acc"}},
        "budget": {"candidates": 8},
    }
    for path in ("", "/validate"):
        answer = client.post(f"{API}/searches{path}", json={"file": yaml.safe_dump(content)})
        assert answer.status_code == 409
        assert answer.json()["faults"][0]["field"] == "search file: name"


# The client


def test_the_client_reads_what_the_api_says(app: FastAPI, store: Store) -> None:
    with serving(app) as url, Client(url, TOKEN) as client, Client(url, "wrong") as stranger:
        assert [each.name for each in client.searches()] == [NAME]
        assert client.status(NAME).candidates == status_of(store).candidates
        assert [row.number for row in client.candidates(NAME, limit=4)] == list(range(30))
        assert client.candidate(NAME, 7).recipe_hash == store.candidate(7).recipe_hash
        assert len(client.compare(NAME, 1, 2).items) == 40
        some = list(itertools.islice(client.events(NAME, since=3), 4))
        assert [event.seq for event in some] == [event.seq for event in store.events()[3:7]]
        with pytest.raises(InputError, match="there is no search called 'nowhere'"):
            client.status("nowhere")
        with pytest.raises(InputError, match="no driver is running"):
            client.send_command(NAME, "pause")
        with pytest.raises(InputError, match="EVOMERGE_TOKEN"):
            stranger.searches()


def test_the_command_line_asks_a_server(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: Store
) -> None:
    monkeypatch.setenv("EVOMERGE_TOKEN", TOKEN)
    with serving(app) as url:
        assert json_of_command(capsys, "status", NAME, "--json", "--server", url)["name"] == NAME
        top = json_of_command(capsys, "top", NAME, "-k", 3, "--json", "--server", url)
        assert [row["number"] for row in top] == [row.number for row in store.best("o0", maximise=True, k=3)]
        assert evomerge("list", "--server", url) == 0
        assert NAME in capsys.readouterr().out
        assert evomerge("pause", NAME, "--server", url) == 2
        assert "no driver is running" in capsys.readouterr().err
        assert evomerge("resume", NAME, "--server", url, "--set", "seed=1") == 2


@pytest.mark.parametrize("text", ["<html>welcome</html>", '{"name": "small"}', "data: {}\n\n"])
def test_the_client_says_that_an_answer_is_not_of_this_api(text: str) -> None:
    answer = httpx.MockTransport(lambda request: httpx.Response(200, text=text))
    with (
        Client("http://host", TOKEN, answer) as client,
        pytest.raises(InputError, match=r"answer that cannot be read .* Is it an Evomerge server"),
    ):
        _ = [*client.events("x")] if text.startswith("data") else client.status("x")


def test_the_client_says_that_nobody_is_there() -> None:
    with Client("http://127.0.0.1:9", TOKEN) as found, pytest.raises(InputError, match="cannot be reached"):
        found.searches()


# The OpenAPI document against the app


def test_the_api_keeps_to_its_openapi_document(root: Path) -> None:
    schema = schemathesis.openapi.from_asgi(f"{API}/openapi.json", make_app(root), headers=BEARER | HOST)
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    answered: dict[str, set[int]] = {}

    def try_all(operation: schemathesis.APIOperation, mode: GenerationMode) -> None:  # type: ignore[type-arg]
        @seed(0)
        @settings(max_examples=4, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode), is_known=st.booleans())
        def keeps_to_it(case: schemathesis.Case, is_known: bool) -> None:
            if is_known and "name" in case.path_parameters:
                case.path_parameters["name"] = NAME  # or nearly all would be answered by 404
            response = case.call_and_validate(checks=checks, headers=BEARER | HOST)
            answered.setdefault(operation.label, set()).add(response.status_code)

        keeps_to_it()

    refused = mock.patch.object(Checker, "_ask", side_effect=InputError("file", "is not opened in this test"))
    with refused, mock.patch.object(processes, "start"):  # no processes: they are another test's matter
        for found in schema.exclude(path_regex="/events$").get_all_operations():
            operation = found.ok()
            try_all(operation, GenerationMode.POSITIVE)
            if operation.query.items or operation.body:  # a path can hardly be wrong
                try_all(operation, GenerationMode.NEGATIVE)
    assert {"GET /api/v1/searches/{name}", "POST /api/v1/searches", "POST /api/v1/sources/inspect"} <= set(answered)
    assert all(200 in statuses for label, statuses in answered.items() if label.endswith(("{name}", "/front")))
