"""The report of a search in a real browser without a network, and optuna-dashboard behind the service."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import helpers_figures as made
import pytest
from fastapi import FastAPI
from helpers_browser import open_browser
from helpers_search import make_setup
from helpers_service import serving
from helpers_tiers import nightly_but
from playwright.sync_api import Browser, Page, expect
from starlette.testclient import TestClient

from evomerge.cli import main
from evomerge.report.status import status_of
from evomerge.report.svg import COLOURS
from evomerge.service import dashboard
from evomerge.service.dependencies import ServiceSettings
from evomerge.service.guard import CONTENT_POLICY
from evomerge.service.report import commands, report_html
from evomerge.service.root import Root
from evomerge.store import Store, acquire


def packed_plotly() -> str:
    """The script of plotly as a report holds it."""
    script = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(script, 9, mtime=0)).decode()


TIMEOUT_MS = 200_000  # for a machine that is busy with something else


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    made.search(folder, "two", made.two_objectives())
    made.search(folder, "paths", made.paths(), made.path_scores)
    made.search(folder, "failing", make_setup(candidates=20), made.failing)
    made.create(folder, "empty", make_setup(objectives=2))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


@pytest.fixture(scope="module")
def written(root: Path) -> str:
    """The address of a report on disk."""
    assert evomerge("report", root / "two", "--out", root / "report.html") == 0
    return (root / "report.html").as_uri()


@contextmanager
def page(browser: Browser, **options: Any) -> Iterator[tuple[Page, list[str], list[str]]]:
    """A page, what it complains of, and what it asks for."""
    context = browser.new_context(**options)
    shown, complaints, asked = context.new_page(), [], []
    shown.set_default_timeout(TIMEOUT_MS)
    shown.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("request", lambda request: asked.append(request.url))
    try:
        yield shown, complaints, asked
    finally:
        context.close()


def evomerge(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("name", nightly_but(["two"], ["two", "paths", "failing", "empty"]))
def test_a_report_opens_from_disk_in_light_and_dark_and_on_a_phone_with_no_network(
    root: Path, browser: Browser, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "report.html"
    assert evomerge("report", root / name, "--out", out) == 0
    with page(browser, offline=True, color_scheme="light", viewport={"width": 375, "height": 700}) as found:
        shown, complaints, asked = found
        shown.goto(out.as_uri())
        shown.wait_for_function("document.documentElement.dataset.drawn === 'yes'")
        boxes = shown.locator(".figure")
        assert (boxes.count() > 0) == (name != "empty")
        assert shown.locator(".figure .main-svg").count() >= boxes.count()
        assert shown.evaluate("document.documentElement.scrollWidth") <= 375
        inks = [_check_ink(shown)]
        shown.emulate_media(color_scheme="dark")
        inks.append(_check_ink(shown))
        assert inks[0] != inks[1]
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def _check_ink(shown: Page) -> str:
    """The colour of the page's text, which is that of the figures' text."""
    ink = _hex(shown.locator("body").evaluate("(body) => getComputedStyle(body).color"))
    shown.wait_for_function(
        "(ink) => [...document.querySelectorAll('.figure')].every((box) => box.layout.font.color === ink)", arg=ink
    )
    return ink


def _hex(colour: str) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)[:3])


def test_a_report_says_what_the_store_holds(root: Path) -> None:
    with Store.open(root / "two" / "search.db") as store:
        html, status = report_html(store, root / "two"), status_of(store)
        best = store.best("o0", maximise=True, k=1)[0]
    text = " ".join(re.sub(r"<script.*?</script>|<style.*?</style>", "", html, flags=re.S).split())
    assert html.count("<script>") == 1  # what draws; plotly is packed
    assert html.count(packed_plotly()) == 1
    assert len(html) < 2_500_000
    for pick in status.picks:
        assert f"<dt>{pick.role}</dt><dd><strong>{pick.id}</strong>" in text
    assert "A front has no one winner." in text
    estimate = best.objectives["o0"]
    assert f"{estimate.mean:.3f} ± {estimate.stderr:.3f}" in text
    for found in status.confirmed:
        for gap in found.objectives["o0"].difference:
            row = f'<td>o0</td><td>{gap.to}</td><td class="number">{gap.mean:+.3f}</td>'
            assert row in text
            assert f"[{gap.low:+.3f}, {gap.high:+.3f}]" in text
    assert status.choice is not None
    assert f"The shortlist of {status.choice.shortlist} was written down at" in text
    assert "granularity: layer" in text
    assert "<dt>cma</dt><dd>4.5</dd>" in text


def test_commands_name_the_folder_so_that_a_shell_takes_it(root: Path) -> None:
    with Store.open(root / "two" / "search.db") as store:
        status = status_of(store)
    told = dict(commands(Path("my searches/two"), status))
    assert told["Run the same search again"] == "evomerge search 'my searches/two/search.yaml' --dir two-again"
    assert told["Write the model"] == f"evomerge export 'my searches/two' two-model --candidate {status.picks[-1].id}"
    assert (
        told["Score that model again on held-out items"]
        == "evomerge score two-model 'my searches/two/search.yaml' --split held_out"
    )


def test_failures_are_in_a_table_and_escaped(root: Path) -> None:
    with Store.open(root / "failing" / "search.db") as store:
        html, events = report_html(store, root / "failing"), store.events(kinds=("failure", "confirm failed"))
    assert "layer 3 holds &lt;b&gt;NaN&lt;/b&gt;" in html
    assert html.count('class="bad"') == len(events)


def test_names_cannot_leave_their_place(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    folder = made.search(tmp_path, "named", make_setup(candidates=5))
    with Store.open(folder / "search.db") as store:
        with acquire(store):
            store.update_settings(
                store.search().settings | {"sources": {**store.search().settings["sources"], evil: ""}}
            )
        html = report_html(store, Path(evil))
    assert "<script>alert" not in html


def test_a_path_is_drawn_where_there_is_one(root: Path) -> None:
    with Store.open(root / "paths" / "search.db") as store:
        assert 'class="evomerge-path"' in report_html(store, root / "paths")
    with Store.open(root / "two" / "search.db") as store:
        assert 'class="evomerge-path"' not in report_html(store, root / "two")


def test_held_out_scores_are_the_baselines_and_then_the_best_first(root: Path) -> None:
    with Store.open(root / "two" / "search.db") as store:
        html, status = report_html(store, root / "two"), status_of(store)
    table = html.partition("Confirmed on held-out items</h2>")[2].partition("</table>")[0]
    best = sorted(status.confirmed, key=lambda each: -each.objectives["o0"].mean)
    expected = [each.id for each in [*status.confirmed_baselines, *best]]
    assert re.findall(r'<th scope="row">(c\d+)', table) == expected


def test_on_a_phone_every_row_of_the_held_out_table_is_seen(written: str, browser: Browser) -> None:
    with page(browser, viewport={"width": 390, "height": 800}) as (shown, _, _):
        shown.goto(written)
        rows = shown.locator("table").first.locator("tbody tr")
        line = shown.locator("body").evaluate("(body) => parseFloat(getComputedStyle(body).lineHeight)")
        for row in rows.all():
            place = row.locator("td").first.bounding_box()
            assert place is not None
            assert place["height"] <= 4 * line
            assert place["x"] < 390


@pytest.mark.nightly
def test_on_paper_all_is_open_light_and_as_wide_as_the_page(written: str, browser: Browser) -> None:
    with page(browser, color_scheme="dark", viewport={"width": 1400, "height": 800}) as (shown, _, _):
        shown.goto(written)
        shown.wait_for_function("document.documentElement.dataset.drawn === 'yes'")
        assert shown.locator("details[open]").count() == 0
        shown.evaluate(
            """() => addEventListener('beforeprint', () => {
                window.printed = {
                    closed: document.querySelectorAll('details:not([open])').length,
                    widths: [...document.querySelectorAll('.figure')].map((box) => box._fullLayout.width),
                    inks: [...document.querySelectorAll('.figure')].map((box) => box.layout.font.color),
                };
            })"""
        )
        assert shown.pdf(format="A4")[:4] == b"%PDF"
        printed = shown.evaluate("window.printed")
        assert printed["closed"] == 0
        assert set(printed["widths"]) == {340, 696}
        assert set(printed["inks"]) == {"#1f2328"}
        assert shown.locator("details[open]").count() == 0


def test_a_dark_report_has_the_palette_of_the_dark(written: str, browser: Browser) -> None:
    with page(browser, color_scheme="dark") as (shown, _, _):
        shown.goto(written)
        shown.wait_for_function("document.documentElement.dataset.drawn === 'yes'")
        drawn = shown.evaluate("JSON.stringify([...document.querySelectorAll('.figure')].map((box) => box.data))")
    light, dark = zip(*COLOURS, strict=True)
    assert any(colour in drawn for colour in dark)
    assert not any(colour in drawn for colour in light)


def test_a_report_that_cannot_be_written_says_so_and_leaves_the_old_one(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "report.html"
    old.mkdir()
    assert evomerge("report", root / "two", "--out", old) == 2
    assert evomerge("report", root / "two", "--out", tmp_path / "none" / "report.html") == 2
    assert evomerge("report", tmp_path, "--out", tmp_path / "x.html") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


# ---- optuna-dashboard ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app(root: Path) -> FastAPI:
    found = FastAPI(openapi_url=None)
    found.state.settings = ServiceSettings(Root.of(str(root), root), None)
    dashboard.install(found, Root.of(str(root), root))
    return found


def test_the_dashboards_own_requests_are_answered(app: FastAPI, root: Path) -> None:
    with TestClient(app) as client:
        studies = client.get("/api/studies").json()["study_summaries"]
        assert {study["study_name"] for study in studies} == {"two", "paths", "failing", "empty"}
        number = next(study["study_id"] for study in studies if study["study_name"] == "two")
        detail = client.get(f"/api/studies/{number}").json()
        with Store.open(root / "two" / "search.db") as store:
            rows = [row for row in store.candidates() if row.status == "done" and row.genome is not None]
        assert [trial["number"] for trial in detail["trials"]] == [row.number for row in rows]
        assert [trial["values"] for trial in detail["trials"]] == [
            [row.objectives[name].mean for name in ("o0", "o1")] for row in rows
        ]
        for path in (
            "/dashboard", "/dashboard/studies/0", "/dashboard/static/bundle.js", "/api/meta",
            f"/api/studies/{number}/param_importances", f"/api/studies/{number}/plot/slice", f"/csv/{number}",
        ):  # fmt: skip
            assert client.get(path).status_code == 200, path


def test_the_dashboard_can_only_be_read(app: FastAPI, root: Path) -> None:
    before = (root / "two" / "search.db").read_bytes()
    with TestClient(app) as client:
        assert client.post("/api/studies", json={"study_name": "x", "directions": ["minimize"]}).status_code == 405
        assert client.delete("/api/studies/0").status_code == 405
        assert client.put("/api/studies/0/note", json={}).status_code == 405
        assert client.post("/api/trials/0/tell", json={}).status_code == 404
        assert client.get("/artifacts/0/0").status_code == 404
        assert client.get("/dashboard/static/../index.html").status_code in (200, 404)  # the page itself, or nothing
        assert "DASHBOARD = " not in client.get("/dashboard/static/%2e%2e%2f_app.py").text
        assert len(client.get("/api/studies").json()["study_summaries"]) == 4
    assert (root / "two" / "search.db").read_bytes() == before


def test_the_dashboard_works_in_a_browser_under_its_policy(app: FastAPI, browser: Browser) -> None:
    with serving(app) as url, page(browser) as (shown, complaints, asked):
        failed: list[str] = []
        shown.on("response", lambda r: failed.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        answer = shown.goto(f"{url}/dashboard")
        assert answer is not None
        assert answer.headers["content-security-policy"] == CONTENT_POLICY
        studies = shown.get_by_text(re.compile(r"^\d+\. two$"))
        studies.wait_for()
        assert not shown.get_by_role("button", name=re.compile("create|rename|delete", re.IGNORECASE)).count()
        expect(shown.get_by_role("link", name="Evomerge")).to_have_attribute("href", "/")
        expect(shown.locator("#evomerge")).to_contain_text("read-only")
        studies.click()
        shown.wait_for_url("**/dashboard/studies/*")
        study = shown.url.rstrip("/")
        shown.locator(".js-plotly-plot .main-svg").first.wait_for()
        shown.goto(f"{study}/analytics")
        shown.locator(".js-plotly-plot .contour, .js-plotly-plot .contourlayer").first.wait_for(state="attached")
        shown.goto(f"{study}/trials")
        shown.get_by_text("Trial 0", exact=False).first.wait_for()
    assert failed == []
    assert [
        text for text in complaints if "Content Security Policy" in text or "Failed" in text or "eval" in text
    ] == []
    assert {url_ for url_ in asked if not url_.startswith((url, "data:", "blob:"))} == set()
    assert json.dumps(asked).count("/api/v1") == 0
