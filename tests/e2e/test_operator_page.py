"""Operators watch the release and move it in the page ``/operator``."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from operator_server import OperatedServer, operated, outcomes, publish
from playwright.sync_api import Locator, Page, Request, Route, expect
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
    release = server.start_canary(3, 0.2, reason="override: a try at more KL")
    server.compare(3, 2, outcomes(52, 31, 12), task="summaries")
    figures = {
        2: ArmFigures(requests=8120, errors=4, timed=8100, slower=(8100, 3100, 300, 12, 0, 0, 0, 0), completions=8116),
        3: ArmFigures(requests=2010, errors=9, timed=2000, slower=(2000, 1300, 90, 9, 0, 0, 0, 0), completions=2001),
    }
    figures[3] = figures[3].model_copy(update={"unfinished": 61})
    here = ReplicaReport(replica="server-a:1", generation=release.generation, live=(2, 3), arms=figures)
    before = release.generation - 1
    behind = ReplicaReport(replica="server-b:1", generation=before, live=(2,), loading=(3,), detail="3 is being loaded")
    server.report(here, behind)


def test_a_version_goes_all_the_way_and_back(server: OperatedServer, open_board: OpenPage) -> None:
    page = open_board()
    serving, dialog = page.locator("#serving"), page.get_by_role("dialog")
    expect(serving).to_have_text("Version 1 serves everyone.")
    page.get_by_role("button", name="Start a canary").click()
    expect(dialog.get_by_label("Version")).to_have_value("3")
    expect(dialog).to_contain_text("It did not pass its gate: kl_to_reference is 19.2")
    expect(dialog.get_by_label("Why go ahead")).to_be_hidden()
    dialog.get_by_role("button", name="Start canary 3").click()
    expect(dialog.get_by_role("alert")).to_contain_text("The server refuses. Version 3 did not pass its gate")
    expect(dialog.get_by_label("Why go ahead")).to_be_focused()
    dialog.get_by_label("Version").select_option("2")
    expect(dialog.get_by_label("Why go ahead")).to_be_hidden()
    dialog.get_by_label("Share of the traffic").fill("20")
    dialog.get_by_label("Reason").fill("a try")
    dialog.get_by_role("button", name="Start canary 2 at 20").click()
    expect(serving).to_have_text(re.compile(r"Version 2 serves 20\s% as the canary, version 1 the rest\."))
    expect(page.locator("#announcer")).to_contain_text("Version 2 serves 20")
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


def test_of_two_operators_the_second_is_told(server: OperatedServer, open_board: OpenPage) -> None:
    first, second = open_board(), open_board()
    for page in (first, second):
        page.get_by_role("button", name="Start a canary").click()
        page.get_by_label("Version", exact=True).select_option("2")
    first.get_by_role("button", name="Start canary 2").click()
    expect(first.locator("#serving")).to_contain_text("Version 2 serves 10")
    second.get_by_role("button", name="Start canary 2").click()
    problem = second.get_by_role("dialog").get_by_role("alert")
    expect(problem).to_contain_text("Somebody else changed the release meanwhile; nothing was done.")
    expect(problem).to_contain_text("generation 2, not 1")
    expect(second.get_by_role("button", name="Start canary 2")).to_be_hidden()
    expect(second.locator("#serving")).to_contain_text("Version 2 serves 10")  # behind the dialog, at once
    second.get_by_role("button", name="Close").click()
    expect(row(second, "log", "generation is 2, not 1")).to_contain_text("refused")
    assert [one.accepted for one in server.log()[:2]] == [False, True]


def test_everything_there_is_to_know_is_shown(server: OperatedServer, open_board: OpenPage) -> None:
    busy(server)
    page = open_board()
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("Version 3 was preferred in 52 of 83 blind comparisons; 12 more were ties.")
    expect(verdict.get_by_role("progressbar")).to_have_count(3)
    bars = [float(bar.get_attribute("value") or "") for bar in verdict.get_by_role("progressbar").all()]
    assert 0 < bars[0] < bars[1] < 1  # not to be worse is the easier to show
    widths = page.locator("#traffic > *").evaluate_all("all => all.map((one) => one.clientWidth)")
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.02)

    canary = row(page, "versions", "canary")
    expect(canary).to_contain_text("failed 1 of 4")
    expect(canary).to_contain_text("over 2")  # win rates come a little later
    cells = [re.sub(r"\s", " ", cell) for cell in canary.locator("td").all_inner_texts()]
    assert cells[3:] == ["2,010", "0.4 %", "half ≤ 0.25 s, 95 % ≤ 0.25 s", "3 %", "0 %"]
    assert re.fullmatch(r"62\.7 % \(4\d(\.\d)? % to 6\d(\.\d)? %\) over 2", cells[2])
    expect(row(page, "versions", "stable")).to_contain_text(re.compile(r"64\.5\s% .*over 1"))
    expect(row(page, "versions", "previous")).to_contain_text("not measured")

    expect(page.get_by_label("of version")).to_have_value("3")
    expect(row(page, "gate", "kl_to_reference")).to_contain_text("19.26failed")
    expect(page.locator("#gate")).to_contain_text("win_rate_reward_model is 0.55")
    page.get_by_label("of version").select_option("2")
    expect(row(page, "gate", "kl_to_reference")).to_contain_text("1.26passed")

    expect(row(page, "servers", "server-a")).to_contain_text("serves the release")
    expect(row(page, "servers", "server-b")).to_contain_text("is at generation 3")
    expect(row(page, "servers", "server-b")).to_contain_text("3 is being loaded")
    expect(row(page, "log", "the nightly refit")).to_contain_text("carl")
    course, released = page.locator("#course"), page.locator("#released")
    expect(course).to_contain_text(re.compile(r"preferred to version 2 in 52 of 83 comparisons .*: 62\.7\s% \(4\d"))
    expect(released).to_contain_text(re.compile(r"2 over 1: 64\.5\s% .*; 3 over 2: 62\.7\s% "))
    for plot in (course, released):
        width = plot.locator("img").evaluate("async (image) => { await image.decode(); return image.naturalWidth }")
        assert width > 200


def test_what_changes_is_shown_without_a_reload(server: OperatedServer, open_board: OpenPage) -> None:
    page = open_board()
    page.get_by_role("button", name="Start a canary").focus()
    server.start_canary()
    expect(page.locator("#serving")).to_contain_text("Version 2 serves 10")
    expect(page.locator("#announcer")).to_contain_text("Version 2 serves 10")
    expect(page.get_by_role("button", name="Start a canary")).to_be_focused()
    expect(page.get_by_role("button", name="Start a canary")).to_have_attribute("aria-disabled", "true")
    expect(page.locator("#why-canary")).to_have_text("Version 2 is the canary: promote it or drop it first.")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_hidden()
    server.compare(2, 1, [1, 1, -1])
    expect(page.locator("#verdict")).to_contain_text("2 of 3 blind comparisons")


def test_a_server_that_is_lost_is_told_and_found_again(open_board: OpenPage) -> None:
    page = open_board()
    page.context.set_offline(True)
    lost = page.locator("#lost")
    expect(lost).to_contain_text("The server does not answer. What is shown is as of")
    expect(page.locator("#why-canary")).to_have_text("The server does not answer.")
    expect(page.locator("#connection")).to_be_hidden()
    page.get_by_role("button", name="Start a canary").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.context.set_offline(False)
    expect(lost).to_be_hidden()
    expect(page.locator("#connection")).to_contain_text("Live")


def test_nothing_is_asked_while_nobody_looks(open_board: OpenPage) -> None:
    page = open_board()
    expect(page.locator("#connection")).to_contain_text("Live")
    page.wait_for_load_state("networkidle")
    asked: list[str] = []

    def heard(request: Request) -> None:
        asked.append(request.url)

    hide = "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true }); }"
    page.evaluate(hide, True)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.on("request", heard)
    page.wait_for_timeout(3000)
    assert asked == []
    page.evaluate(hide, False)
    with page.expect_request("**/v1/release"):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def test_only_an_operator_gets_in(server: OperatedServer, open_page: OpenPage) -> None:
    judge, operator = server.make_key(Scope.FEEDBACK), server.make_key(Scope.OPERATOR)
    page = open_page(server.url, labeler=None)
    problem = page.locator("#sign-in-problem")
    expect(page.get_by_label("API key")).to_be_focused()
    expect(problem).to_have_text("")
    for key, said in (("ilk_wrong", "an API key that the server knows"), (judge, "with the scope operator")):
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Sign in").click()
        expect(problem).to_contain_text(said)
        expect(page.locator("#board")).to_be_hidden()
    page.get_by_label("API key").fill(operator)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#serving")).to_have_text("Version 1 serves everyone.")
    page.get_by_role("button", name="Start a canary").click()
    page.get_by_label("Version", exact=True).select_option("2")
    page.get_by_role("button", name="Start canary 2").click()
    expect(row(page, "log", "canary")).to_contain_text("alice")
    kept = page.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage) + document.cookie")
    assert operator not in kept and operator not in page.content()


def test_hostile_text_stays_text(server: OperatedServer, open_board: OpenPage) -> None:
    checks = [GateCheck(name=text, passed=False, value=1, limit=0, sentence=text) for text in HOSTILE]
    publish(server.state, server.state.parent / "model", gate=GateReport.of(checks))
    release = server.start_canary(4, reason=HOSTILE[0])
    server.report(
        ReplicaReport(
            replica=HOSTILE[2],
            generation=release.generation,
            live=(1,),
            failed={4: HOSTILE[3]},
            detail=HOSTILE[4],
        )
    )
    page = open_board()

    def with_tasks(route: Route) -> None:
        told = route.fetch().json()
        told["verdict"]["tasks_down"] = [{"task": text, "wins": 1, "losses": 9} for text in HOSTILE]
        told["verdict"]["said"] = " ".join(HOSTILE)
        route.fulfill(json=told)

    page.route("**/v1/release", with_tasks)
    expect(page.locator("#verdict b")).to_have_count(len(HOSTILE))
    assert page.locator("#verdict b").evaluate_all("all => all.map((one) => one.textContent)") == HOSTILE
    expect(page.locator("#gate tbody th")).to_have_count(len(HOSTILE))
    told = page.locator("#gate tbody th").evaluate_all("cells => cells.map((cell) => cell.textContent)")
    assert told == HOSTILE
    for text in HOSTILE[2:5]:
        expect(page.locator("#servers")).to_contain_text(text)
    expect(page.locator("#log")).to_contain_text(HOSTILE[0])
    page.get_by_role("button", name="Promote version 4").click()
    expect(page.locator("#confirm-evidence")).to_contain_text(HOSTILE[0])
    assert page.locator("main :is(script, iframe, svg, a, style, base, meta, form form)").count() == 0
    assert page.title() == "Release · instructloop"


def test_by_keyboard_alone(server: OperatedServer, open_board: OpenPage) -> None:
    page = open_board()
    expect(page.locator("#release-title")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Start a canary")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Version", exact=True)).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_role("button", name="Start a canary")).to_be_focused()
    assert server.log()[0].verb == "first"
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    for key in ("Tab", "Tab", "Tab", "Tab", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#serving")).to_contain_text("Version 2 serves 10")


def test_a_phone_needs_no_sideways_scrolling(server: OperatedServer, open_board: OpenPage) -> None:
    busy(server)
    server.change(transitions.rollback, "rollback", "carl", "x" * 500)
    page = open_board(phone=True)
    expect(page.locator("#released img")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = page.locator("button:visible, select:visible").evaluate_all(
        "all => all.filter((one) => one.getBoundingClientRect().height < 44).map((one) => one.outerHTML)"
    )
    assert small == []
    page.get_by_role("button", name="Start a canary").tap()
    page.get_by_label("Version", exact=True).select_option("3")
    page.get_by_role("button", name="Start canary 3").tap()
    expect(page.get_by_label("Why go ahead")).to_be_visible()
    box = page.get_by_role("dialog").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390
    tree = page.locator("body").aria_snapshot()
    assert re.search(r"dialog \"Start canary 3\?\"", tree), tree


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_large_and_has_contrast(server: OperatedServer, open_board: OpenPage, dark: bool) -> None:
    busy(server)
    page = open_board(dark=dark)
    expect(page.locator("#released img")).to_be_visible()
    measured = page.evaluate(READABLE)
    assert len(measured) > 100
    assert [text for text in measured if text["pixels"] < 16] == []
    assert [text for text in measured if text["contrast"] < 4.5] == []
    tree = page.locator("body").aria_snapshot()
    for expected in (
        'heading "Release" [level=1]',
        'button "Promote version 3…"',
        'table "Versions"',
        'columnheader "First token"',
        'progressbar "Evidence that it is better"',
        'combobox "of version"',
    ):
        assert expected in tree, tree


def test_the_page_lets_nothing_else_in(server: OperatedServer) -> None:
    page = httpx2.get(server.url)
    policy = page.headers["Content-Security-Policy"]
    assert "img-src 'self' blob:;" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert "blob:" not in httpx2.get(server.server.url).headers["Content-Security-Policy"]
    parts = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    assert len(parts) >= 5
    assert {httpx2.get(server.server.url + part).status_code for part in parts} == {200}
