"""What people do on the labeling page."""

from labeling_server import LabelingServer
from playwright.sync_api import Locator, Page, expect

from feedback.records import Comparison


def judged(page: Page, count: int = 4) -> Locator:
    """Wait for a task to be on the screen; returns its cards."""
    cards = page.locator(".answer:not(.waiting)")
    expect(cards).to_have_count(count)
    return cards


def press(page: Page, keys: str) -> None:
    for key in keys.split():
        page.keyboard.press(key)


def comparison(labeling: LabelingServer) -> Comparison:
    [record] = labeling.wait_for_records(1)
    assert isinstance(record, Comparison)
    return record


def drag(page: Page, source: Locator, target: Locator) -> None:
    box = source.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 40, box["y"] - 40, steps=3)  # lifted: now the gaps have their full width
    onto = target.bounding_box()
    assert onto is not None
    page.mouse.move(onto["x"] + onto["width"] / 2, onto["y"] + onto["height"] / 2, steps=5)
    page.mouse.up()


def chip(page: Page, number: int) -> Locator:
    return page.locator(f"[data-name=chip-{number - 1}]")
