"""A real browser, and a page in it that records every error."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI
from helpers_service import TOKEN
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    ViewportSize,
    expect,
    sync_playwright,
)

from evomerge.service.app import create_app
from evomerge.service.dependencies import ServiceSettings
from evomerge.service.root import Root

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
expect.set_options(timeout=30_000)  # generous, because machines that run tests may be slow
PHONE, DESK = ViewportSize(width=390, height=844), ViewportSize(width=1280, height=900)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """The distribution's browser; ``scripts/test`` installs it. A test without one fails rather than being left out."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    assert found is not None, "there is no Chromium: apt-get install chromium-headless-shell"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def app_of(root: Path, *sources: Path) -> FastAPI:
    return create_app(ServiceSettings(Root.of(str(root), root), TOKEN, sources=sources))


@dataclass
class Watched:
    """A page with everything that went wrong on it: errors in the console, exceptions, requests to other servers."""

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
    """Scroll through a page, and wait until every figure is drawn or shows why it is not."""
    for figure in page.locator(".figure").all():
        figure.scroll_into_view_if_needed()
        expect(figure.locator(".main-svg, .waiting:not(:text-is('…'))").first).to_be_attached(timeout=30_000)
    page.evaluate("window.scrollTo(0, 0)")


def click_on_a_source(page: Page) -> int:
    """Click on the point of a source in the front at which no other candidate is; return the selected candidate."""
    shown = page.locator("#selected-name")
    before = shown.inner_text()
    page.locator("#front-figure").scroll_into_view_if_needed()
    x, y = page.evaluate(
        """() => {
            const box = document.querySelector('#front-figure'), { xaxis, yaxis } = box._fullLayout;
            const of = (name) => box.calcdata.find((each) => each[0].trace.name === name) ?? [];
            const others = of('candidates').map(({ x, y }) => `${x} ${y}`);
            const point = of('sources').find(({ x, y }) => !others.includes(`${x} ${y}`));
            const plot = box.querySelector('.nsewdrag').getBoundingClientRect();
            return [plot.x + xaxis.c2p(point.x), plot.y + yaxis.c2p(point.y)];
        }"""
    )
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    expect(shown).not_to_have_text(before)
    number = int(shown.inner_text().removeprefix("c"))
    detail = page.request.get(
        re.sub("/searches/", "/api/v1/searches/", page.url.split("#")[0]) + f"/candidates/{number}"
    )
    assert detail.json()["origin"] == "source"
    return number
