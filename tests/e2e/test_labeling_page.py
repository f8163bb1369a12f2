"""People compare answers in the page ``/``: with the mouse, by keyboard alone, and with prompts of their own."""

import re
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from labeling_server import LabelingServer
from labeling_steps import chip, comparison, drag, judged, press
from playwright.sync_api import Page, expect

from feedback.records import Comparison, Demonstration, Prompt, Rating, ranking_problem

pytest_plugins = ["browser_fixtures"]
OpenPage = Callable[..., Page]


def test_the_page_lets_nothing_else_in(labeling: LabelingServer) -> None:
    page = httpx2.get(labeling.url)
    parts = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    assert len(parts) >= 5
    for answer in [page, *(httpx2.get(labeling.url + part) for part in parts)]:
        assert answer.status_code == 200
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; ")
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert "://" not in re.sub(r'xmlns="[^"]+"', "", answer.text)  # no outside host
    for outside in ("index.html", "__init__.py", "..%2fapp.py", "..%2f..%2fpyproject.toml", "screenshot.png"):
        refused = httpx2.get(f"{labeling.url}/pages/{outside}")
        assert refused.status_code == 404 and refused.json()["error"]["type"] == "not_found_error"


def test_ranking_by_mouse(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    cards = judged(page)
    drag(page, cards.nth(2).locator(".number"), page.locator("[data-drop='gap:0']"))
    drag(page, chip(page, 1), page.locator("[data-drop='gap:1']"))
    drag(page, chip(page, 2), page.locator("[data-drop='gap:0']"))  # better than both
    drag(page, chip(page, 4), page.locator("[data-drop='group:1']"))  # tied with 3
    expect(page.locator(".rank")).to_have_text(["1st2", "2nd34", "3rd1"])
    expect(cards.nth(3).locator(".place")).to_have_text("2nd tied")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#today")).to_have_text("1 today")
    record = comparison(labeling)
    assert record.ranking == ((1,), (2, 3), (0,))
    assert (record.labeler, record.principal, record.source, record.both_bad) == ("L-1", "local", "task", False)
    assert record.duration_ms is not None and record.duration_ms > 0


def test_clicks_rank_and_a_chip_can_be_dragged_out(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    cards = judged(page)
    for place in (1, 0, 3, 2):
        cards.nth(place).locator(".number").click()
    drag(page, chip(page, 4), page.locator("[data-drop='left']"))
    expect(page.locator(".rank")).to_have_text(["1st2", "2nd1", "3rd3"])
    chip(page, 4).click()
    press(page, "Enter")  # submits, although the last press was on a button
    assert comparison(labeling).ranking == ((1,), (0,), (2,), (3,))


def test_ranking_by_keyboard_alone(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url, labeler=None)
    expect(page.get_by_label("Your name or code")).to_be_focused()
    page.keyboard.type("L-1")
    page.keyboard.press("Enter")
    judged(page)
    said = page.locator("#announcer")
    expect(page.locator("#prompt-title")).to_be_focused()
    press(page, "3 1")
    expect(said).to_have_text("Answer 1: 2nd.")
    press(page, "Enter")
    expect(said).to_have_text("Rank 2 more first")
    press(page, "= 4")
    expect(said).to_have_text("Answer 4: 2nd, tied with 1.")
    press(page, "2 z 2")
    expect(said).to_have_text("Answer 2: 3rd. All are ranked: Enter submits.")
    press(page, "5 9")  # there are four
    press(page, "Shift+? 1 Escape")  # the help is open: nothing is ranked behind it
    press(page, "Enter")
    expect(page.locator("#today")).to_have_text("1 today")
    assert comparison(labeling).ranking == ((2,), (0, 3), (1,))


def test_moving_a_rank_with_the_arrow_keys(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    judged(page)
    press(page, "1 2 3 4")
    chip(page, 4).focus()
    press(page, "ArrowLeft")
    expect(page.locator(".rank")).to_have_text(["1st1", "2nd2", "3rd34"])
    press(page, "ArrowLeft ArrowLeft")
    expect(page.locator(".rank")).to_have_text(["1st1", "2nd24", "3rd3"])
    expect(chip(page, 4)).to_be_focused()
    press(page, "Delete")
    expect(page.locator(".rank")).to_have_text(["1st1", "2nd2", "3rd3"])
    press(page, "z z")
    expect(page.locator(".rank")).to_have_text(["1st1", "2nd2", "3rd4", "4th3"])


def test_keys_can_be_turned_off_and_never_act_in_text(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    judged(page)
    page.locator("summary", has_text="Comment").click()
    page.get_by_label("Comment on your ranking").fill("")
    page.keyboard.type("1 = 2? z0")
    expect(page.get_by_label("Comment on your ranking")).to_have_value("1 = 2? z0")
    expect(page.locator(".rank")).to_have_count(0)
    page.get_by_role("button", name="Keys and help").click()
    page.get_by_label("Single keys act").uncheck()
    page.get_by_role("button", name="Close").click()
    press(page, "1")
    expect(page.locator(".rank")).to_have_count(0)


@pytest.mark.parametrize(
    ("keys", "ranking", "both_bad"),
    [
        ("1", ((0,), (1,)), False),
        ("1 2", ((1,), (0,)), False),
        ("=", ((0, 1),), False),
        ("0", ((0, 1),), True),
        ("0 z 2", ((1,), (0,)), False),
    ],
)
def test_two_answers_take_one_key(
    labeling: LabelingServer, open_page: OpenPage, keys: str, ranking: Any, both_bad: bool
) -> None:
    page = open_page(labeling.url)
    judged(page)
    page.get_by_label("Answers per prompt").select_option("2")
    page.get_by_role("button", name="Skip this prompt").click()
    judged(page, 2)
    press(page, f"{keys} Enter")
    record = comparison(labeling)
    assert (record.ranking, record.both_bad) == (ranking, both_bad)


def test_all_bad_of_many_is_a_tie_that_says_so(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    judged(page)
    press(page, "2 0 Enter")
    record = comparison(labeling)
    assert (record.ranking, record.metadata) == (((0, 1, 2, 3),), {"all_bad": "true"})


def test_any_keys_make_a_valid_ranking(labeling: LabelingServer, open_page: OpenPage) -> None:
    """Random steps, finished by ranking what is left; what comes out is what the server's own check accepts."""
    page = open_page(labeling.url, labeler=None)
    made = page.evaluate(
        """async () => {
            const r = await import("/pages/ranking.js");
            let seed = 7;
            const below = (n) => (seed = (seed * 48271) % 2147483647) % n;
            return Array.from({ length: 400 }, () => {
                let ranking = r.unranked(2 + below(8));
                const { count } = ranking;
                for (let step = 0; step < 30; step += 1) {
                    const candidate = below(count);
                    const groups = ranking.groups.length;
                    const steps = [
                        () => r.place(ranking, candidate), () => r.place(ranking, candidate),
                        () => r.tie(ranking), () => r.takeOut(ranking, candidate),
                        () => r.shift(ranking, candidate, below(2) ? 1 : -1),
                        () => (groups ? r.joinGroup(ranking, candidate, below(groups)) : ranking),
                        () => r.insertGroup(ranking, candidate, below(groups + 1)),
                        () => (below(5) ? ranking : r.allBad(ranking)),
                    ];
                    ranking = steps[below(steps.length)]();
                }
                for (let c = 0; c < count; c += 1) {
                    while (r.groupOf(ranking, c) < 0) ranking = r.place(ranking, c);
                }
                return [count, ranking.groups, r.isComplete(ranking)];
            });
        }"""
    )
    assert len({str(groups) for _, groups, _ in made}) > 200
    for count, groups, complete in made:
        assert complete and ranking_problem(tuple(map(tuple, groups)), count) is None, groups


def test_a_reload_loses_nothing(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    first = judged(page).locator(".text").all_inner_texts()
    labeling.texts = ["something", "else", "entirely", "now"]
    press(page, "2 = 3")
    page.locator("summary", has_text="Rate answer 2").click()
    page.get_by_role("group", name="Overall quality").get_by_label("6").check()
    page.locator("summary", has_text="Comment").click()
    page.get_by_label("Comment on your ranking").fill("both say it plainly")
    page.reload()
    assert judged(page).locator(".text").all_inner_texts() == first
    expect(page.locator(".rank")).to_have_text(["1st23"])
    expect(page.get_by_role("group", name="Overall quality").get_by_label("6")).to_be_checked()
    press(page, "z z 4 1 3 Enter")  # undo reaches back over the reload, to the 2
    found = labeling.wait_for_records(2)
    assert isinstance(found[0], Comparison) and isinstance(found[1], Rating)
    assert (found[0].ranking, found[0].comment) == (((1,), (3,), (0,), (2,)), "both say it plainly")


def test_ratings_follow_the_comparison(labeling: LabelingServer, open_page: OpenPage) -> None:
    page = open_page(labeling.url)
    judged(page)
    page.locator("summary", has_text="Rate answer 3").click()
    rating = page.locator("[data-rating='2']")
    rating.get_by_label("Makes things up").check()
    press(page, "1 2 3 4 Enter")
    expect(page.locator(".tray .state")).to_contain_text("Answer 3 has flags but no overall quality")
    rating.get_by_label("2", exact=True).check()
    press(page, "Enter")
    ranked, rated = labeling.wait_for_records(2)
    assert isinstance(ranked, Comparison) and isinstance(rated, Rating)
    assert (rated.overall, rated.flags, rated.labeler) == (2, {"hallucination": True}, "L-1")
    assert rated.candidate.text == ranked.candidates[2].text


def test_a_rating_of_what_no_policy_sampled_goes_nowhere(labeling: LabelingServer, open_page: OpenPage) -> None:
    labeling.golden = True
    page = open_page(labeling.url)
    judged(page)
    page.locator("summary", has_text="Rate answer 1").click()
    page.locator("[data-rating='0']").get_by_label("5", exact=True).check()
    press(page, "1 2 3 4 Enter")
    expect(page.locator("#today")).to_have_text("1 today")
    judged(page)
    expect(page.locator("#outbox")).to_be_hidden()
    assert comparison(labeling).source == "task"


def test_an_answer_of_ones_own(labeling: LabelingServer, open_page: OpenPage) -> None:
    labeling.prompts = [
        Prompt(messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}))
    ]
    page = open_page(labeling.url)
    judged(page)
    expect(page.locator("#prompt .role")).to_have_text(["system", "user"])
    page.locator("summary", has_text="Write a better answer").click()
    page.get_by_label("Your own answer to the prompt").fill("Hello!\n")
    press(page, "Tab")
    page.locator("#prompt-title").click()
    press(page, "0 Enter")
    kinds = {record.kind: record for record in labeling.wait_for_records(2)}
    ranked, written = kinds["comparison"], kinds["demonstration"]
    assert isinstance(ranked, Comparison) and isinstance(written, Demonstration)
    assert (written.completion, written.labeler) == ("Hello!\n", "L-1")
    assert written.prompt.same_question(ranked.prompt)


def test_a_prompt_of_ones_own_is_answered_in_a_stream(labeling: LabelingServer, open_page: OpenPage) -> None:
    labeling.word_seconds = 0.15
    page = open_page(labeling.url)
    judged(page)
    page.get_by_role("button", name="Ask").click()
    page.get_by_label("Your prompt").fill("Which frog is green?")
    page.locator("#ask button").click()
    streaming = page.locator(".answer.waiting .text")
    expect(streaming.first).to_have_text("Frog")  # the first word is there before the last
    expect(page.locator("#prompt")).to_have_text("Which frog is green?")
    cards = judged(page)
    assert cards.locator(".text").all_inner_texts() == labeling.texts[:4]
    page.reload()
    judged(page)
    press(page, "4 3 2 1 Enter")
    expect(page.get_by_label("Your prompt")).to_be_focused()
    record = comparison(labeling)
    assert (record.source, record.ranking) == ("choices", ((3,), (2,), (1,), (0,)))
    assert record.prompt.messages == ({"role": "user", "content": "Which frog is green?"},)


def test_stopping_a_stream_gives_the_prompt_back(labeling: LabelingServer, open_page: OpenPage) -> None:
    labeling.word_seconds = 0.5
    page = open_page(labeling.url)
    judged(page)
    page.get_by_role("button", name="Ask").click()
    page.get_by_label("Your prompt").fill("Which frog?")
    page.locator("#ask button").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_label("Your prompt")).to_have_value("Which frog?")
    assert labeling.records() == []
