"""Waiting after failures: doubled, bounded, forgotten after a success."""

import time
from pathlib import Path

import pytest

from train.rounds.backoff import Backoff
from train.rounds.runs import Outcome, Plan, RunDirectory


def began(state: Path, name: str, **outcome: object) -> RunDirectory:
    """A round, with its outcome if any is given."""
    run = RunDirectory(state / "runs" / name)
    plan = Plan(run=name, cursor="1-0", parent=1, reference=1, first_reward_model=None, previous_reward_model=None)
    run.begin(plan)
    if outcome:
        (run.path / "outcome.json").write_text(Outcome.model_validate(outcome).model_dump_json())
    return run


def waits(backoff: Backoff, failures: int) -> list[float]:
    found = []
    for _ in range(failures):
        backoff.failed()
        found.append(backoff.seconds_left)
    return found


def test_each_failure_in_a_row_doubles_the_wait() -> None:
    backoff = Backoff(10.0, 1e6)
    assert backoff.seconds_left == 0
    for place, wait in enumerate(waits(backoff, 8)):
        assert 10 * 2**place - 1 < wait <= 12.5 * 2**place
    backoff.succeeded()
    assert (backoff.failures, backoff.seconds_left) == (0, 0)
    assert waits(backoff, 1)[0] <= 12.5


def test_no_wait_is_longer_than_the_longest() -> None:
    assert max(waits(Backoff(10.0, 60.0), 2000)) <= 60.0


def test_workers_that_failed_together_do_not_come_back_together() -> None:
    assert len({round(waits(Backoff(1000.0, 1e6), 1)[0]) for _ in range(20)}) > 5


def test_a_wait_passes() -> None:
    backoff = Backoff(0.05, 1.0)
    backoff.failed()
    time.sleep(0.08)
    assert backoff.seconds_left == 0
    assert backoff.failures == 1


@pytest.mark.parametrize(
    ("statuses", "failures"), [("", 0), ("f", 1), ("pff", 2), ("ffpfr", 0), ("ffr", 0), ("rfff", 3)]
)
def test_failures_before_a_restart_count(tmp_path: Path, statuses: str, failures: int) -> None:
    names = {"p": "passed", "r": "refused", "f": "failed"}
    for place, one in enumerate(statuses):
        began(tmp_path, f"{9 - place}", finished=time.time() - 5 + place / 1e3, status=names[one])
    backoff = Backoff(10.0, 1e6)
    backoff.resume(RunDirectory.all(tmp_path))
    assert backoff.failures == failures
    assert (backoff.seconds_left > 0) == (failures > 0)
    if failures == 1:
        assert 4 < backoff.seconds_left < 7.5, "five seconds of it are over"


def test_a_clock_that_was_set_back_adds_no_wait(tmp_path: Path) -> None:
    began(tmp_path, "1", finished=time.time() + 30 * 86_400, status="failed")
    backoff = Backoff(10.0, 1e6)
    backoff.resume(RunDirectory.all(tmp_path))
    assert 0 < backoff.seconds_left <= 12.5


def test_being_killed_at_the_same_point_again_is_a_failure(tmp_path: Path) -> None:
    run = began(tmp_path, "1")

    def failures_after_a_kill() -> int:
        run.begin_attempt(run.claim(1))
        backoff = Backoff(10.0, 1e6)
        backoff.resume(RunDirectory.all(tmp_path))
        assert (backoff.seconds_left > 0) == (backoff.failures > 0)
        return backoff.failures

    assert [failures_after_a_kill() for _ in range(3)] == [0, 1, 2]
    (run.claim(1) / "reward_model.json").write_text("{}")
    assert [failures_after_a_kill() for _ in range(2)] == [0, 1], "it had got further"
    run.end_attempt()
    assert failures_after_a_kill() == 0, "it was stopped, not killed"
