import contextlib
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.errors import TransitionRefused
from deploy.release import Attempt, Release, canary, first, promote, rollback

ONE = Release(stable=1, generation=3)
TRIAL = Release(stable=1, canary=2, canary_fraction=0.1, previous=7)


def test_the_first_version_becomes_stable_once() -> None:
    assert first(Release(), 4).stable == 4
    with pytest.raises(TransitionRefused, match="version 1 is stable"):
        first(ONE, 4)


def test_a_canary_takes_its_fraction_and_leaves_the_rest() -> None:
    started = canary(ONE, 2, 0.1)
    assert (started.stable, started.canary, started.canary_fraction) == (1, 2, 0.1)
    assert started.live() == (1, 2)
    assert canary(ONE, 2, 0.5).canary_fraction == 0.5


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.5000001, 1.0, float("nan")])
def test_a_canary_fraction_is_above_zero_and_at_most_half(fraction: float) -> None:
    with pytest.raises(TransitionRefused, match="fraction"):
        canary(ONE, 2, fraction)


@pytest.mark.parametrize(
    ("release", "number", "why"),
    [
        (Release(), 2, "no stable"),
        (ONE, 1, "is the stable"),
        (TRIAL, 3, "version 2 is the canary"),
        (TRIAL, 2, "canary"),
    ],
)
def test_a_canary_is_refused(release: Release, number: int, why: str) -> None:
    with pytest.raises(TransitionRefused, match=why):
        canary(release, number, 0.1)


def test_promotion_keeps_the_way_back() -> None:
    promoted = promote(TRIAL)
    assert (promoted.stable, promoted.canary, promoted.canary_fraction, promoted.previous) == (2, None, 0.0, 1)
    with pytest.raises(TransitionRefused, match="no canary"):
        promote(promoted)


def test_a_rollback_drops_the_canary_first_and_never_swings_back() -> None:
    dropped = rollback(TRIAL)
    assert (dropped.stable, dropped.canary, dropped.canary_fraction, dropped.previous) == (1, None, 0.0, 7)
    returned = rollback(dropped)
    assert (returned.stable, returned.previous) == (7, None)
    with pytest.raises(TransitionRefused, match="neither"):
        rollback(returned)


VERBS = st.one_of(
    st.builds(lambda number, share: partial(canary, number=number, fraction=share), st.integers(1, 5), st.just(0.1)),
    st.sampled_from([promote, rollback]),
)


@settings(deadline=None)
@given(st.lists(VERBS))
def test_whatever_operators_do_something_is_stable_and_never_its_own_canary(
    verbs: list[Callable[[Release], Release]],
) -> None:
    release = first(Release(), 1)
    for verb in verbs:
        with contextlib.suppress(TransitionRefused):
            release = verb(release)
        assert release.stable is not None
        assert release.canary != release.stable
        assert (release.canary is None) == (release.canary_fraction == 0)


def test_an_attempt_is_read_from_its_stream_entry() -> None:
    entry = {"verb": "canary", "by": "ann", "reason": "", "outcome": "accepted", "generation": "4", "previous": ""}
    attempt = Attempt.of("1500-0", entry)
    assert (attempt.generation, attempt.accepted, attempt.at) == (4, True, 1.5)
    assert not Attempt.of("1500-1", entry | {"outcome": "refused: no"}).accepted
