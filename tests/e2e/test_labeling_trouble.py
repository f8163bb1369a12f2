"""The labeling page in trouble (no network, lost replies, keys, hostile text), and for everybody's eyes and ears."""

import re
from collections.abc import Callable

import pytest
from labeling_server import LabelingServer
from labeling_steps import chip, comparison, judged, press
from playwright.sync_api import Page, Route, expect

from feedback.principals import Scope
from feedback.records import Comparison, Prompt

pytest_plugins = ["browser_fixtures"]
OpenPage = Callable[..., Page]

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<svg onload=document.title='owned'></svg>",
    "</div></article><iframe srcdoc='<script>top.document.title=1</script>'></iframe>"
    "<a href=\"javascript:document.title='owned'\">press me</a>",
    "<style>body{display:none}</style><base href='//evil.invalid/'>",
    "<meta http-equiv=refresh content='0;url=//evil.invalid'><link rel=stylesheet href=//evil.invalid>",
    "{{constructor.constructor('document.title=1')()}} ${document.title} `\\u003cscript\\u003e`",
    "\u202eevil\u202c \u2066x\u2069 \u0000 \ufeff a\u0301",
    "&lt;b&gt; &amp; <!-- --> ]]> <form action=//evil.invalid><button>Submit</button></form>",
]


def test_hostile_text_stays_text(labeling: LabelingServer, open_page: OpenPage) -> None:
    labeling.texts = HOSTILE
    labeling.prompts = [Prompt(text=HOSTILE[0] + HOSTILE[3])]
    page = open_page(labeling.url, labeler=HOSTILE[1])
    judged(page)
    page.get_by_label("Answers per prompt").select_option("9")
    labeling.prompts = [Prompt(messages=tuple({"role": text, "content": text} for text in HOSTILE))]
    page.get_by_role("button", name="Skip this prompt").click()
    cards = judged(page, 9)
    told = cards.locator(".text").evaluate_all("texts => texts.map((text) => text.textContent)")
    assert told == HOSTILE
    asked = page.locator("#prompt .text").evaluate_all("texts => texts.map((text) => text.textContent)")
    assert asked == HOSTILE
    assert page.locator("main :is(script, iframe, svg, a, style, base, meta, .text *)").count() == 0
    assert page.title() == "Compare answers · instructloop"
    press(page, "1 2 3 4 5 6 7 8 9 Enter")
    assert [candidate.text for candidate in comparison(labeling).candidates] == HOSTILE
    assert page.title() == "Compare answers · instructloop"


def test_nothing_tells_the_versions_apart(labeling: LabelingServer, open_page: OpenPage) -> None:
    labeling.texts = ["same"] * 4
    page = open_page(labeling.url)
    judged(page)
    alike = page.locator(".answer").evaluate_all(
        "cards => cards.map((card) => card.outerHTML.replace(/(\\D)\\d(?=\\D)/g, '$1#') + card.clientWidth)"
    )
    assert len(set(alike)) == 1
    kept = page.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage) + document.cookie")
    for text in (page.content(), kept):
        assert not re.search(r"policy|cmpl-|_version", text)


def test_without_network_nothing_is_lost_or_doubled(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    judged(page)
    page.context.set_offline(True)
    press(page, "1 2 3 4 Enter")
    expect(page.locator("#outbox")).to_contain_text("1 judgement waits to be sent")
    expect(page.locator("#message-title")).to_have_text("Not now")
    assert labeling.records() == []
    page.context.set_offline(False)
    expect(page.locator("#outbox")).to_be_hidden()
    judged(page)
    assert comparison(labeling).ranking == ((0,), (1,), (2,), (3,))
    expect(page.locator("#today")).to_have_text("1 today")


def test_what_waits_survives_the_page(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    judged(page)
    page.context.set_offline(True)
    press(page, "4 3 2 1 Enter")
    expect(page.locator("#outbox")).to_be_visible()
    page.close()
    page.context.set_offline(False)
    again = page.context.new_page()
    again.goto(labeling.url)
    expect(again.locator("#today")).to_have_text("1 today")
    assert comparison(labeling).ranking == ((3,), (2,), (1,), (0,))


def test_a_reply_lost_after_commit_is_asked_for_again(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    judged(page)
    keys: list[str] = []

    def lose_two_replies(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 2:
            route.continue_()
            return
        assert route.fetch().status in (200, 201)
        route.abort()

    page.route("**/v1/feedback/comparisons", lose_two_replies)
    press(page, "2 = 1 3 4 Enter")
    expect(page.locator("#today")).to_have_text("1 today")
    assert len(keys) == 3 and len(set(keys)) == 1
    assert comparison(labeling).ranking == ((0, 1), (2,), (3,))


def test_an_overloaded_server_is_asked_again_later(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    judged(page)
    refusals = [503, 429, 409]
    body = '{"error": {"message": "later", "type": "overloaded_error", "param": null, "code": null}}'

    def refuse(route: Route) -> None:
        if refusals:
            route.fulfill(status=refusals.pop(), body=body, headers={"Retry-After": "1"})
        else:
            route.continue_()

    sent_to = "**/v1/feedback/comparisons"
    page.route(sent_to, refuse)
    with page.expect_response(sent_to):
        press(page, "1 2 3 4 Enter")
    expect(page.locator("#outbox")).to_contain_text("waits to be sent")
    for _ in range(3):
        with page.expect_response(sent_to):  # pressed while the page is still at the last one, it asks again by itself
            page.get_by_role("button", name="Send now").click()
    assert isinstance(comparison(labeling), Comparison)
    expect(page.locator("#outbox")).to_be_hidden()


def test_what_the_server_refuses_is_shown_until_it_is_discarded(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    judged(page)
    page.route(
        "**/v1/feedback/comparisons",
        lambda route: route.fulfill(
            response=route.fetch(post_data=route.request.post_data_json | {"task_id": "task_gone"})
        ),
    )
    press(page, "1 2 3 4 Enter")
    notice = page.locator("#outbox")
    expect(notice).to_contain_text("did not take your ranking of 4 answers: there is no such task")
    judged(page)
    press(page, "1 2")  # and work goes on
    page.reload()
    expect(notice).to_contain_text("there is no such task")
    page.get_by_role("button", name="Discard").click()
    expect(notice).to_be_hidden()
    assert labeling.records() == []


def test_a_key_is_asked_for_and_kept_nowhere(labeling: LabelingServer, open_page: OpenPage) -> None:
    key = labeling.make_key(Scope.FEEDBACK)
    labeling.run(labeling.app.state.services.access.refresh())
    page = open_page(labeling.url, labeler=None)
    page.get_by_label("Your name or code").fill("L-1")
    page.get_by_label("API key").fill("ilk_wrong")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_have_text("This needs an API key that the server knows.")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Start").click()
    judged(page)
    kept = page.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage) + document.cookie")
    assert key not in kept and key not in page.content()
    assert page.get_by_label("API key").input_value() == ""
    press(page, "1 2")
    page.reload()
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Start").click()
    expect(page.locator(".rank")).to_have_text(["1st1", "2nd2"])
    press(page, "3 4 Enter")
    assert comparison(labeling).principal == "alice"


def test_a_phone_shows_one_column_and_ranks_by_touch(labeling: LabelingServer, open_page: OpenPage) -> None:
    labeling.texts = ["Frogs " + "are green and live by the water. " * 8, "x" * 400, "short", "四" * 200]
    page = open_page(labeling.url, phone=True)
    cards = judged(page)
    boxes = cards.evaluate_all("cards => cards.map((card) => [card.offsetLeft, card.offsetWidth])")
    assert len(boxes) == 4 and all(left == boxes[0][0] and width > 330 for left, width in boxes)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    tray = page.locator("#tray").bounding_box()
    assert tray is not None and tray["height"] < 844 / 3
    small = page.locator("button:visible, select:visible, summary:visible").evaluate_all(
        "all => all.filter((one) => one.getBoundingClientRect().height < 44).map((one) => one.outerHTML)"
    )
    assert small == []
    for number in (3, 1, 4, 2):
        chip(page, number).tap()
    page.get_by_role("button", name="Submit").tap()
    assert comparison(labeling).ranking == ((2,), (0,), (3,), (1,))


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_large_and_has_contrast(labeling: LabelingServer, open_page: OpenPage, dark: bool) -> None:
    page = open_page(labeling.url, dark=dark)
    judged(page)
    press(page, "3 1 =")
    for summary in page.locator("summary").all():
        summary.click()
    measured = page.evaluate(READABLE)
    assert len(measured) > 40
    assert [text for text in measured if text["pixels"] < 16] == []
    assert [text for text in measured if text["contrast"] < 4.5] == []


READABLE = """() => {
    const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => {
        const [R, G, B] = [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * R + 0.7152 * G + 0.0722 * B;
    };
    const ground = (at) => {
        const color = rgb(getComputedStyle(at).backgroundColor);
        return color.length === 3 || color[3] === 1 || !at.parentElement ? color : ground(at.parentElement);
    };
    const shown = [...document.querySelectorAll("body *")].filter((at) =>
        at.checkVisibility({ visibilityProperty: true }) && at.getBoundingClientRect().height > 1 &&
        [...at.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
    return shown.map((at) => {
        const style = getComputedStyle(at);
        const [a, b] = [light(rgb(style.color)), light(ground(at))].sort((x, y) => y - x);
        const text = at.textContent.trim().slice(0, 30);
        return { text, pixels: parseFloat(style.fontSize), contrast: (a + 0.05) / (b + 0.05) };
    });
}"""
"""Every visible element with text of its own: its font size, and the contrast (WCAG 2) with what it stands on."""


def test_everything_has_a_name_for_those_who_listen(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    judged(page)
    press(page, "3 1 = 2")
    tree = page.locator("body").aria_snapshot()
    for expected in (
        'button "Answer 2, 2nd, tied with 1"',
        'article "Answer 4"',
        'region "Your ranking"',
        'list "Ranks, best first"',
        'heading "Prompt" [level=1]',
        'button "Keys and help"',
    ):
        assert expected in tree, tree
    assert not re.search(r"- (button|textbox|checkbox|radio|combobox)(:| \[|$)", tree, re.MULTILINE)
