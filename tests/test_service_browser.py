"""The pages in a real browser: how they look to people and to assistive tools, that no text runs, and a whole walk."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from fastapi import FastAPI
from helpers_service import NAME, TOKEN, make_search
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Playwright,
    Request,
    expect,
    sync_playwright,
)
from sqlalchemy import insert, update

from evomerge.service.app import ServiceSettings, create_app
from evomerge.service.root import Root
from evomerge.store import Store, tables
from evomerge.yaml import load_yaml

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
WALK_MS = 90_000  # for what imports torch, beside other tests on a small machine

SEARCH = f"/searches/{NAME}"
PAGES = {
    "searches": "/",
    "search": SEARCH,
    "candidate": f"{SEARCH}/candidates/12",
    "compare": f"{SEARCH}/compare?a=best&b=one",
    "exports": f"{SEARCH}/exports",
    "new": "/new",
    "login": "/login",
    "fault": "/searches/nothing",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's browser; ``scripts/test`` installs it. A test without one fails rather than being left out."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    assert found is not None, "there is no Chromium: apt-get install chromium-headless-shell"
    with sync_playwright() as playwright:
        browser = launched(playwright, found)
        yield browser
        browser.close()


def launched(playwright: Playwright, path: str) -> Browser:
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app on a port of its own, in a thread; its address."""
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=20)


def app_of(root: Path, *sources: Path) -> FastAPI:
    return create_app(ServiceSettings(Root.of(str(root), root), TOKEN, sources=sources))


@dataclass
class Watched:
    """A page with all that went wrong on it: errors of the console, dialogs, requests to elsewhere."""

    page: Page
    address: str
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("request", self._request)

    def go(self, path: str) -> Page:
        self.page.goto(self.address + path)
        return self.page

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and "404" not in message.text:  # of the page that is a fault itself
            self.faults.append(message.text)

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.faults.append(f"asked for {request.url}")


def watched(context: BrowserContext, address: str) -> Watched:
    found = Watched(context.new_page(), address)
    found.go(f"/?token={TOKEN}")
    return found


def settle(page: Page) -> None:
    """Wait until every figure of a page is drawn, or has said why it is not; those further down as they are reached."""
    for figure in page.locator(".figure").all():
        figure.scroll_into_view_if_needed()
        expect(figure.locator(".main-svg, .waiting:not(:text-is('…'))").first).to_be_attached(timeout=30_000)
    page.evaluate("window.scrollTo(0, 0)")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a finished made-up search."""
    root = tmp_path_factory.mktemp("root")
    make_search(root)
    with served(app_of(root)) as address:
        yield address


# ---- every page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_sound_in_light_in_dark_and_on_a_phone(browser: Browser, small: str, name: str) -> None:
    for scheme, size in (("light", DESK), ("dark", DESK), ("light", PHONE)):
        context = browser.new_context(color_scheme=scheme, viewport=size, reduced_motion="reduce")  # type: ignore[arg-type]
        found = watched(context, small)
        page = found.go(PAGES[name])
        settle(page)
        assert found.faults == []
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        told = Axe().run(page).response["violations"]
        grave = [each for each in told if each["impact"] in ("serious", "critical")]
        assert not grave, json.dumps([{k: e[k] for k in ("id", "help", "nodes")} for e in grave], indent=1)[:4000]
        context.close()


def test_a_page_can_be_used_by_keyboard(browser: Browser, small: str) -> None:
    context = browser.new_context()
    page = watched(context, small).go(SEARCH)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.locator("#raise").focus()
    page.keyboard.press("Enter")
    expect(page.locator("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_be_hidden()
    expect(page.locator("#raise")).to_be_focused()
    context.close()


def test_a_point_of_the_front_shows_its_recipe(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=DESK)  # type: ignore[arg-type]
    page = watched(context, small).go(SEARCH)
    settle(page)
    number = click_on_a_source(page)
    expect(page.locator("#selected-name")).to_have_text(f"c{number:04d}")
    expect(page.locator("#selected-link")).to_have_attribute("href", f"{SEARCH}/candidates/{number}")
    expect(page.locator("#selected-figure")).to_have_attribute("data-figure", re.compile(f"/candidates/{number}/"))
    context.close()


def click_on_a_source(page: Page) -> int:
    """Click on the point of a source in the front with the mouse; the number of the candidate that it stands for."""
    page.locator("#front-figure").scroll_into_view_if_needed()
    x, y, number = page.evaluate(
        """() => {
            const box = document.querySelector('#front-figure'), { xaxis, yaxis } = box._fullLayout;
            const trace = box.data.find((each) => each.name === 'sources');
            const plot = box.querySelector('.nsewdrag').getBoundingClientRect();
            return [plot.x + xaxis.d2p(trace.x[0]), plot.y + yaxis.d2p(trace.y[0]), trace.customdata[0]];
        }"""
    )
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    return int(number)


def test_the_table_of_candidates_changes_without_leaving_the_page(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=DESK)  # type: ignore[arg-type]
    page = watched(context, small).go(SEARCH)
    page.evaluate("window.kept = true")
    page.select_option("#filter-origin", "source")
    expect(page.locator("#table tbody tr")).to_have_count(2)
    assert "origin=source" in page.url
    page.select_option("#filter-origin", "")
    page.get_by_role("link", name="Next page").click()
    expect(page.locator("#table tbody tr")).to_have_count(5)
    assert page.evaluate("window.kept")
    context.close()


# ---- attacks ---------------------------------------------------------------------------------------------------------

ATTACKS = (
    "<b data-attack>bold</b>",
    "<script data-attack>alert(1)</script>",
    '"><img data-attack src=x onerror=alert(1)>',
    "</pre></script><svg data-attack onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "' onmouseover='alert(1)",
)
ATTACK = " ".join(ATTACKS)
EVIL_NAME = "<img data-attack src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose search says HTML wherever people's or models' texts are shown."""
    root = tmp_path_factory.mktemp("hostile")
    folder = make_search(root, EVIL_NAME)
    candidate, search = tables.candidate.c, tables.search.c
    with Store.open(folder / "search.db") as store:
        store_settings = store.search().settings
    with Store.open(folder / "search.db") as store, store.transaction(writes=True) as connection:
        failure = {"reason": ATTACK, "message": ATTACK, "log": "logs/c0007.log"}
        wanted = store_settings | {"sources": dict.fromkeys(store_settings["sources"], ATTACK)}
        connection.execute(
            update(tables.search).where(search.id == store.search_id).values(why=ATTACK, settings=wanted)
        )
        connection.execute(update(tables.candidate).values(worker=ATTACK[:190]))
        average = candidate.origin == "average"
        connection.execute(update(tables.candidate).where(average).values(label=ATTACK[:190]))
        connection.execute(update(tables.candidate).where(candidate.number > 2).values(origin=ATTACKS[0]))
        connection.execute(
            update(tables.candidate).where(candidate.number == 7).values(status="failed", failure=failure)
        )
        key = {"search_id": store.search_id, "evaluator": "v0", "split": "search"}
        connection.execute(insert(tables.item).values(**key, texts=json.dumps([[ATTACK, ATTACK]] * 40)))
        for number in (0, 12):
            row = {**key, "candidate": number, "attempt": 1, "items": range(40), "texts": json.dumps([ATTACK] * 40)}
            connection.execute(insert(tables.answer).values(**row))
    (folder / "logs" / "c0007.log").write_text(ATTACK)
    model = folder / "exports" / "model"
    model.mkdir(parents=True)
    (model / "README.md").write_text(ATTACK)
    told = {"candidate": ATTACK, "bytes": 1, "command": ATTACK}
    (model.parent / ".model.json").write_text(json.dumps(told))
    with served(app_of(root)) as address:
        yield address


HOSTILE = {
    "searches": "/",
    "search": "/searches/NAME",
    "failed": "/searches/NAME/candidates/7",
    "landmark": "/searches/NAME/candidates/0?against=c0012",
    "compare": f"/searches/NAME/compare?a=c0012&b=c0000&objective={ATTACKS[0]}",
    "nobody": f"/searches/NAME/compare?a={ATTACKS[2]}&b=c0000",
    "exports": f"/searches/NAME/exports?candidate={ATTACKS[2]}",
    "fault": f"/searches/{ATTACKS[2]}",
    "sort": f"/searches/NAME?sort={ATTACKS[2]}",
    "login": f"/login?next={ATTACKS[2]}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_html_in_texts_is_shown_as_text(browser: Browser, hostile: str, name: str) -> None:
    context = browser.new_context(viewport=DESK)  # type: ignore[arg-type]
    found = watched(context, hostile)
    dialogs: list[str] = []
    found.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page = found.go(
        HOSTILE[name].replace("NAME", re.sub("/", "%2F", EVIL_NAME)).replace("<", "%3C").replace('"', "%22")
    )
    settle(page)
    assert dialogs == []
    assert page.locator("[data-attack]").count() == 0
    assert page.evaluate("[...document.querySelectorAll('[onmouseover], a[href^=\"javascript:\"]')].length") == 0
    assert [fault for fault in found.faults if "422" not in fault] == []  # a refused script would be told here too
    assert "data-attack" in page.locator("body").inner_text() or name == "login"
    context.close()


# ---- the little YAML of the form -------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12) | st.sampled_from(
    [
        "yes",
        "null",
        "1e3",
        " {answer}",
        "a: b",
        "# c",
        "~",
        "Q: {question}\nA:",
        "test[:40]",
        "0x1f",
        "1_000",
        "-",
        "a,b",
    ]
)
VALUES = st.integers(-9999, 9999) | st.booleans() | TEXTS
KEYS = st.text("abcdefgh_-", min_size=1, max_size=8)
FILES = st.dictionaries(
    KEYS,
    VALUES | st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES | st.lists(VALUES)), max_size=3),
    max_size=4,
)


def test_the_form_writes_yaml_that_says_what_was_meant(browser: Browser, small: str) -> None:
    context = browser.new_context()
    page = watched(context, small).go("/login")
    page.evaluate("async () => { window.dump = (await import('/static/yaml.js')).dump }")

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(FILES)
    def check(content: dict[str, object]) -> None:
        text = page.evaluate("content => window.dump(content)", content)
        assert (load_yaml(text, "file") or {}) == content

    check()
    context.close()


# ---- the whole walk --------------------------------------------------------------------------------------------------


def test_the_whole_walk(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a person does with the miniature models, from the link to the model card."""
    root = tmp_path_factory.mktemp("walk")
    with served(app_of(root, ROOT / "examples")) as address:
        context = browser.new_context(viewport=DESK)  # type: ignore[arg-type]
        context.set_default_timeout(WALK_MS)
        found = Watched(context.new_page(), address)
        page = found.page
        page.on("dialog", lambda dialog: dialog.accept())
        found.go("/new")
        expect(page.get_by_role("heading", name="Log in")).to_be_visible()
        found.go(f"/?token={TOKEN}")
        assert TOKEN not in page.url
        page.get_by_role("link", name="Start a search here").click()
        build(page)
        mend(page)
        page.get_by_role("button", name="Start the search").click()
        page.wait_for_url("**/searches/walk")
        page.evaluate("window.kept = true")
        watch(page)
        steer(page)
        settle(page)
        number = click_on_a_source(page)
        expect(page.locator("#selected-name")).to_have_text(f"c{number:04d}")
        expect(page.locator("#selected-figure .heatmaplayer")).to_be_attached()
        assert page.evaluate("window.kept")  # all of it without loading the page again
        page.locator("#selected-compare").click()
        compare(page, number)
        page.get_by_role("link", name="walk").click()
        page.locator(".head").get_by_role("link", name="Export").click()
        export(page, root)
        assert found.faults == []
        context.close()


def build(page: Page) -> None:
    """Fill in the form; the models are inspected on the way."""
    page.get_by_label("Name", exact=True).first.fill("walk")
    for name in ("base", "japanese", "maths"):
        page.get_by_label(re.compile(f"^{name} /")).check()
    expect(page.locator("#inspection .heat")).to_be_visible(timeout=WALK_MS)
    expect(page.locator("#inspection")).to_contain_text("layer 5")
    expect(page.locator("#base")).to_have_value("base")
    objective = page.locator("[data-objective]")
    for label, text in (
        ("Task", "mini_math_ja"), ("Metric", "acc_ja"), ("Search split", "validation[:24]"),
        ("Held-out split", "test[:24]"),
    ):  # fmt: skip
        objective.get_by_label(label, exact=True).fill(text)
    page.locator("#budget-candidates").fill("400")
    page.get_by_label("Population").fill("4")


def mend(page: Page) -> None:
    """Make a fault by hand: the line is marked, and the form takes it back."""
    file, verdict = page.locator("#file"), page.locator("#verdict")
    expect(file).to_have_value(re.compile("task: mini_math_ja"))
    file.fill(file.input_value().replace("acc_ja", "nonsense"))
    page.get_by_role("button", name="Check it").click()
    expect(verdict).to_contain_text("objectives.mini_math_ja.metric", timeout=WALK_MS)
    lines = file.input_value().splitlines()
    marked = page.locator("#gutter .fault")
    expect(marked).to_have_count(1)
    assert "metric: nonsense" in lines[int(marked.inner_text()) - 1]
    page.get_by_role("button", name="Build it from the form again").click()
    page.get_by_role("button", name="Check it").click()
    expect(verdict).to_contain_text("400 candidates", timeout=WALK_MS)


def watch(page: Page) -> None:
    """Candidates come without the page being loaded again."""
    badge, count = page.locator("#title .badge"), page.locator("#finished")
    expect(badge).to_have_text("running", timeout=WALK_MS)
    for _ in range(2):
        before = count.inner_text()
        expect(count).not_to_have_text(before, timeout=WALK_MS)
    expect(page.locator("#table tbody tr").first).to_be_attached()


def steer(page: Page) -> None:
    """Pause, go on, stop, and another budget."""
    badge = page.locator("#title .badge")
    for button, state in (("Pause", "paused"), ("Resume", "running"), ("Stop", "stopped")):
        page.get_by_role("button", name=button, exact=True).click()
        expect(badge).to_have_text(state, timeout=WALK_MS)
    page.get_by_role("button", name="Raise the budget…").click()
    page.locator("dialog").get_by_label("Candidates").fill("500")
    page.locator("dialog").get_by_label("Go on at once").uncheck()
    page.get_by_role("button", name="Raise", exact=True).click()
    expect(page.locator("#toast")).to_contain_text("The budget is changed")


def compare(page: Page, number: int) -> None:
    """A source against the best, item by item, with answers."""
    page.get_by_label("The other").fill("best")
    page.get_by_label("only where they differ").check()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#a")).to_have_value(f"c{number:04d}")
    expect(page.get_by_role("region", name="Paired tests")).to_be_visible()
    expect(page.locator("main")).to_contain_text("on 24 search items")


def export(page: Page, root: Path) -> None:
    """Export the best, watch, read the card and save it."""
    page.get_by_label("Folder name").fill("walked")
    page.get_by_role("button", name="Export", exact=True).click()
    made = page.locator("[data-export=walked]")
    expect(made).to_have_attribute("data-state", "done", timeout=WALK_MS)
    made.get_by_text("Model card", exact=True).click()
    expect(made.get_by_role("region", name="Model card of walked")).to_contain_text("mini_math_ja")
    with page.expect_download() as saving:
        made.get_by_role("link", name="Download the card").click()
    folder = root / "walk" / "exports" / "walked"
    assert saving.value.path().read_text() == (folder / "README.md").read_text()
    assert (folder / "model.safetensors").is_file()
    expect(made).to_contain_text(f"evomerge export {root}/walk")
