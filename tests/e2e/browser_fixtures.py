"""Fixtures of a real browser on the real pages: Chromium, driven by playwright."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from labeling_server import LabelingServer, serving
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

_PATIENCE_MS = 20_000.0
"""For a machine whose two cores have other work."""


@pytest.fixture(scope="module")  # not longer: while the driver runs, no asyncio test can
def browser() -> Iterator[Browser]:
    """Chromium without a window: Debian's, else playwright's own."""
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or playwright.chromium.executable_path
        if not Path(chromium).exists():
            missing = "the pages are tested in Chromium, and there is none: deploy/requirements/browser.sh"
            if os.environ.get("CI") == "true":
                pytest.fail(missing)
            pytest.skip(missing)
        expect.set_options(timeout=_PATIENCE_MS)
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def labeling(redis_url: str, state_dir: Path) -> Iterator[LabelingServer]:
    """A server whose answers are canned."""
    with serving(redis_url, state_dir) as server:
        yield server


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page in a browser of its own, as a labeler who has said their name.

    The test fails if a page has an error or breaks the security policy.
    """
    problems: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        # Refused requests are part of what is tested; everything else that a browser complains about is a fault.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            problems.append(message.text)

    contexts: list[BrowserContext] = []

    def open_(url: str, *, labeler: str | None = "L-1", phone: bool = False, dark: bool = False) -> Page:
        context = browser.new_context(
            viewport={"width": 390, "height": 844} if phone else {"width": 1280, "height": 900},
            is_mobile=phone,
            has_touch=phone,
            color_scheme="dark" if dark else "light",
        )
        contexts.append(context)
        context.set_default_timeout(_PATIENCE_MS)
        page = context.new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        if labeler is not None:
            page.get_by_label("Your name or code").fill(labeler)
            page.get_by_role("button", name="Start").click()
        return page

    yield open_
    found = list(problems)  # closing a page interrupts what it is doing, and it may complain of that
    for context in contexts:
        context.close()
    assert found == []
