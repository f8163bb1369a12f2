import math

import numpy as np
import pytest

from deploy.arms import ArmFigures
from deploy.rails import lower_bound, rail_hit, upper_bound
from deploy.settings import RailSettings

SETTINGS = RailSettings()
STABLE = ArmFigures(
    requests=1000, errors=2, timed=1000, slower=(900, 300, 40, 10, 4, 1, 0, 0), completions=1000, unfinished=30
)


def canary(**changes: object) -> ArmFigures:
    """Runs as the stable version does, on a fifth of the traffic; changed by keyword."""
    same = {
        "requests": 200,
        "errors": 0,
        "timed": 200,
        "slower": (180, 60, 8, 2, 1, 0, 0, 0),
        "completions": 200,
        "unfinished": 6,
    }
    return ArmFigures.model_validate(same | changes)


def test_figures_add_up() -> None:
    both = ArmFigures.total([STABLE, canary(errors=1, unrecorded=3)])
    assert (both.requests, both.errors, both.completions, both.unfinished, both.unrecorded) == (1200, 3, 1200, 36, 3)
    assert both.slower == (1080, 360, 48, 12, 5, 1, 0, 0)
    assert ArmFigures.total([]) == ArmFigures()


def test_the_bound_is_where_the_wealth_reaches_one_over_alpha() -> None:
    """0 of n: the wealth of betting against p is B(½, n + ½) / π / (1 − p)^n; for n = 1 that is ½ / (1 − p)."""
    assert upper_bound(0, 1, 0.1) == pytest.approx(1 - 0.5 * 0.1)
    assert lower_bound(1, 1, 0.1) == pytest.approx(0.5 * 0.1)
    # n = 2: B(½, 2½) = Γ(½)Γ(2½)/Γ(3) = ¾π/2, so the wealth is ⅜ / (1 − p)².
    assert upper_bound(0, 2, 0.1) == pytest.approx(1 - math.sqrt(0.375 * 0.1))
    assert (lower_bound(0, 5, 0.1), upper_bound(5, 5, 0.1)) == (0.0, 1.0)
    assert 0.7 < lower_bound(10**7 - 1, 10**7, 0.01) < upper_bound(10**7 - 1, 10**7, 0.01) <= 1.0


def test_the_bounds_hold_at_all_looks_at_once() -> None:
    """400 arms of true share 0.1, looked at after each of 500 requests: few ever leave their bounds."""
    counts = (np.random.default_rng(5).random((400, 500)) < 0.1).cumsum(1)
    low = np.array([[lower_bound(k, n, 0.1) for k in range(n + 1)] + [0.0] * (500 - n) for n in range(1, 501, 20)])
    high = np.array([[upper_bound(k, n, 0.1) for k in range(n + 1)] + [1.0] * (500 - n) for n in range(1, 501, 20)])
    looks = np.arange(0, 500, 20)
    seen = counts[:, looks]
    outside = (low[np.arange(25), seen] > 0.1) | (high[np.arange(25), seen] < 0.1)
    assert outside.any(1).mean() <= 0.1


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"errors": 40}, "requests failed: 40 of 200 (20.0%), against 2 of 1000 (0.2%)"),
        ({"slower": (200, 200, 200, 150, 20, 0, 0, 0)}, "first tokens later than 0.1 s"),
        ({"unfinished": 90}, "completions without an end of their own: 90 of 200"),
        ({"unrecorded": 30}, "completions not recorded: 30 of 200"),
    ],
)
def test_each_rail_holds_a_canary_that_runs_worse(changes: dict[str, object], what: str) -> None:
    assert rail_hit(canary(), STABLE, SETTINGS) is None
    assert what in (rail_hit(canary(**changes), STABLE, SETTINGS) or "")


@pytest.mark.parametrize(
    "changes", [{"errors": 2}, {"unfinished": 20}, {"slower": (190, 80, 20, 5, 1, 0, 0, 0)}, {"unrecorded": 1}]
)
def test_a_little_worse_is_no_reason_yet(changes: dict[str, object]) -> None:
    assert rail_hit(canary(**changes), STABLE, SETTINGS) is None


def test_few_requests_hold_nobody() -> None:
    assert rail_hit(canary(requests=49, errors=49), STABLE, SETTINGS) is None
    assert rail_hit(canary(requests=50, errors=50), STABLE, SETTINGS) is not None
    young = STABLE.model_copy(update={"requests": 49, "errors": 0})
    assert rail_hit(canary(requests=200, errors=200), young, SETTINGS) is None
    assert rail_hit(ArmFigures(), ArmFigures(), SETTINGS) is None


def test_what_ails_both_arms_is_not_the_canary() -> None:
    """Redis away, the machine overloaded: the stable version fails as often."""
    failing = {"requests": 1000, "errors": 400, "timed": 600, "slower": (600,) * 8}
    assert rail_hit(canary(**failing), STABLE.model_copy(update=failing), SETTINGS) is None
