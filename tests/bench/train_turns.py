"""How a measured trainer takes turns with others: it stops between steps until it is told to make some more.

Runs in every trainer's process, a peer's too, so it needs the standard library alone. A line of JSON on standard input
names what to train and how many steps to make first; each further line says how many more, and 0 ends that training.
After each of them one line answers on standard output; whatever else is printed goes to standard error.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


class Enough(Exception):
    """No more steps of this training are wanted; raised through the trainer that called ``Turns.step_done``."""


class Turns:
    """The trainer's side. From when it is made, prints of this process go to standard error.

    Attributes:
        parts: Seconds of the steps made since the last answer, by what they were spent on; filled by the trainer.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self.parts: dict[str, float] = {}
        self._left = 0

    def trainings(self) -> Iterator[dict[str, Any]]:
        """What is to be trained, one after the other."""
        for line in sys.stdin:
            asked: dict[str, Any] = json.loads(line)
            self._start(asked["steps"])
            yield asked

    def spent(self, part: str, seconds: float) -> None:
        """Note what a step spent its time on."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def step_done(self) -> None:
        """Call after each step: it waits where the next one is not asked for yet. Raises Enough where none will be."""
        self._left -= 1
        if self._left:
            return
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu
        json.dump({"seconds": seconds, "cpu_seconds": cpu, "parts": self.parts}, self._answers)
        self._answers.write("\n")
        steps: int = json.loads(sys.stdin.readline() or '{"steps": 0}')["steps"]
        if not steps:
            raise Enough
        self._start(steps)

    def _start(self, steps: int) -> None:
        self._left, self.parts = steps, {}
        self._began, self._cpu = time.perf_counter(), time.process_time()


def serve(train: Callable[[Turns, dict[str, Any], Path], None]) -> None:
    """Have ``train`` do all that is asked for, one after the other; its third argument is a directory to write to."""
    turns = Turns()
    for asked in turns.trainings():
        with tempfile.TemporaryDirectory() as out, suppress(Enough):
            train(turns, asked, Path(out))
