"""The controller of the KL coefficient, by hand and in a closed loop."""

import pytest

from train.iteration.kl_control import adapted


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.5), (5.4, 0.495), (6.6, 0.505), (60.0, 0.51), (0.0, 0.49), (-1.0, 0.49)],
)
def test_the_coefficient_moves_by_a_tenth_of_the_error_and_at_most_by_two_percent(kl: float, expected: float) -> None:
    # A horizon of ten iterations is K_β = 0.1; the error KL / target − 1 is cut at ±0.2.
    assert adapted(0.5, kl, target=6.0, horizon=2560, episodes=256) == pytest.approx(expected)


def test_it_finds_the_coefficient_that_keeps_the_target() -> None:
    """Where the KL falls with β as 1/β, the target of 2 is met at β = 0.25, from above and from below."""
    for kl_coef in (0.01, 5.0):
        for _ in range(400):
            kl_coef = adapted(kl_coef, 0.5 / kl_coef, target=2.0, horizon=1000, episodes=100)
        assert kl_coef == pytest.approx(0.25, rel=0.01)
