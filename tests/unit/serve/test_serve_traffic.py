import pytest

from deploy.release import Release
from serve.traffic import pick_version


def test_without_a_canary_everyone_gets_stable() -> None:
    assert pick_version(Release(stable=4, previous=3), "p", "ann", "id") == 4


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_canary_gets_its_share_of_the_people(fraction: float) -> None:
    release = Release(stable=1, canary=2, canary_fraction=fraction)
    people = 4000
    share = sum(pick_version(release, "p", f"user-{n}", "id") == 2 for n in range(people)) / people
    assert share == pytest.approx(fraction, abs=4 * (fraction * (1 - fraction) / people) ** 0.5)


def test_a_person_stays_on_one_arm_whatever_else_changes() -> None:
    for user in map(str, range(50)):
        picked = {
            pick_version(Release(stable=1, canary=2, canary_fraction=0.5, generation=g), "p", user, f"id-{g}")
            for g in range(20)
        }
        assert len(picked) == 1


def test_another_canary_draws_anew() -> None:
    def on_canary(canary: int) -> list[bool]:
        release = Release(stable=1, canary=canary, canary_fraction=0.5)
        return [pick_version(release, "p", str(n), "id") == canary for n in range(200)]

    assert on_canary(2) != on_canary(3)


def test_raising_the_fraction_moves_nobody_back() -> None:
    def on_canary(fraction: float) -> set[int]:
        release = Release(stable=1, canary=2, canary_fraction=fraction)
        return {n for n in range(500) if pick_version(release, "p", str(n), "id") == 2}

    assert on_canary(0.1) < on_canary(0.3) < on_canary(0.5)


def test_who_names_no_user_is_drawn_request_by_request() -> None:
    release = Release(stable=1, canary=2, canary_fraction=0.5)
    assert {pick_version(release, "p", None, f"id-{n}") for n in range(50)} == {1, 2}
