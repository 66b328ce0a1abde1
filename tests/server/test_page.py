"""The page in a headless browser, at a desktop's and a phone's width; skipped where there is none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from fake_loop import FakeLoop
from live import running

from taper import load
from taper.server.serving import Served
from taper.testing.tiny import tiny_taper

KEY = "a-key-that-is-long-enough"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def playwright_expect():
    """Playwright's waiting assertions, imported with the browser."""
    from playwright.sync_api import expect

    return expect


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's test needs playwright")
    if CHROMIUM is None:
        pytest.skip("the page's test needs Chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=[True, False], ids=["template", "text"])
def url(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.taper"
    llm = load(tiny_taper(path, chat=request.param, max_position_embeddings=1024))
    with running({"tiny": Served("tiny", llm, FakeLoop(llm.engine))}, KEY) as url:
        yield url


@pytest.mark.parametrize("width", [1280, 375])
def test_a_chat(browser, url, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if "Content Security Policy" in m.text else None)
    page.goto(url)
    page.fill("#key", KEY)
    page.click("#keyform button")
    # Not wait_for_function: the page's policy forbids its eval.
    expect = playwright_expect()
    expect(page.locator("#state")).to_have_text("live")
    page.fill("#tokens", "12")
    page.fill("#text", "<b>hello</b>")
    page.press("#text", "Enter")
    page.wait_for_selector(".note:has-text('12 tokens at')")
    assert page.inner_text(".user") == "<b>hello</b>"  # as text
    assert page.locator(".answer span").count() >= 3
    # Bits fall from 5 to 3: more than one colour.
    colours = page.eval_on_selector_all(".answer span", "all => all.map(one => one.style.background)")
    assert len(set(colours)) > 1
    page.fill("#text", "more")
    page.click("#send")
    expect(page.locator(".note")).to_have_count(2)
    expect(page.locator("svg path[d^=M]")).to_have_count(7)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    folder = os.environ.get("TAPER_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"page-{width}.png", full_page=width < 800)
    assert not problems
    page.close()
