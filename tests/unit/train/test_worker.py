import json
import logging
from pathlib import Path

import pytest

from train.settings import WorkerSettings
from train.worker import RunProgress, is_due

SETTINGS = WorkerSettings(min_new_comparisons=100, interval_seconds=3600)


@pytest.mark.parametrize(
    ("comparisons", "seconds", "due"),
    [(99, 3599, False), (100, 0, True), (1, 3600, True), (0, 1e9, False), (99, 3600, True)],
)
def test_a_round_is_due_by_count_or_by_time_but_never_for_nothing(comparisons: int, seconds: float, due: bool) -> None:
    assert is_due(comparisons, seconds, SETTINGS) is due


def test_progress_is_shown_logged_and_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Enough(Exception):
        pass

    told: list[bool] = []

    def check() -> None:
        if told:
            raise Enough

    run = tmp_path / "round-5-1"
    run.mkdir()
    with caplog.at_level(logging.INFO):
        progress = RunProgress(run, check)
        progress("ppo", 1, 4, {"score": 0.5, "unspoken": 1.0})
        shown = json.loads((run / "progress.json").read_bytes())
        assert (shown["run"], shown["stage"], shown["done"], shown["total"]) == ("round-5-1", "ppo", 1, 4)
        assert shown["numbers"] == {"score": 0.5, "unspoken": 1.0}
        assert shown["seconds_left"] >= 0
        progress("ppo", 4, 4, {"score": 0.7})
    assert json.loads((run / "progress.json").read_bytes())["done"] == 4
    assert "ppo 4/4 score 0.7" in caplog.text
    assert "unspoken" not in caplog.text
    told.append(True)
    with pytest.raises(Enough):
        progress("ppo", 4, 4, {})
