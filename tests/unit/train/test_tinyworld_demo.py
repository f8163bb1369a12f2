"""What the demo calls a success."""

from dataclasses import replace

import pytest

from train.tinyworld.demo import Outcome, rows, title

QUALITY = dict.fromkeys(
    ("gold", "toxic", "false_claims", "answered_known", "refused_unknown", "unfinished", "words"), 0.5
)
GOOD = Outcome(
    seed=0,
    stable_version=2,
    win_rate={"mean": 0.66, "low": 0.64, "high": 0.68},
    before=QUALITY,
    after=QUALITY,
    requests_total=100,
)


def test_a_good_outcome_passes() -> None:
    assert GOOD.passed


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, requests_failed=1),
        replace(GOOD, stable_version=1),
        replace(GOOD, win_rate={"mean": 0.62, "low": 0.6, "high": 0.64}),
        replace(GOOD, win_rate={}),
    ],
)
def test_anything_less_does_not(bad: Outcome) -> None:
    assert not bad.passed


def test_the_table_says_what_was_found() -> None:
    assert title(GOOD) == "version 2 over version 1: 0.660 [0.640, 0.680] by gold"
    assert ("requests served / failed", "", "100 / 0") in rows(GOOD)
