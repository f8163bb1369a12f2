import asyncio
import json
import logging
from pathlib import Path

import pytest
import torch

from train.rounds.repeating import meanwhile
from train.rounds.run_progress import RunProgress
from train.settings import WorkerSettings
from train.worker import failure, is_due

SETTINGS = WorkerSettings(min_new_comparisons=100, interval_seconds=3600)


@pytest.mark.parametrize(
    ("comparisons", "seconds", "due"),
    [(99, 3599, False), (100, 0, True), (1, 3600, True), (0, 1e9, False), (99, 3600, True)],
)
def test_a_round_is_due_by_count_or_by_time_but_never_for_nothing(comparisons: int, seconds: float, due: bool) -> None:
    assert is_due(comparisons, seconds, SETTINGS) is due


def test_progress_is_shown_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "round-5-1"
    run.mkdir()
    with caplog.at_level(logging.INFO):
        progress = RunProgress(run)
        progress("ppo", 1, 4, {"score": 0.5, "unspoken": 1.0})
        shown = json.loads((run / "progress.json").read_bytes())
        assert (shown["run"], shown["stage"], shown["done"], shown["total"]) == ("round-5-1", "ppo", 1, 4)
        assert shown["numbers"] == {"score": 0.5, "unspoken": 1.0}
        assert shown["seconds_left"] >= 0
        progress("ppo", 4, 4, {"score": 0.7})
    assert json.loads((run / "progress.json").read_bytes())["done"] == 4
    assert "ppo 4/4 score 0.7" in caplog.text
    assert "unspoken" not in caplog.text


def test_memory_that_ran_out_is_called_that() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    assert failure(refused.value).startswith("out of memory: ")
    assert failure(MemoryError()) == "out of memory: MemoryError"
    assert failure(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")).startswith("out of memory: CUDA")
    assert (
        failure(RuntimeError("CUDA error: an illegal access\nstack")) == "RuntimeError: CUDA error: an illegal access"
    )


async def test_what_is_done_meanwhile_is_let_end() -> None:
    began, ended = 0, 0

    async def work() -> bool:
        nonlocal began, ended
        began += 1
        await asyncio.sleep(0.05)
        ended += 1
        return True

    async with meanwhile(work, 0.01):
        while began < 2:
            await asyncio.sleep(0.01)
    assert began == ended > 1
    await asyncio.sleep(0.1)
    assert began == ended, "nothing is done afterwards"

    async def once() -> bool:
        nonlocal began
        began += 1
        return False

    async with meanwhile(once, 0.01):
        while began == ended:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
    assert began == ended + 1
