from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from feedback import summary as summaries
from feedback.labelers import assess
from feedback.preference import compare
from feedback.records import Candidate, Comparison, Demonstration, Erasure, LogRecord, Prompt, Rating, name_digest
from feedback.store import LogEntry
from feedback.summary import Summary, Tally

MakeComparison = Callable[..., Comparison]
DAY = 24 * 3600 * 1000
_NUMBERS = count()


def tallied(*records: LogRecord, day: int = 0) -> Summary:
    tally = Tally()
    tally.add(LogEntry(f"{day * DAY + place}-0", record) for place, record in enumerate(records, 1))
    return tally.summary()


def blind(winner: int, loser: int, prompt: str = "p", labeler: str = "L", **changes: Any) -> Comparison:
    number = next(_NUMBERS)
    return Comparison(
        id=f"cmp_{number}",
        created=1.0,
        principal="alice",
        labeler=labeler,
        prompt=Prompt(text=prompt),
        source="task",
        task_id=f"task_{number}",
        candidates=tuple(
            Candidate(completion_id=f"cmpl-{number}-{version}", policy_version=version, text=f"text of {version}")
            for version in (winner, loser)
        ),
        ranking=((0,), (1,)),
    ).model_copy(update=changes)


def rated(version: int, labeler: str = "L", **judgement: Any) -> Rating:
    candidate = Candidate(completion_id=f"cmpl-{next(_NUMBERS)}", policy_version=version, text="t")
    return Rating(
        id="rat_1", created=1, principal="a", labeler=labeler, prompt=Prompt(text="p"), candidate=candidate, **judgement
    )


def corrected(version: int) -> Demonstration:
    candidate = Candidate(policy_version=version, text="t")
    return Demonstration(
        id="demo_1", created=1, principal="a", labeler="W", prompt=Prompt(text="p"), completion="c", corrects=candidate
    )


def test_nothing_is_all_zero() -> None:
    told = tallied()
    assert (told.head, told.comparisons, told.days, told.labelers, told.version_pairs) == ("0-0", 0, [], [], [])
    assert (told.agreement.agreement, told.agreement.alpha) == (None, None)
    assert Summary.model_validate_json(told.model_dump_json()) == told


def test_counts_by_kind_day_labeler_and_version() -> None:
    tally = Tally()
    flags: Any = {"hallucination": True, "harmful_advice": False}
    records: list[LogRecord] = [
        blind(1, 2),
        blind(1, 3, labeler="M"),
        corrected(1),
        rated(2, overall=6, flags=flags),
        rated(2, overall=3),
    ]
    records += [rated(2, thumb="down"), Erasure(id="era_1", created=1, principal="root", erased=name_digest("bob"))]
    tally.add(LogEntry(f"{place * DAY // 2}-0", record) for place, record in enumerate(records))
    told = tally.summary()
    assert (told.comparisons, told.demonstrations, told.ratings, told.erasures) == (2, 1, 3, 1)
    assert [(day.day, day.comparisons, day.demonstrations, day.ratings) for day in told.days] == [
        ("1970-01-01", 2, 0, 0),
        ("1970-01-02", 0, 1, 1),
        ("1970-01-03", 0, 0, 2),
    ]
    assert {one.labeler: one.records for one in told.labelers} == {"L": 4, "M": 1, "W": 1}
    assert told.labelers_total == 3
    assert {one.version: (one.comparisons, one.corrections, one.ratings) for one in told.versions} == {
        1: (2, 1, 0),
        2: (1, 0, 3),
        3: (1, 0, 0),
    }
    [two] = [one for one in told.versions if one.version == 2]
    assert (two.overall, two.thumbs_up, two.thumbs_down, two.flags) == (4.5, 0, 1, {"hallucination": 1})
    assert told.head == f"{3 * DAY}-0"


def test_statistics_are_those_of_the_whole_records() -> None:
    """What the tally keeps of a comparison is all that statistics see of it."""
    compared = [
        blind(
            1 + number % 2,
            2 - number % 2,
            prompt=f"p{number % 7}",
            labeler=f"L-{number % 5}",
            duration_ms=200 + 900 * (number % 3),
            candidates=tuple(
                Candidate(completion_id=f"c{number // 5}-{v}", policy_version=v, text="word " * (30 * v))
                for v in (1, 2)
            ),
        )
        for number in range(60)
    ]
    compared = [one.model_copy(update={"prompt": Prompt(text=f"p{place // 5}")}) for place, one in enumerate(compared)]
    outside = tuple(Candidate(text=text) for text in ("one", "two"))
    compared += [blind(1, 2, labeler=f"L-{n}", source="outside", task_id=None, candidates=outside) for n in range(5)]
    told, whole = tallied(*compared), assess(compared)
    assert told.agreement.agreement is not None and whole.agreement is not None
    assert told.agreement.agreement.value == pytest.approx(whole.agreement.value)
    assert told.agreement.alpha == pytest.approx(whole.alpha)
    for labeler in told.labelers:
        assert labeler.reliability is not None
        assert labeler.reliability.value == pytest.approx(whole.labelers[labeler.labeler].reliability.value)
    [pair], expected = told.version_pairs, compare(compared, 1, 2)
    assert (pair.a, pair.b, pair.wins, pair.losses) == (1, 2, expected.wins, expected.losses)
    assert pair.win_rate is not None and expected.win_rate is not None
    assert (pair.win_rate.value, pair.win_rate.low, pair.win_rate.n) == (
        expected.win_rate.value,
        expected.win_rate.low,
        expected.win_rate.n,
    )


def test_a_replaced_comparison_counts_as_a_record_but_not_as_a_judgement() -> None:
    first = blind(1, 2)
    told = tallied(first, first.model_copy(update={"id": "cmp_again", "ranking": ((1,), (0,))}))
    assert (told.comparisons, told.agreement.comparisons) == (2, 1)
    [pair] = told.version_pairs
    assert (pair.wins, pair.losses) == (0, 1)


def test_a_repeat_measures_its_labeler_and_counts_for_no_version() -> None:
    first = blind(1, 2)
    told = tallied(
        first, first.model_copy(update={"id": "cmp_again", "task_id": "task_again", "ranking": ((1,), (0,))})
    )
    assert (told.agreement.comparisons, told.agreement.repeats) == (1, 1)
    [pair] = told.version_pairs
    assert (pair.wins, pair.losses) == (1, 0)
    assert told.labelers[0].repeats is not None and told.labelers[0].repeats.value == 0


def test_golden_answers_measure_labelers() -> None:
    texts = (Candidate(text="right"), Candidate(text="wrong"))
    golden = blind(1, 2, source="outside", task_id=None, labeler="root", metadata={"golden": "true"}, candidates=texts)
    good = blind(1, 2, labeler="good", candidates=texts)
    bad = blind(1, 2, labeler="bad", candidates=texts, ranking=((1,), (0,)))
    told = tallied(golden, good, bad)
    assert told.agreement.golden == 1
    shares = {one.labeler: one.golden.value for one in told.labelers if one.golden is not None}
    assert (shares["good"], shares["bad"]) == (1, 0)


def test_windows_hold_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summaries, "MAX_ASSESSED", 3)
    monkeypatch.setattr(summaries, "MAX_PAIR_COMPARISONS", 2)
    monkeypatch.setattr(summaries, "MAX_VERSION_PAIRS", 1)
    monkeypatch.setattr(summaries, "MAX_LABELERS", 1)
    told = tallied(blind(5, 6), *(blind(1, 2, prompt=f"p{n}", labeler=f"L-{n % 3}") for n in range(5)))
    assert (told.comparisons, told.agreement.comparisons) == (6, 3)
    assert [(pair.a, pair.b, pair.wins) for pair in told.version_pairs] == [(1, 2, 2)]
    assert ([one.labeler for one in told.labelers], told.labelers_total) == (["L-0"], 4)


def test_what_would_join_too_many_candidates_is_left_out_and_counted() -> None:
    """A chain of overlapping comparisons of one prompt would make the statistics' time grow with its cube."""
    chain = [
        blind(1, 2, candidates=tuple(Candidate(completion_id=f"c{n + step}", text="t") for step in (0, 1)))
        for n in range(200)
    ]
    told = tallied(*chain)
    assert told.agreement.comparisons + told.agreement.left_out == 200
    assert 1 <= told.agreement.comparisons < 200
    apart = [
        blind(1, 2, prompt=f"p{n}", candidates=tuple(Candidate(completion_id=f"c{n}-{s}", text="t") for s in (0, 1)))
        for n in range(200)
    ]
    assert tallied(*apart).agreement.left_out == 0


def test_intervals_without_a_bound_are_null() -> None:
    told = tallied(
        *(blind(1, 2, labeler=f"L-{n}") for n in range(3)), *(blind(2, 1, labeler=f"L-{n}") for n in range(3))
    )
    assert any(one.log_odds is not None and one.log_odds.low is None for one in told.strengths)
    assert "Infinity" not in told.model_dump_json()


def test_a_stream_id_of_any_year_has_a_day() -> None:
    assert tallied(rated(1, overall=1), day=10**9).days[0].day == "9999-12-31"
