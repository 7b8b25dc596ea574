"""The pages in a real browser: how they look to people and to assistive tools, and that no text of others runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import helpers_figures as made
import pytest
from axe_playwright_python.sync_playwright import Axe
from helpers_browser import DESK, PHONE, app_of, click_on_a_source, open_browser, settle, watched
from helpers_search import make_setup
from helpers_service import NAME, make_search, serving
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Route, ViewportSize, expect
from sqlalchemy import insert, update

from evomerge.search.settings.sections import Confirm
from evomerge.store import Store, tables
from evomerge.yaml import load_yaml

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
    with open_browser() as found:
        yield found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a finished made-up search."""
    root = tmp_path_factory.mktemp("root")
    make_search(root)
    with serving(app_of(root)) as address:
        yield address


# ---- every page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(
    "views",
    [
        pytest.param((("light", DESK), ("dark", PHONE)), id="each"),
        pytest.param((("dark", DESK), ("light", PHONE)), id="others", marks=pytest.mark.nightly),
    ],
)
def test_a_page_is_sound_in_light_in_dark_and_on_a_phone(
    browser: Browser, small: str, name: str, views: tuple[tuple[Literal["light", "dark"], ViewportSize], ...]
) -> None:
    for scheme, size in views:
        context = browser.new_context(color_scheme=scheme, viewport=size, reduced_motion="reduce")
        found = watched(context, small)
        page = found.go(PAGES[name])
        settle(page)
        assert found.faults == []
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        told = Axe().run(page).response["violations"]
        grave = [each for each in told if each["impact"] in ("serious", "critical")]
        assert not grave, json.dumps([{k: e[k] for k in ("id", "help", "nodes")} for e in grave], indent=1)[:4000]
        context.close()


def test_scores_and_gains_in_three_objectives_fit_a_desk_and_a_phone(browser: Browser, tmp_path: Path) -> None:
    setup = replace(make_setup(objectives=3, candidates=20), confirm=Confirm(top=2))
    named = zip(setup.objectives, ("word_problems", "json_answers", "verdicts"), strict=True)
    made.search(tmp_path, "three", replace(setup, objectives=tuple(replace(o, name=name) for o, name in named)))
    with serving(app_of(tmp_path)) as address:
        for size in (ViewportSize(width=1440, height=900), PHONE):
            context = browser.new_context(viewport=size, reduced_motion="reduce")
            page = watched(context, address).go("/searches/three")
            table = page.locator("#confirmed table")
            for name in ("word_problems", "json_answers", "verdicts"):
                cells = table.locator(f"td[data-title={name}]")
                expect(cells.filter(has_text="±")).not_to_have_count(0)
                expect(cells.locator(".gain").first).to_contain_text("]")
            for scrolled in ("#confirmed .scroll", "#scores .scroll"):
                hidden = page.locator(scrolled).evaluate("box => box.scrollWidth - box.clientWidth")
                assert hidden == 0, (scrolled, size)
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
    context = browser.new_context(viewport=DESK)
    page = watched(context, small).go(SEARCH)
    settle(page)
    number = click_on_a_source(page)
    expect(page.locator("#selected-name")).to_have_text(f"c{number:04d}")
    expect(page.locator("#selected-link")).to_have_attribute("href", f"{SEARCH}/candidates/{number}")
    expect(page.locator("#selected-figure")).to_have_attribute("data-figure", re.compile(f"/candidates/{number}/"))
    context.close()


@pytest.mark.nightly
def test_the_table_of_candidates_changes_without_leaving_the_page(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=DESK)
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


@pytest.mark.nightly
def test_an_answer_that_was_overtaken_changes_nothing(browser: Browser, small: str) -> None:
    """The page asks again for itself as the search goes on, and just then somebody filters the table."""
    context = browser.new_context(viewport=DESK)
    page = watched(context, small).go(SEARCH)
    slow: list[Route] = []
    page.route(re.compile(r"/searches/[^/?]+$"), lambda route: slow.append(route))
    with page.expect_request(re.compile(r"/searches/[^/?]+$")):
        page.evaluate("window.overtaken = import('/static/common.js').then((common) => common.refresh()); null")
    page.select_option("#filter-origin", "source")
    expect(page.locator("#table tbody tr")).to_have_count(2)
    for route in slow:
        route.continue_()
    page.evaluate("window.overtaken")  # waits for it
    assert page.locator("#table tbody tr").count() == 2
    context.close()


@pytest.mark.nightly
def test_the_point_of_the_shown_candidate_has_a_ring(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=DESK)
    page = watched(context, small).go(SEARCH)
    settle(page)
    number = click_on_a_source(page)
    ringed, expected = page.evaluate(
        """(number) => {
            const box = document.querySelector('#front-figure');
            const trace = box._fullData.find((each) => each.name === 'sources');
            const at = [...trace.customdata].indexOf(number);
            return [box.layout.shapes.map((each) => [each.xanchor, each.yanchor]), [trace.x[at], trace.y[at]]];
        }""",
        number,
    )
    assert ringed == [expected]
    context.close()


@pytest.mark.nightly
def test_buttons_of_a_figure_cover_nothing(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=DESK)
    page = watched(context, small).go(SEARCH)
    settle(page)
    colour, bottom, top = page.evaluate(
        """() => {
            const box = document.querySelector('#front-figure');
            const at = (each) => box.querySelector(each).getBoundingClientRect();
            return [box._fullLayout.modebar.bgcolor, at('.modebar-group').bottom, at('.nsewdrag').top];
        }"""
    )
    assert colour == "rgba(0,0,0,0)"
    assert bottom <= top
    context.close()


@pytest.mark.nightly
def test_on_a_phone_captions_wrap_and_the_first_column_stays(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=PHONE)
    page = watched(context, small).go(SEARCH)
    region = page.get_by_role("region", name="Table of candidates")
    place = region.bounding_box()
    caption, cell = region.locator("caption"), region.locator("tbody th").first
    before, words = cell.bounding_box(), caption.bounding_box()
    assert place is not None
    assert before is not None
    assert words is not None
    assert words["width"] <= place["width"]
    region.evaluate("(each) => { each.scrollLeft = 100; }")
    assert region.evaluate("(each) => each.scrollLeft") > 0
    after = cell.bounding_box()
    assert after is not None
    assert after["x"] == pytest.approx(before["x"], abs=1)
    context.close()


@pytest.mark.nightly
def test_a_budget_that_is_refused_is_mended_in_its_dialog(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=DESK)
    page = watched(context, small).go(SEARCH)
    problem = {
        "title": "That does not work",
        "status": 422,
        "detail": "",
        "faults": [{"field": "", "problem": "too low"}],
    }
    page.route("**/budget", lambda route: route.fulfill(status=422, json=problem))
    page.locator("#raise").click()
    page.get_by_role("button", name="Raise", exact=True).click()
    expect(page.locator("#budget-fault")).to_contain_text("too low")
    expect(page.locator("dialog")).to_be_visible()
    page.unroute("**/budget")
    page.route("**/budget", lambda route: route.fulfill(status=202, json={"told": "done"}))
    page.get_by_role("button", name="Raise", exact=True).click()
    expect(page.locator("dialog")).to_be_hidden()
    context.close()


@pytest.mark.nightly
def test_the_name_of_an_export_follows_its_candidate_until_it_is_written(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=DESK)
    page = watched(context, small).go(f"{SEARCH}/exports")
    name, command = page.locator("#name"), page.locator("#export .command .code")
    page.locator("#candidate").fill("c0005")
    expect(name).to_have_value(f"{NAME}-c0005")
    expect(command).to_contain_text(f"exports/{NAME}-c0005 --candidate c0005")
    page.locator("#candidate").fill("uniform average")
    expect(name).to_have_value(f"{NAME}-uniform-average")
    name.fill("mine")
    page.locator("#candidate").fill("c0006")
    expect(name).to_have_value("mine")
    context.close()


@pytest.mark.parametrize("runs", [False, True])
def test_an_export_is_sent_by_the_script_alone(browser: Browser, small: str, runs: bool) -> None:
    """Before it runs, the browser itself would load the page anew, export nothing, and lose what was written."""
    context = browser.new_context(viewport=DESK, java_script_enabled=runs)
    page = watched(context, small).go(f"{SEARCH}/exports")
    expect(page.get_by_role("button", name="Export", exact=True)).to_be_enabled(enabled=runs)
    context.close()


@pytest.mark.nightly
def test_an_export_without_verification_warns_and_says_so_to_the_server(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=DESK)
    page = watched(context, small).go(f"{SEARCH}/exports")
    asked: list[object] = []

    def answer(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(status=422, json={"title": "no", "status": 422, "faults": []})

    page.route("**/api/v1/**/exports", answer)
    warning, command = page.locator("#unverified-hint"), page.locator("#export .command .code")
    expect(warning).to_be_hidden()
    page.get_by_role("button", name="Export", exact=True).click()
    expect(page.locator("#export-fault .note")).to_have_count(1)
    page.get_by_label("Without verification").check()
    expect(warning).to_be_visible()
    expect(command).to_contain_text(" --no-verify")
    page.get_by_role("button", name="Export", exact=True).click()
    expect(page.locator("#export-fault .note")).to_have_count(1)
    page.get_by_label("Without verification").uncheck()
    expect(warning).to_be_hidden()
    expect(command).not_to_contain_text("--no-verify")
    assert [body["verify"] for body in asked if isinstance(body, dict)] == [True, False]
    context.close()


def test_a_browser_logs_out(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=PHONE)
    page = watched(context, small).go("/")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    page.goto(f"{small}{SEARCH}")
    expect(page.get_by_label("Token")).to_be_visible()
    context.close()


@pytest.mark.nightly
def test_optunas_dashboard_fits_a_phone(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=PHONE)
    page = watched(context, small).go("/dashboard/")
    expect(page.get_by_text(NAME)).to_be_visible()
    for path in ("/dashboard/", "/dashboard/studies/0"):
        page.goto(small + path)
        expect(page.locator("main")).to_be_visible()
        expect(page.locator("main").get_by_role("heading").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    context.close()


# ---- the form of a new search ----------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_several_objectives_have_an_optimizer_for_several_unless_one_is_chosen(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=DESK)
    page = watched(context, small).go("/new")
    optimizer, more = page.locator("#optimizer-name"), page.get_by_role("button", name="Add an objective")
    more.click()
    expect(optimizer).to_have_value("nsga2")
    page.get_by_role("button", name="Remove objective 2").click()
    expect(optimizer).to_have_value("cma")
    optimizer.select_option("tpe")
    more.click()
    expect(optimizer).to_have_value("tpe")
    expect(page.locator("#file")).to_have_value(re.compile("name: tpe"))
    context.close()


@pytest.mark.nightly
def test_an_adapter_is_chosen_with_its_model_and_called_by_its_own_name(browser: Browser, small: str) -> None:
    context = browser.new_context(viewport=DESK)
    found = watched(context, small)
    listed = [
        {"name": "small", "reference": "/m/small", "model_type": "llama", "bytes": 1, "adapter_of": None},
        {"name": "sums", "reference": "/m/small+/m/sums", "model_type": "LORA", "bytes": 1, "adapter_of": "small"},
        {"name": "lost", "reference": None, "model_type": "LORA", "bytes": 1, "adapter_of": "gone"},
    ]
    asked: list[object] = []

    def compared(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(json={"models": [], "warnings": []})

    found.page.route("**/api/v1/sources", lambda route: route.fulfill(json={"sources": listed}))
    found.page.route("**/sources/inspect", compared)
    page = found.go("/new")
    page.get_by_label("small /m/small", exact=True).check()
    page.get_by_label("sums").check()
    expect(page.get_by_label("lost")).to_be_disabled()
    expect(page.locator("#folders")).to_contain_text("its base model gone is in no folder here")
    expect(page.locator("#file")).to_have_value(re.compile(r"sources:\n  small: /m/small\n  sums: /m/small\+/m/sums"))
    expect(page.locator("#inspection")).to_contain_text("Nothing speaks against")
    assert asked[-1] == {"sources": {"small": "/m/small", "sums": "/m/small+/m/sums"}, "base": None}
    assert found.faults == []
    context.close()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "line", "field"),
    [
        ("task mini_math_ja: held_out", "held_out: nothing", "#o1-held_out"),
        ("task mini_math_ja", "task: mini_math_ja", "#o1-task"),
        ("objectives.mini_math_ja.metric", "metric: acc", "#o1-metric"),
        ("budget.candidates", "candidates: 100", "#budget-candidates"),
        ("search file: name", "name: search-1", "#name"),
        ("space.profile.cosines", "cosines: 3", "#parameter_space-profile-cosines"),
    ],
)
def test_a_fault_marks_its_line_and_its_field(browser: Browser, small: str, fault: str, line: str, field: str) -> None:
    context = browser.new_context(viewport=DESK)
    page = watched(context, small).go("/new")
    for name, text in (("task", "mini_math_ja"), ("metric", "acc"), ("held_out", "nothing")):
        page.locator(f"#o1-{name}").fill(text)
    page.locator("#parameter_space-profile-cosines").fill("3")
    assert page.locator("#o1-task").get_attribute("required") is not None
    problem = {"title": "That does not work", "status": 422, "faults": [{"field": fault, "problem": "is wrong"}]}
    page.route("**/validate", lambda route: route.fulfill(status=422, json=problem))
    page.get_by_role("button", name="Check it").click()
    expect(page.locator("#gutter .fault")).to_have_count(1)
    lines = page.locator("#file").input_value().splitlines()
    assert lines[int(page.locator("#gutter .fault").inner_text()) - 1].strip() == line
    expect(page.locator(field)).to_have_attribute("aria-invalid", "true")
    page.locator("#verdict").get_by_role("button", name="Go to the field").click()
    expect(page.locator(field)).to_be_focused()
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
    with serving(app_of(root)) as address:
        yield address


HOSTILE = {
    "searches": "/",
    "search": "/searches/NAME",
    "failed": "/searches/NAME/candidates/7",
    "baseline": "/searches/NAME/candidates/0?against=c0012",
    "compare": f"/searches/NAME/compare?a=c0012&b=c0000&objective={ATTACKS[0]}",
    "nobody": f"/searches/NAME/compare?a={ATTACKS[2]}&b=c0000",
    "exports": f"/searches/NAME/exports?candidate={ATTACKS[2]}",
    "fault": f"/searches/{ATTACKS[2]}",
    "sort": f"/searches/NAME?sort={ATTACKS[2]}",
    "login": f"/login?next={ATTACKS[2]}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_html_in_texts_is_shown_as_text(browser: Browser, hostile: str, name: str) -> None:
    context = browser.new_context(viewport=DESK)
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

    @given(FILES)
    def check(content: dict[str, object]) -> None:
        text = page.evaluate("content => window.dump(content)", content)
        assert (load_yaml(text, "file") or {}) == content

    check()
    context.close()


def test_the_form_writes_a_proxy_with_the_space_before_its_answer(browser: Browser, small: str) -> None:
    context = browser.new_context()
    page = watched(context, small).go("/new")
    page.get_by_text("Gradient of right answers").click()
    page.fill('[data-key="proxy.file"]', "items.jsonl")
    page.fill('[data-key="proxy.answer"]', " {answer}")
    page.fill('[data-key="proxy.steps"]', "8")
    written = load_yaml(page.input_value("#file"), "file")
    assert written["proxy"] == {"file": "items.jsonl", "answer": " {answer}", "steps": 8}
    context.close()
