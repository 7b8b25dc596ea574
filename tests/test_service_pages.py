"""The pages without a browser: what they say against the store and the API, and that nothing of a person's is HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import helpers_figures
import helpers_figures as made
import pytest
import test_elites
from fastapi import FastAPI
from helpers_service import BEARER, NAME, client_of, make_app, make_search
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, update
from starlette.testclient import TestClient

from evaluators import evaluator_settings
from evaluators.likelihood import LikelihoodSettings
from evomerge.method import own_methods
from evomerge.plugins import OWN, find_class
from evomerge.report.comparing import Comparison
from evomerge.report.items import fields_of
from evomerge.report.screen import gain_text
from evomerge.report.search_status import SearchStatus
from evomerge.report.status import status_of
from evomerge.report.team import team_of
from evomerge.search.settings.sections import Budget, CalibrationTexts, Confirm, FitItems, Proxy, Racing, Select
from evomerge.service import processes
from evomerge.service.bodies import CandidateName, SearchSummary
from evomerge.service.pages import forms
from evomerge.service.pages import search as pages_search
from evomerge.service.pages.candidate import sentence
from evomerge.service.pages.lines import place_of
from evomerge.service.pages.model_card import card_of
from evomerge.service.pages.rendering import sparkline
from evomerge.service.pages.search import choices
from evomerge.store import Store, acquire, record, tables
from evomerge.store.events import TeamChosen
from evomerge.yaml import dump_yaml
from search_spaces.base import SpaceSettings

METHODS = own_methods()
SEARCH = f"/searches/{NAME}"
PAGES = (
    "/", SEARCH, f"{SEARCH}?status=done&sort=o0&order=asc&front=true", f"{SEARCH}/candidates/0",
    f"{SEARCH}/candidates/12", f"{SEARCH}/compare", f"{SEARCH}/compare?a=best&b=one&differ=true",
    f"{SEARCH}/exports", "/new", "/login", "/nothing",
)  # fmt: skip


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
    with client_of(app, accept="text/html") as found:
        yield found


@pytest.fixture(scope="module")
def confirmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, SearchStatus]]:
    """A client of a search with a winner, /searches/two, and its status."""
    folder = tmp_path_factory.mktemp("confirmed")
    made.search(folder, "two", made.two_objectives())
    with Store.open(folder / "two" / "search.db") as store:
        status = status_of(store)
    with client_of(make_app(folder), accept="text/html") as found:
        yield found, status


class Seen(HTMLParser):
    """What a page is made of: its text, headings, addresses, and what must not be there."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.headings: list[int] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.inline_scripts = 0
        self.rows = 0
        self._in_script = self._in_template = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.handlers += [name for name in values if name.startswith("on")]
        self.addresses += [str(values[name]) for name in ("href", "src", "action") if name in values]
        self._in_template = self._in_template or tag == "template"
        self.ids += [str(values["id"])] if "id" in values and not self._in_template else []
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.rows += tag == "tr" and "data-key" in values
        if tag == "script" and "src" not in values and values.get("type") != "application/json":
            self.inline_scripts += 1
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False
        self._in_template = self._in_template and tag != "template"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._in_script else data


def seen(client: TestClient, path: str) -> Seen:
    return Seen(client.get(path).text)


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_well_made_and_loads_nothing_from_elsewhere(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == (404 if path == "/nothing" else 200)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    page = Seen(response.text)
    assert page.handlers == []
    assert page.inline_scripts == 0
    assert all(address.startswith(("/", "#")) and not address.startswith("//") for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert page.headings.count(1) == 1
    assert page.headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(page.headings))


def test_links_of_a_page_lead_somewhere(client: TestClient) -> None:
    ours = {a.split("#")[0] for path in PAGES for a in seen(client, path).addresses}
    kinds = {re.sub(r"\d+", "0", address): address for address in ours}  # one candidate stands for all
    others = {"", "/dashboard/", "/logout", "/api/v1/openapi.json"}  # which have tests of their own
    for address in sorted(set(kinds.values()) - others):
        assert client.get(address).status_code == 200, address


def test_the_page_of_a_search_says_what_the_store_says(client: TestClient, root: Path) -> None:
    with Store.open(root / NAME / "search.db") as store:
        best = store.best("o0", maximise=True)[0]
        counts = store.counts()
    text = seen(client, SEARCH).text
    assert f"{best.objectives['o0'].mean:.3f} ± {best.objectives['o0'].stderr:.3f}" in text
    assert f"{counts['done']} scored" in text
    assert "finished" in text
    assert "uniform average" in text


def test_the_winner_and_the_best_in_search_are_told_apart(confirmed: tuple[TestClient, SearchStatus]) -> None:
    client, status = confirmed
    chosen = {pick.role: pick.id for pick in status.picks}
    assert (status.winner, list(chosen)) == (None, ["best at o0", "best at o1", "knee"])
    offered = choices(status)
    assert offered[0].id == chosen["knee"]
    for role, name in chosen.items():
        assert name in {each.id for each in offered if role in each.text}
    for path in ("/searches/two", "/searches/two/candidates/5"):
        assert offered[0].text in seen(client, path).text
    assert f'value="{chosen["knee"]}"' in client.get("/searches/two/compare").text
    assert "Resume" not in seen(client, "/searches/two").text


def test_the_tile_of_a_confirmed_search_says_the_gain_with_its_interval(
    confirmed: tuple[TestClient, SearchStatus],
) -> None:
    client, status = confirmed
    (knee,) = [each for each in status.confirmed if each.id == status.picks[-1].id]
    for name in status.directions:
        value, limits = gain_text(knee, status, name).split(" over ")[0].replace("-", "\N{MINUS SIGN}").split(" [")
        low, high = limits.rstrip("]").split(", ")
        told = rf"{re.escape(value)}\s*{re.escape(low)} to {re.escape(high)}"
        assert re.search(told, seen(client, "/searches/two").text)


def test_before_the_confirmation_the_gain_is_said_to_be_of_the_search_split(client: TestClient) -> None:
    told = r"Over the best source\s*[+−]0\.\d{3}\s*o0\s*[+−]0\.\d{3}\s*o1\s*on the search split"
    assert re.search(told, seen(client, SEARCH).text)


def test_a_caption_counts_what_of_the_front_is_shown(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(root / NAME / "search.db") as store:
        status = status_of(store)
    front, baselines = set(status.front), {each.id for each in status.baselines}
    rows = list(pages_search._rows(status))
    assert front <= {row.entry.id for row in rows}
    assert pages_search._caption(status, rows).endswith("and the front")
    monkeypatch.setattr(pages_search, "MAX_ON_FRONT", 1)
    rows = list(pages_search._rows(status))
    shown = sum(row.entry.id in front for row in rows)
    assert 0 < shown <= len(front & baselines | set(status.best_by_role.values())) < len(front)
    assert f"{shown} of {len(front)} on the front" in pages_search._caption(status, rows)


@pytest.mark.parametrize(
    ("state", "driver", "made", "budget", "verbs"),
    [
        ("finished", False, True, 30, []),
        ("finished", False, True, 31, [("resume", "Resume")]),
        ("finished", False, False, 30, [("resume", "Confirm")]),
        ("starting", False, False, 40, []),
        ("starting", True, False, 40, [("pause", "Pause"), ("stop", "Stop"), ("cancel", "Cancel")]),
        ("stopped", False, False, 40, [("resume", "Resume"), ("confirm", "Confirm")]),
        ("stopped", False, True, 40, [("resume", "Resume"), ("confirm", "Confirm")]),
        ("interrupted", False, True, 40, [("resume", "Resume"), ("confirm", "Confirm")]),
        ("paused", True, False, 40, [("resume", "Resume"), ("stop", "Stop"), ("cancel", "Cancel")]),
        ("running", True, False, 40, [("pause", "Pause"), ("stop", "Stop"), ("cancel", "Cancel")]),
    ],
)
def test_only_what_would_do_something_is_offered(
    state: str, driver: bool, made: bool, budget: int, verbs: list[tuple[str, str]]
) -> None:
    best = CandidateName(id="c0005", number=5, label="", objectives={})
    summary = SearchSummary.unreadable("x", "").model_copy(update={"state": state, "driver": driver, "best": best})
    summary.counts.asked, summary.budget = 30, record.Budget(candidates=budget)
    assert [(verb, text) for verb, text, _ in pages_search._verbs(summary, made)] == verbs


def test_the_table_says_how_many_there_are(client: TestClient) -> None:
    assert "25 of 30 candidates, sorted by number" in seen(client, SEARCH).text
    assert "2 that match" in seen(client, f"{SEARCH}?origin=source").text


def test_the_table_of_candidates_is_filtered_sorted_and_paged_as_the_api_does(client: TestClient) -> None:
    def numbers(path: str) -> list[int]:
        return [int(found) for found in re.findall(r'data-key="(\d+)/', client.get(path).text)]

    assert numbers(SEARCH) == list(range(29, 4, -1))
    (following,) = {a for a in seen(client, SEARCH).addresses if "cursor=" in a}
    assert numbers(following) == list(range(4, -1, -1))
    api = client.get(f"/api/v1{SEARCH}/candidates", params={"sort": "o1", "status": "done", "limit": 25}).json()
    expected = [each["number"] for each in api["candidates"]]
    assert numbers(f"{SEARCH}?sort=o1&order=asc&status=done") == expected
    assert numbers(f"{SEARCH}?origin=source") == [1, 0]


def test_a_candidate_shows_its_recipe_its_genome_and_whom_it_beat(client: TestClient, root: Path) -> None:
    with Store.open(root / NAME / "search.db") as store:
        row, scores = store.candidate(12), store.scores(12, "search")
        sources = {r.label: r.objectives["o0"].mean for r in store.candidates() if r.origin == "source"}
        best = max(sources, key=sources.__getitem__)
        theirs = store.scores(list(sources).index(best), "search")
    page = seen(client, f"{SEARCH}/candidates/12").text
    assert row.genome is not None
    assert all(f"{number:.4f}" in page for number in row.genome.tolist())
    assert "method: task_arithmetic" in page
    mine, other = scores[0].metrics["acc"], theirs[0].metrics["acc"]
    assert f"Won: {int((mine > other).sum())}" in page
    assert f"Lost: {int((mine < other).sum())}" in page


@pytest.mark.parametrize("name", ["12", "c12", "c0012", "0012"])
def test_a_candidate_goes_by_its_number_and_by_its_id(client: TestClient, name: str) -> None:
    assert ">c0012<" in client.get(f"{SEARCH}/candidates/{name}").text


@pytest.mark.parametrize("name", ["c", "C12", "12c", "-1", "c-1", "1e1", "\u0661", "c" + "9" * 30, "c%00", "best"])
def test_what_is_no_candidate_is_refused(client: TestClient, name: str) -> None:
    assert client.get(f"{SEARCH}/candidates/{name}").status_code == 422


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('{"level": 3, "prompt": "1 + 1?", "text": "t"}', [("prompt", "1 + 1?"), ("level", "3"), ("text", "t")]),
        ('{"prompt": ["x"], "input": "i"}', [("input", "i"), ("prompt", '["x"]')]),
        ('{"question": "1 + 1?\\nSay.", "level": 3}', [("question", "1 + 1?\nSay."), ("level", "3")]),
        ('{"choices": ["a", "b"], "empty": ""}', [("choices", '["a", "b"]'), ("empty", "")]),
        ('{"nested": {"é": null}}', [("nested", '{"é": null}')]),
        ("{}", []),
        ("[1, 2]", []),
        ("{question}", []),
        ("{" * 100_000, []),
        ("plain", []),
    ],
)
def test_the_fields_of_a_record(text: str, fields: list[tuple[str, str]]) -> None:
    assert fields_of(text) == fields


def test_items_of_a_python_function_are_shown_field_by_field(tmp_path: Path) -> None:
    """Those of other evaluators are shown as they are, also where a prompt is JSON."""
    record = json.dumps({"question": "Q <1>", "answer": ["x"]})
    for name, evaluator in (("records", "python"), ("prompts", "likelihood")):
        folder = make_search(tmp_path, name, candidates=8)
        with Store.open(folder / "search.db") as store, store.transaction(writes=True) as connection:
            wanted = store_settings(store) | {"objectives": {"o0": {"evaluator": evaluator}, "o1": {}}}
            connection.execute(update(tables.search).values(settings=wanted))
            row = {"search_id": store.search_id, "evaluator": "v0", "split": "search"}
            connection.execute(insert(tables.item).values(**row, texts=json.dumps([[record, ""]] * 40)))
    with client_of(make_app(tmp_path), accept="text/html") as client:
        shown = client.get("/searches/records/compare?a=c0005&b=c0006").text
        assert '<dt>question</dt><dd class="lines">Q &lt;1&gt;</dd>' in shown
        assert "<dt>answer</dt>" in shown
        shown = client.get("/searches/prompts/compare?a=c0005&b=c0006").text
        assert "<dt>question</dt>" not in shown
        assert "{&#34;question&#34;" in shown


def test_niches_are_a_grid_and_columns(tmp_path: Path) -> None:
    helpers_figures.search(tmp_path, "niches", test_elites.setup_of(niches=False, candidates=12), test_elites.simulate)
    with Store.open(tmp_path / "niches" / "search.db") as store:
        number = next(row.number for row in store.candidates() if row.elite)
    with client_of(make_app(tmp_path), accept="text/html") as client:
        shown = client.get("/searches/niches").text
        assert 'id="grid-figure"' in shown
        assert ">length</th>" in shown.replace("\n", "")
        assert "length" in client.get(f"/searches/niches/candidates/c{number:04d}").text
        found = client.get(f"/api/v1/searches/niches/candidates/{number}").json()
        assert (found["elite"], len(found["niche"])) == (True, 2)
        assert client.get("/api/v1/searches/niches/figures/grid").json()["data"][0]["type"] == "heatmap"


def test_a_team_is_a_matrix_and_tables_on_the_page_and_in_the_report(tmp_path: Path) -> None:
    helpers_figures.search(tmp_path, "team", helpers_figures.two_objectives(30))
    with client_of(make_app(tmp_path), accept="text/html") as client:
        shown = client.get("/searches/team").text
        assert f"evomerge team {tmp_path / 'team'} -k 3" in shown
        assert 'data-figure="/api/v1/searches/team/figures/team"' not in shown
        with Store.open(tmp_path / "team" / "search.db") as store, acquire(store):
            store.record_event(TeamChosen(candidates=[0, 1], curve=[(5, 0.4, 0.3), (30, 0.7, 0.35)]))
            team = team_of(store)
        assert team is not None
        shown, report = client.get("/searches/team").text, client.get("/searches/team/report.html").text
    assert 'data-figure="/api/v1/searches/team/figures/team"' in shown
    assert '<a href="/searches/team/candidates/c0001">c0001</a>' in shown
    assert f"evomerge export {tmp_path / 'team'} MODELS --team" in shown
    for page in (shown, report):
        assert f"{100 * team.coverage:.1f}% are solved by at least one member" in page
        share = team.against["its best member"]
        assert f"{share.low:+.3f} to {share.high:+.3f}" in page
    assert "Team, as the search went on" in report


def store_settings(store: Store) -> dict[str, Any]:
    return store.search().settings


def test_a_search_that_is_stopped_can_be_confirmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(processes, "start", lambda arguments, *rest, **more: started.append(arguments))
    folder = make_search(tmp_path, "stopped", candidates=8)
    with client_of(make_app(tmp_path)) as found:
        with Store.open(folder / "search.db") as store, acquire(store):
            assert found.post("/api/v1/searches/stopped/confirm").status_code == 409  # its driver is at work
            assert started == []
            store.set_state("stopped")
        assert found.post("/api/v1/searches/stopped/confirm").status_code == 202
    assert [each[-2:] for each in started] == [["confirm", str(folder)]]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/searches/nothing", 404, "There is no such search"),
        (f"{SEARCH}/candidates/99", 404, "c0099 is not a candidate"),
        (f"{SEARCH}?sort=nonsense", 422, "nonsense"),
        (f"{SEARCH}?status=nonsense", 422, "The request is not valid"),
        (f"{SEARCH}/compare?a=best&b=nobody", 200, "nobody is not a candidate of this search"),
        ("/nothing", 404, "There is no such page"),
    ],
)
def test_faults_are_pages_for_people_and_problems_for_programs(
    client: TestClient, path: str, status: int, words: str
) -> None:
    response = client.get(path)
    assert (response.status_code, words in Seen(response.text).text) == (status, True)
    if status != 200:
        problem = client.get(path, headers={"accept": "application/json"})
        assert problem.headers["content-type"] == "application/problem+json"
        assert problem.json()["status"] == status


def test_what_broke_is_not_told(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr("evomerge.service.pages.search.summaries_of", broken)
    with TestClient(app, headers=BEARER | {"accept": "text/html"}, raise_server_exceptions=False) as client:
        response = client.get("/")
    assert response.status_code == 500
    assert "Something broke here" in response.text
    assert "secret" not in response.text


def test_without_a_search_the_page_says_how_to_start_one(tmp_path: Path) -> None:
    with client_of(make_app(tmp_path), accept="text/html") as client:
        page = seen(client, "/")
    assert "No search yet" in page.text
    assert f"evomerge search search.yaml --dir {tmp_path}/NAME" in page.text


def test_whoever_has_no_token_is_sent_to_the_login_and_back(root: Path) -> None:
    with TestClient(make_app(root), headers={"accept": "text/html"}, follow_redirects=False) as client:
        sent = client.get(f"{SEARCH}/compare?a=best")
        assert sent.status_code == 303
        form = client.get(sent.headers["location"])
        assert form.status_code == 200
        assert f'value="{SEARCH}/compare?a=best"' in form.text
        assert "not the token of this server" in client.get("/login?failed=1").text


# ---- the form against the classes that it writes for -----------------------------------------------------------------


def test_the_form_knows_every_method_and_optimizer() -> None:
    (method,) = (field for field in forms.spaces()[0].fields if field.key == "method")
    assert set(method.options) >= set(METHODS)
    assert set(forms.sections()["optimizer"][0].options) >= OWN["evomerge.optimizers"].keys()


def test_the_form_writes_keys_that_the_search_file_knows() -> None:
    for group in forms.spaces():
        kind = find_class("evomerge.search_spaces", group.name, "space.kind", SpaceSettings)
        defaults = {"kind": group.name} | {field.key: field.default for field in group.fields if field.default}
        kind.model_validate(defaults)
        assert {field.key.partition(".")[0] for field in group.fields} <= set(kind.model_fields)
        for field in group.fields:
            section, _, key = field.key.partition(".")
            for option in filter(None, (*field.options, *([field.example] if key else []))):
                kind.model_validate(defaults | {section: {key: option} if key else option})
    assert forms.SEVERAL in forms.sections()["optimizer"][0].options


def test_the_form_has_what_the_sections_of_the_search_file_have() -> None:
    fields = {field.key: field for part in forms.sections().values() for field in part}
    whole = {
        "budget": Budget, "racing": Racing, "confirm": Confirm, "calibration": CalibrationTexts, "select": Select,
    }  # fmt: skip
    expected = {f"{name}.{key}" for name, section in whole.items() for key in section.model_fields}
    some = {"optimizer.name", "optimizer.population", "start_from", "pool", "cluster.workers"}
    proxy = {"file", "held_out_file", "prompt", "answer", "apply_chat_template", "drawn", "steps", "rate"}
    fit = {"file", "prompt", "answer", "apply_chat_template", "items", "drawn", "steps", "rate"}
    sections = {f"proxy.{key}" for key in proxy} | {f"fit.{key}" for key in fit}
    assert set(fields) == expected | some | sections
    assert proxy <= Proxy.model_fields.keys() | LikelihoodSettings.model_fields.keys()
    assert fit <= FitItems.model_fields.keys() | LikelihoodSettings.model_fields.keys()
    assert set(forms._WORDS) <= set(fields)
    assert not any(field.required for field in fields.values())
    kinds = {
        "racing.rungs": "numbers",
        "racing.confidence": "number",
        "calibration.file": "text",
        "calibration.sources": "pairs",
    }
    assert {key: fields[key].kind for key in kinds} == kinds
    assert fields["calibration.tokens"].example == "512"
    assert fields["racing.estimate"].options == ("", "baseline", "item_response")


@pytest.mark.parametrize("group", forms.evaluators(), ids=lambda group: group.name)
def test_the_form_writes_keys_that_the_evaluator_knows(group: forms.Group) -> None:
    fields = evaluator_settings(group.name, "evaluator").model_fields
    for field in group.fields:
        assert field.key == "metric" or field.key in fields
        for option in field.options:
            if field.key != "metric":
                assert option in get_args(fields[field.key].annotation)


# ---- small parts -----------------------------------------------------------------------------------------------------

KEYS = st.text("abcdefghij_-", min_size=1, max_size=6)
CONTENT = st.recursive(
    st.integers() | st.text("xyz: #'\"\n", max_size=12) | st.booleans() | st.lists(st.integers(), max_size=3),
    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=4),
    max_leaves=12,
)


def paths(content: Any, path: str = "") -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            inner = f"{path}.{key}" if path else key
            yield inner
            yield from paths(value, inner)


@given(st.dictionaries(KEYS, CONTENT, min_size=1, max_size=4))
def test_the_line_of_a_fault_is_the_one_that_holds_its_key(content: dict[str, Any]) -> None:
    text = dump_yaml(content)
    lines = text.splitlines()
    for path in paths(content):
        line = place_of(text, f"search file: {path}").line
        key = path.rpartition(".")[2]
        assert re.search(rf"(^|[\s{{'\"]){re.escape(key)}['\"]?:", lines[line - 1])


FILE = """\
name: x
objectives:
  first:
    task: mini_math_ja
    metric: acc
    held_out: test
  second:
    file: items.jsonl
"""


@pytest.mark.parametrize(
    ("text", "field", "line"),
    [
        ("a: 1\nb:\n  c: 2\n", "search file: b.c", 3),
        ("a: 1\nb:\n  c: 2\n", "b.missing", 2),
        ("a: 1\n", "nothing.at.all", 0),
        ("a: [\n", "search file, line 2", 2),
        ("a: [\n", "a", 0),
        ("", "a", 0),
        ("- 1\n", "a", 0),
        ("a: &x {b: *x}\n", "a.b.b", 1),
        (FILE, "task mini_math_ja: held_out", 6),
        (FILE, "task mini_math_ja: search", 3),  # which is not there: the objective
        (FILE, "task mini_math_ja", 4),
        (FILE, "task mini_math_ja, row 3 of 'validation'", 4),
        (FILE, "task nothing: held_out", 0),
        (FILE, "objectives.second: file", 8),
        (FILE, "search file: objectives.first.metric", 5),
    ],
)
def test_lines(text: str, field: str, line: int) -> None:
    assert place_of(text, field).line == line


def test_the_keys_of_a_fault_lead_to_the_objective_on_the_task() -> None:
    assert place_of(FILE, "task mini_math_ja: held_out").path == ("objectives", "first", "held_out")
    assert place_of(FILE, "task mini_math_ja").path == ("objectives", "first", "task")


def comparison(**changes: Any) -> Comparison:
    found = {
        "objective": "maths", "split": "held_out", "n": 500, "wanted": 500, "a": 0.6, "b": 0.5, "difference": 0.1,
        "confidence": 0.95, "low": 0.05, "high": 0.15, "better_a": 80, "better_b": 30, "p": 0.0001,
    }  # fmt: skip
    return Comparison.model_validate(found | changes)


def test_a_comparison_in_words() -> None:
    assert sentence(comparison(), "c0007", "ja") == (
        "maths, on 500 held-out items: c0007 is 0.100 better than ja, 95% interval +0.050 to +0.150. "
        "It won 80 items and lost 30 (p < 0.001)."
    )
    assert "It won 1 item and lost 30" in sentence(comparison(better_a=1), "c0007", "ja")
    unsure = sentence(comparison(difference=-0.1, low=-0.3, high=0.1, split="search"), "c0007", "ja")
    assert "on 500 search items: c0007 is 0.100 worse than ja" in unsure
    assert "That may be luck" in unsure
    assert "c0007 and ja score the same" in sentence(comparison(difference=0.0), "c0007", "ja")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.none() | st.floats(-1e6, 1e6))
def test_a_sparkline_stays_in_its_box_and_rises_where_the_numbers_do(points: list[float], source: float | None) -> None:
    found = sparkline(points, source)
    assert found is not None
    heights = [float(each) for each in re.findall(r"V([\d.]+)H", found["line"])]
    assert len(heights) == len(points)
    assert all(0 <= each <= 30 for each in heights)
    for (a, b), (y, z) in zip(pairwise(points), pairwise(heights), strict=True):
        assert (a < b and z <= y) or (a > b and z >= y) or a == b
    assert (found["source"] != "") == (source is not None)


def test_nothing_makes_no_sparkline() -> None:
    assert sparkline([], 0.5) is None


# ---- model cards -----------------------------------------------------------------------------------------------------


def test_a_card_is_read_as_headings_tables_and_front_matter() -> None:
    text = (
        "---\nlicense: mit\n---\n# Made\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n![curve](curve.svg) [web](https://x.y/)\n"
    )
    card = card_of(text, "/files/")
    assert card is not None
    assert card.front == "license: mit"
    assert "<h4>Made</h4>" in card.body
    assert "<td>1</td>" in card.body
    assert '<a href="/files/curve.svg">curve</a>' in card.body
    assert '<a href="https://x.y/" rel="noreferrer noopener">web</a>' in card.body
    assert card_of("", "/files/") is None


class Tags(HTMLParser):
    """The tags of a text with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


PIECES = st.sampled_from(
    ["<script>", "<img src=x onerror=y>", "[a](javascript:b)", "![a](javascript:b)", "[a](//b.c)", "<a href=x>", "\n",
     "[a](../..)", "[a]: data:text/html,b", "[a]", "![](x 'onerror=y')", "<javascript:a>", "`", "|", "#", "**", '"']
)  # fmt: skip


@given(st.lists(PIECES | st.text(max_size=4), max_size=12))
def test_a_card_holds_no_html_and_no_address_of_its_own(pieces: list[str]) -> None:
    card = card_of("".join(pieces) or "x", "/files/")
    assert card is not None
    for tag, attributes in Tags(card.body).found:
        assert tag not in ("script", "img", "iframe", "style", "form", "svg")
        assert set(attributes) <= {"href", "rel", "class", "start", "style"}
        assert attributes.get("style") in (None, "text-align:left", "text-align:right", "text-align:center")
        address = attributes.get("href") or "#"
        assert address.startswith(("#", "http://", "https://", "/files/"))


def test_the_line_of_a_fault_is_answered(client: TestClient) -> None:
    file = "name: x\nspace:\n  method: nonsense\n"
    found = client.post("/new/line", json={"file": file, "field": "search file: space.method"})
    assert found.json() == {"line": 3, "path": ["space", "method"]}
