"""What a person does, in a real browser: from the printed link to the model card of what the search has found."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers_browser import DESK, PHONE, Watched, app_of, click_on_a_source, open_browser, settle
from helpers_miniature import MINIATURES, ROOT
from helpers_service import TOKEN, serving
from playwright.sync_api import Browser, Page, expect

from evomerge.store import Store, current_holder

PICTURES = ROOT / "docs" / "pictures"
DRAWS = os.environ.get("EVOMERGE_PICTURES") == "1"  # make the pictures of docs/service.md anew
ITEMS = 60 if DRAWS else 8  # of each split
MIN = 45 if DRAWS else 6  # candidates before the walk goes on
WALK_MS = 90_000  # for what imports torch, beside other tests on a small machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


@pytest.mark.parametrize("exported", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_the_whole_walk(browser: Browser, tmp_path_factory: pytest.TempPathFactory, exported: bool) -> None:
    """What a person does with the miniature models, from the link to what was found, or on to the model card."""
    root = tmp_path_factory.mktemp("walk")
    with serving(app_of(root, ROOT / "examples" / "miniatures")) as address, ended(root / "walk"):
        context = browser.new_context(viewport=DESK)
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
        hint(page)
        page.get_by_role("button", name="Start the search").click()
        page.wait_for_url("**/searches/walk")
        page.evaluate("window.kept = true")
        watch(page)
        show_off(page)
        steer(page)
        settle(page)
        number = click_on_a_source(page)
        expect(page.locator("#selected-name")).to_have_text(f"c{number:04d}")
        expect(page.locator("#selected-figure .heatmaplayer")).to_be_attached()
        assert page.evaluate("window.kept")  # all of it without loading the page again
        page.locator("#selected-compare").click()
        compare(page, number)
        if exported:
            page.get_by_role("link", name="walk").click()
            page.locator(".head").get_by_role("link", name="Export").click()
            export(page, root)
        assert [fault for fault in found.faults if "422" not in fault] == []  # which ``hint`` asked for
        context.close()


@contextmanager
def ended(folder: Path) -> Iterator[None]:
    """Leave no driver behind, whatever happens."""
    try:
        yield
    finally:
        if (folder / "search.db").is_file():
            with Store.open(folder / "search.db") as store:
                if current_holder(store) is not None:
                    store.request_command("cancel")


def build(page: Page) -> None:
    """Fill in the form; the models are inspected on the way."""
    page.get_by_label("Name", exact=True).first.fill("walk")
    for name in ("base", "japanese", "maths"):
        page.get_by_label(re.compile(f"^{name} /")).check()
    expect(page.locator("#inspection .heat")).to_be_visible(timeout=WALK_MS)
    expect(page.locator("#inspection")).to_contain_text("layer 5")
    expect(page.locator("#base")).to_have_value("base")
    page.get_by_role("button", name="Add an objective").click()
    for number, (task, metric) in enumerate((("mini_math_ja", "acc_ja"), ("mini_math_en", "acc"))):
        objective = page.locator("[data-objective]").nth(number)
        for label, text in (
            ("Task", task),
            ("Metric", metric),
            ("Search split", f"validation[:{ITEMS}]"),
            ("Held-out split", f"test[:{ITEMS}]"),
        ):
            objective.get_by_label(label, exact=True).fill(text)
    page.locator("#optimizer-name").select_option("nsga2")
    page.locator("#budget-candidates").fill("400")
    page.get_by_label("Population").fill("6")


def hint(page: Page) -> None:
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
    expect(file).to_have_value(re.compile("metric: acc_ja"))
    if DRAWS:  # the start checks it, too
        page.get_by_role("button", name="Check it").click()
        expect(verdict).to_contain_text("400 candidates", timeout=WALK_MS)
        picture(page, "new", 1000)


def watch(page: Page) -> None:
    """Candidates come without the page being loaded again."""
    badge, count = page.locator("#title .badge"), page.locator("#finished")
    expect(badge).to_have_text("running", timeout=WALK_MS)
    while int(count.inner_text().split()[0]) < MIN:
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


def show_off(page: Page) -> None:
    """Pictures of the page of a search: at a desk by day and by night, on a phone, and in the list."""
    if not DRAWS:
        return
    page.locator("#select-candidate").select_option(index=0)
    picture(page, "search", 1180)
    page.emulate_media(color_scheme="dark")
    picture(page, "search-dark", 1180)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(PHONE)
    picture(page, "phone", 844)
    page.set_viewport_size(DESK)
    front = page.context.new_page()
    front.goto(page.url.split("/searches")[0])
    picture(front, "searches", 330)
    front.close()


def picture(page: Page, name: str, height: int = 800) -> None:
    """Draw what is seen, for the documentation, where that is asked for; places of this machine by other names."""
    if not DRAWS:
        return
    before = page.viewport_size
    page.set_viewport_size({"width": before["width"] if before else 1280, "height": height})
    settle(page)
    page.evaluate(RENAMED, [[str(MINIATURES), "/models"], ["/[^ ]*/walk[0-9]+/", "/searches/"]])
    PICTURES.mkdir(exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", scale="css", animations="disabled")
    page.evaluate("window.renamed.forEach((undo) => undo())")
    page.set_viewport_size(before)


RENAMED = """(names) => {
    document.querySelector('#toast').replaceChildren();
    const changed = (text) => names.reduce((all, [from, to]) => all.replace(new RegExp(from, 'g'), to), text);
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    window.renamed = [];
    const change = (node, key) => {
        const before = node[key];
        if (changed(before) === before) return;
        node[key] = changed(before);
        window.renamed.push(() => { node[key] = before; });
    };
    while (walker.nextNode()) change(walker.currentNode, 'data');
    document.querySelectorAll('textarea, input').forEach((each) => change(each, 'value'));
}"""


def compare(page: Page, number: int) -> None:
    """A source against the best, item by item, with answers."""
    page.get_by_label("The other").fill("best")
    page.get_by_label("only where they differ").check()
    page.get_by_label("Objective").select_option("mini_math_en")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#a")).to_have_value(f"c{number:04d}")
    expect(page.get_by_role("region", name="Paired tests")).to_be_visible()
    expect(page.locator("main")).to_contain_text(f"on {ITEMS} search items")


def export(page: Page, root: Path) -> None:
    """Export the best, watch, read the card and save it."""
    page.get_by_label("Folder name").fill("walked")
    page.get_by_role("button", name="Export", exact=True).click()
    made = page.locator("[data-export=walked]")
    expect(made).to_have_attribute("data-state", "done", timeout=WALK_MS)
    made.get_by_text("Model card", exact=True).click()
    expect(made.get_by_role("region", name="Model card of walked")).to_contain_text("mini_math_ja")
    picture(page, "export", 1000)
    with page.expect_download() as saving:
        made.get_by_role("link", name="Download the card").click()
    folder = root / "walk" / "exports" / "walked"
    assert saving.value.path().read_text() == (folder / "README.md").read_text()
    assert (folder / "model.safetensors").is_file()
    expect(made).to_contain_text(f"evomerge export {root}/walk")
