"""A round whose worker is killed at random changes of the disk ends as one that nobody disturbed, and ends once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_loop import tiny_loop

from deploy.versions import Version, VersionKind
from train.rounds.datasets import Dataset
from train.rounds.reproduce import rebuild
from train.running.progress import silent
from train.settings import TrainSettings

DOOMED = Path(__file__).parents[1] / "doomed_worker.py"


def no_log(version: Version, settings: TrainSettings) -> Dataset:
    pytest.fail("the frozen dataset is there")


async def test_kills_lose_nothing_and_publish_nothing_twice(state_dir: Path, redis_url: str, tmp_path: Path) -> None:
    async with tiny_loop(state_dir, redis_url, tmp_path) as loop:
        await loop.compare(60)
        command = [sys.executable, str(DOOMED), str(state_dir), redis_url, "3"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        deaths = [line for line in done.stdout.splitlines() if line.startswith(("os.", "open "))]
        assert len(deaths) >= 4, done.stdout + done.stderr[-2000:]

        (run,) = loop.runs()
        assert run.outcome is not None, deaths
        assert (run.outcome.status, run.outcome.reward_model, run.outcome.policy) == ("passed", 1, 2)
        assert not list(run.path.glob(".*")), "nothing half written is left"
        assert loop.registry.numbers(VersionKind.REWARD_MODEL) == [1]
        assert loop.registry.numbers(VersionKind.POLICY) == [1, 2]
        for kind, number in ((VersionKind.REWARD_MODEL, 1), (VersionKind.POLICY, 2)):
            version = loop.registry.get(kind, number)
            loop.registry.verify(version)
            again = rebuild(loop.registry, version, state_dir / "runs", no_log, silent)
            assert again.equal, f"{version} is not what an undisturbed run gives; killed before: {deaths}"
        published = {(one.kind, one.version) for one in await loop.stores.releases.history() if one.verb == "publish"}
        assert published == {("reward_model", 1), ("policy", 2)}
