"""Trainers in processes of their own, and slices of their work that take turns.

In each round every trainer has one slice; every other round goes backwards (A B, B A), so that a machine that grows
slower is no trainer's fault. A ratio is always of two slices of the same round.
"""

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servers import BenchFailed

_HERE = Path(__file__).parent
_END_SECONDS = 30.0


@dataclass(frozen=True)
class Slice:
    """Some steps of one trainer.

    Attributes:
        items: Pairs or episodes that were learnt from.
        seconds, cpu_seconds: From the first step's start to the last one's end; CPU time of the process.
        parts: Seconds by what they were spent on, where the trainer says.
    """

    items: int
    seconds: float
    cpu_seconds: float
    parts: dict[str, float]

    @property
    def per_second(self) -> float:
        return self.items / self.seconds

    @property
    def per_cpu_second(self) -> float:
        return self.items / self.cpu_seconds


@dataclass(frozen=True)
class Trainer:
    """A process that trains what it is told, see ``train_turns``."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """Have it train and wait for its answer. Raises BenchFailed with the end of its log where it does not."""
        answer = self._tell(what) if self.process.poll() is None else ""
        if not answer:
            raise BenchFailed(f"{self.name} ended instead of training; its log:\n{self.log.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def stop(self) -> None:
        """End what it is training; the process stays."""
        assert self.process.stdin is not None
        self.process.stdin.write('{"steps": 0}\n')
        self.process.stdin.flush()

    def _tell(self, what: Mapping[str, Any]) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and answers nothing
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        return self.process.stdout.readline()


@contextmanager
def trainer(name: str, python: Path, script: str, home: Path) -> Iterator[Trainer]:
    """The trainer in ``script``, on one thread of a CPU and without network; ended on leaving."""
    log = home / f"{name.replace(' ', '-')}.log"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home / "hugging-face"),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    with log.open("a") as err:
        process = subprocess.Popen(
            [python, _HERE / script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            env=environment,
        )
    try:
        yield Trainer(name, process, log)
    finally:
        process.kill()
        process.wait(_END_SECONDS)


@dataclass(frozen=True)
class Turn:
    """What one trainer does in a comparison.

    Attributes:
        asked: What it is told to train.
        steps: Of a slice.
        items: Pairs or episodes of a step.
    """

    trainer: Trainer
    asked: Mapping[str, Any]
    steps: int
    items: int


def take_turns(turns: Mapping[str, Turn], rounds: int, tick: Callable[[], None]) -> dict[str, list[Slice]]:
    """Slices of each of ``turns`` by its name, after one step each to warm up; ``tick`` is called after each slice."""
    for turn in turns.values():
        turn.trainer.ask({**turn.asked, "steps": 1})
        tick()
    slices: dict[str, list[Slice]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in reversed(list(turns)) if number % 2 else turns:
            turn = turns[name]
            slices[name].append(Slice(items=turn.steps * turn.items, **turn.trainer.ask({"steps": turn.steps})))
            tick()
    for turn in turns.values():
        turn.trainer.stop()
    return slices


def ratios(ours: Sequence[Slice], theirs: Sequence[Slice]) -> dict[str, list[float]]:
    """How many times faster ours was in each round: by the clock, and by CPU time, which other load disturbs less."""
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "clock": [one.per_second / other.per_second for one, other in pairs],
        "cpu": [one.per_cpu_second / other.per_cpu_second for one, other in pairs],
    }


def median_rate(slices: Sequence[Slice]) -> float:
    """Items a second by the clock, the median of slices."""
    return statistics.median(one.per_second for one in slices)
