"""A worker that is killed again and again, each time right before some change of the disk, until its round has ended.

``python doomed_worker.py STATE REDIS_URL SEED`` prints a line for each kill: the stage of the round, and the change.
Each life is a fork, so that importing takes its time once. What decides where a life ends is the number of changes
it has made: a random one, of a fixed seed.
"""

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

from redis import Redis
from tiny_loop import SETTINGS, TOLERANT

from deploy.settings import DeploySettings
from feedback.settings import FeedbackSettings
from train.rounds.runs import RunDirectory
from train.rounds.stores import Stores
from train.worker import Worker

UNDAUNTED = SETTINGS.model_copy(update={"worker": SETTINGS.worker.model_copy(update={"backoff_seconds": 0.001})})
CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "open"}
BY_TIME = ("progress.json", "tensorboard", "release.json")
"""Files that are written whenever some time has passed: to count them would make lives end elsewhere each time."""
LONGEST_LIFE = 45
"""Changes; a round that is left alone makes about twice as many."""


def die_at(change: int, state: Path, said: int) -> None:
    """Kill this process right before so many changes under ``state`` have been made, and say before which."""
    left = change

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event not in CHANGES or (event == "open" and not writes(arguments)):
            return
        path = str(arguments[0])
        if not path.startswith(str(state)) or any(name in path for name in BY_TIME):
            return
        left -= 1
        if left == 0:
            os.write(said, f"{event} {path.removeprefix(str(state))}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def writes(arguments: tuple[object, ...]) -> bool:
    """Whether an ``open`` is one for writing."""
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


async def live(state: Path, url: str) -> None:
    """Work until the round has ended."""
    stores = Stores.connect(url, state, UNDAUNTED.worker, FeedbackSettings())
    worker = Worker(state, stores, UNDAUNTED, DeploySettings(gate=TOLERANT))
    while not ended(state):
        await worker.step()
    await stores.close()


def ended(state: Path) -> bool:
    """Whether there is a round, and every one has ended."""
    runs = RunDirectory.all(state)
    return bool(runs) and all(run.outcome is not None for run in runs)


def main(state: Path, url: str, seed: int) -> None:
    """Live until the round has ended."""
    rng = random.Random(seed)
    deadline = time.monotonic() + 120
    while not ended(state) and time.monotonic() < deadline:
        change = rng.randint(1, LONGEST_LIFE)
        child = os.fork()
        if child == 0:
            die_at(change, state, sys.stdout.fileno())
            asyncio.run(live(state, url))
            os._exit(0)
        os.waitpid(child, 0)
        with Redis.from_url(url) as redis:
            redis.delete("train:lease")  # as if its term had run out


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
