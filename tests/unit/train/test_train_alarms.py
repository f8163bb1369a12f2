"""Alarms: silent over a good run that was measured, raised by each way in which a run goes wrong."""

from collections.abc import Sequence

import pytest

from train.errors import AlarmRaised
from train.iteration.alarms import check, refuse
from train.settings import AlarmSettings

NAMES = (
    "kl_to_reference",
    "kl_se",
    "eos_share",
    "completion_tokens",
    "explained_variance",
    "entropy",
    "policy_updates",
)
MEASURED = [
    (0.0, 0.0, 0.988, 10.82, -0.139, None, 0),
    (0.0, 0.0, 0.996, 10.30, 0.225, None, 0),
    (0.0, 0.0, 0.996, 10.62, 0.453, None, 0),
    (0.0, 0.0, 0.996, 9.93, 0.631, 0.500, 8),
    (0.228, 0.039, 0.988, 11.75, 0.604, 0.390, 8),
    (0.463, 0.061, 0.992, 11.82, 0.775, 0.317, 8),
    (0.710, 0.069, 0.992, 12.28, 0.855, 0.315, 8),
    (0.965, 0.091, 0.996, 13.18, 0.916, 0.281, 8),
    (1.008, 0.071, 0.996, 13.16, 0.825, 0.217, 8),
    (0.752, 0.072, 0.992, 12.60, 0.940, 0.239, 8),
    (0.861, 0.057, 0.996, 12.89, 0.926, 0.222, 8),
]
"""Iterations 0–6, 12, 18, 24 and 29 of a run of the tiny world."""
GOOD = [{name: x for name, x in zip(NAMES, row, strict=True) if x is not None} for row in MEASURED]
EXACT = 3e-5
"""Nats by which sampler and trainer differed at most in nine such runs."""
LIMITS = AlarmSettings()


def followed_by(times: int, **changes: float) -> list[dict[str, float]]:
    return GOOD + [GOOD[-1] | changes] * times


def raised(history: Sequence[dict[str, float]], settings: AlarmSettings = LIMITS) -> list[str]:
    return [alarm.name for alarm in check(settings, history, EXACT)]


def test_a_good_run_raises_none_at_any_time() -> None:
    assert [raised(GOOD[:length]) for length in range(len(GOOD) + 1)] == [[]] * (len(GOOD) + 1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("explained variance", {"explained_variance": -0.6}),
        ("entropy collapse", {"entropy": 0.04}),
        ("EOS loss", {"eos_share": 0.4}),
        ("length drift", {"completion_tokens": 22.0}),
        ("length drift", {"completion_tokens": 5.0}),
    ],
)
def test_what_lasts_is_raised_and_what_passes_is_not(name: str, changes: dict[str, float]) -> None:
    assert raised(followed_by(4, **changes)) == []
    assert raised(followed_by(5, **changes)) == [name]
    assert raised([*followed_by(5, **changes), GOOD[-1]]) == []
    assert raised(followed_by(4, **changes), AlarmSettings(patience=4)) == [name]
    assert raised(followed_by(9, **changes), AlarmSettings(patience=0)) == []


def test_a_mean_kl_below_zero_is_raised_where_chance_does_not_explain_it() -> None:
    # Five iterations with an error of 0.1 each: their mean has one of 0.1/√5 = 0.0447, four of which are 0.179.
    assert raised(followed_by(5, kl_to_reference=-0.17, kl_se=0.1)) == []
    assert raised(followed_by(5, kl_to_reference=-0.19, kl_se=0.1)) == ["negative KL"]
    assert raised(followed_by(5, kl_to_reference=-0.19, kl_se=0.1), AlarmSettings(negative_kl_errors=5.0)) == []
    assert raised(followed_by(5, kl_to_reference=-1e-6, kl_se=0.0)) == []  # rounding, where the policies are the same


def test_a_policy_that_stays_far_from_its_reference_is_raised_where_a_limit_is_set() -> None:
    limited = AlarmSettings(max_kl=6.0)
    assert raised(followed_by(9, kl_to_reference=12.0)) == []
    assert raised(followed_by(4, kl_to_reference=6.1), limited) == []
    assert raised(followed_by(5, kl_to_reference=6.1), limited) == ["KL drift"]
    assert raised(followed_by(5, kl_to_reference=5.9), limited) == []


def test_iterations_of_the_value_model_alone_are_not_held_against_it() -> None:
    early = [GOOD[0] | {"explained_variance": -9.0}] * 9
    assert raised(early) == []
    assert raised(early + [GOOD[-1] | {"explained_variance": -9.0}] * 5) == ["explained variance"]


def test_one_token_of_which_sampler_and_trainer_say_different_things_is_enough() -> None:
    assert check(LIMITS, [], 0.049) == []
    (alarm,) = check(LIMITS, [], 0.06)
    assert (alarm.name, alarm.number, alarm.limit) == ("sampler gap", 0.06, 0.05)


def test_the_reason_names_every_alarm_its_number_its_limit_and_the_setting() -> None:
    refuse([])
    with pytest.raises(AlarmRaised) as reason:
        refuse(check(LIMITS, followed_by(5, entropy=0.01, eos_share=0.1), EXACT))
    for part in ("entropy collapse", "0.01, limit 0.05", "min_entropy_share", "EOS loss", "0.1, limit 0.494"):
        assert part in str(reason.value)
