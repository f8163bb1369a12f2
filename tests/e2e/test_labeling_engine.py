"""The labeling page end to end: vLLM samples, a person ranks by keyboard, the comparison is in the log."""

import asyncio
import threading
from collections.abc import Callable

import httpx2
import pytest
from playwright.sync_api import Page, expect
from running_server import RunningServer

from feedback.records import Comparison, LogRecord
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore

pytest_plugins = ["browser_fixtures"]
pytestmark = pytest.mark.engine


def records(server: RunningServer) -> list[LogRecord]:
    """The server's log."""
    found: list[LogRecord] = []

    async def read() -> None:
        store = FeedbackStore.connect(server.redis_url, FeedbackSettings())
        found.extend([entry.record async for entry in store.scan()])
        await store.close()

    reader = threading.Thread(target=asyncio.run, args=(read(),))  # the browser's driver has this thread's loop
    reader.start()
    reader.join()
    return found


def test_from_sampled_answers_to_comparisons(server: RunningServer, open_page: Callable[..., Page]) -> None:
    before = len(records(server))
    asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    httpx2.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).raise_for_status()
    page = open_page(server.url)
    cards = page.locator(".answer:not(.waiting)")
    expect(cards).to_have_count(4, timeout=60_000)
    shown = cards.locator(".text").evaluate_all("texts => texts.map((text) => text.textContent)")
    for key in ("3", "=", "1", "4", "2", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#today")).to_have_text("1 today")
    page.get_by_role("button", name="Ask").click()
    page.get_by_label("Your prompt").fill("who are you?")
    page.locator("#ask button").click()
    expect(cards).to_have_count(4, timeout=60_000)
    written = cards.locator(".text").evaluate_all("texts => texts.map((text) => text.textContent)")
    for key in ("1", "2", "3", "4", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#today")).to_have_text("2 today")
    task, own = records(server)[before:]
    assert isinstance(task, Comparison) and isinstance(own, Comparison)
    assert (task.source, task.ranking, task.labeler) == ("task", ((0, 2), (3,), (1,)), "L-1")
    assert [candidate.text for candidate in task.candidates] == shown
    assert (own.source, own.ranking) == ("choices", ((0,), (1,), (2,), (3,)))
    assert [candidate.text for candidate in own.candidates] == written
