"""Operators watch the release and move it in the page ``/operator``."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx2
import pytest
from operator_server import OperatedServer, operated, outcomes, publish
from playwright.sync_api import Locator, Page, Request, expect
from test_labeling_trouble import HOSTILE, READABLE

from deploy import release as transitions
from deploy.arms import ArmFigures
from deploy.gate import GateCheck, GateReport
from deploy.release import ReplicaReport
from feedback.principals import Scope

pytest_plugins = ["browser_fixtures"]
OpenPage = Callable[..., Page]


@pytest.fixture
def server(redis_url: str, state_dir: Path, tmp_path: Path) -> Iterator[OperatedServer]:
    with operated(redis_url, state_dir, tmp_path / "model") as running:
        yield running


@pytest.fixture
def open_board(server: OperatedServer, open_page: OpenPage) -> OpenPage:
    """Opens the page and waits until it shows the release."""

    def open_(**options: bool) -> Page:
        page = open_page(server.url, labeler=None, **options)
        expect(page.locator("#serving")).not_to_be_empty()
        return page

    return open_


def row(page: Page, pane: str, text: str) -> Locator:
    return page.locator(f"#{pane} tbody tr").filter(has_text=text).first


def busy(server: OperatedServer) -> None:
    """A canary that people and two servers know, after an earlier promotion; one server lags behind."""
    server.start_canary(2, reason="the nightly refit")
    server.compare(2, 1, outcomes(40, 22, 5))
    server.change(transitions.promote, "promote", "carl", "people like it")
    publish(server.state, server.state.parent / f"{server.state.name}-model", parent=2)
    release = server.start_canary(3, 0.2, reason="override: a try at more KL")
    server.compare(3, 2, outcomes(52, 31, 12), task="summaries")
    figures = {
        2: ArmFigures(requests=8120, errors=4, timed=8100, slower=(8100, 3100, 300, 12, 0, 0, 0, 0), completions=8116),
        3: ArmFigures(requests=2010, errors=9, timed=2000, slower=(2000, 1300, 90, 9, 0, 0, 0, 0), completions=2001),
    }
    figures[3] = figures[3].model_copy(update={"unfinished": 61})
    here = ReplicaReport(replica="server-a:1", generation=release.generation, live=(2, 3), arms=figures)
    loading = ReplicaReport(
        replica="server-b:1", generation=release.generation - 1, live=(2,), loading=(3,), detail="version 3 is being loaded"
    )
    server.report(here, loading)


def test_a_version_goes_all_the_way_and_back(server: OperatedServer, open_board: OpenPage) -> None:
    page = open_board()
    serving, dialog = page.locator("#serving"), page.get_by_role("dialog")
    expect(serving).to_have_text("Version 1 serves everyone.")
    page.get_by_role("button", name="Start a canary").click()
    expect(dialog.get_by_label("Version")).to_have_value("3")
    expect(dialog).to_contain_text("It did not pass its gate: kl_to_reference is 19.2")
    expect(dialog.get_by_label("Why go ahead")).to_be_hidden()
    dialog.get_by_role("button", name="Start canary 3").click()
    expect(dialog.get_by_role("alert")).to_contain_text("Version 3 did not pass its gate")
    expect(dialog.get_by_label("Why go ahead")).to_be_focused()
    dialog.get_by_label("Version").select_option("2")
    expect(dialog.get_by_label("Why go ahead")).to_be_hidden()
    dialog.get_by_label("Share of the traffic").fill("20")
    dialog.get_by_label("Reason").fill("a try")
    dialog.get_by_role("button", name="Start canary 2 at 20").click()
    expect(serving).to_have_text(re.compile(r"Version 2 serves 20\s% as the canary, version 1 the rest\."))
    expect(page.locator("#announcer")).to_contain_text("Done. Version 2")
    expect(row(page, "servers", "serves the release")).to_contain_text("1, 2")

    page.get_by_role("button", name="Promote version 2").click()
    dialog.get_by_role("button", name="Promote version 2").click()
    expect(dialog.get_by_role("alert")).to_contain_text("undecided yet")
    dialog.get_by_role("button", name="Override: promote version 2").click()  # without a reason: nothing is sent
    expect(dialog).to_be_visible()
    dialog.get_by_label("Why go ahead").fill("I know it")
    dialog.get_by_role("button", name="Override: promote version 2").click()
    expect(serving).to_have_text("Version 2 serves everyone.")

    page.get_by_role("button", name="Return to version 1").click()
    expect(dialog).to_contain_text("Version 1 will be stable and serve everyone")
    dialog.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Return to version 1").click()
    dialog.get_by_role("button", name="Return to version 1").click()
    expect(serving).to_have_text("Version 1 serves everyone.")
    expect(page.locator("#log tbody tr")).to_have_count(6)
    done = [(one.verb, one.outcome.split(":")[0], one.reason.split(";")[-1].strip()) for one in server.log()[:5]]
    assert done[:1] + done[3:] == [
        ("rollback", "accepted", ""),
        ("canary", "accepted", "a try"),
        ("canary", "refused", ""),
    ]
    assert done[1] == ("promote", "accepted", "override: I know it")
    assert done[2][:2] == ("promote", "refused")
