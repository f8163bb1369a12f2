"""Rounds on disk: ``state/runs/<run>/`` holds what a round was started with, its dataset, and how it ended."""

import random
import shutil
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.files import replace_atomically
from deploy.registry import Registry
from deploy.versions import Version, VersionKind
from train.rounds.frozen import DATASET_FILE

_PLAN, _OUTCOME, _ATTEMPTS = "plan.json", "outcome.json", "attempts.json"


class Plan(BaseModel):
    """What a round was started with; it never changes, whatever happens to log, release and registry meanwhile."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    run: str
    cursor: str
    parent: int
    reference: int
    first_reward_model: int | None
    previous_reward_model: int | None

    @property
    def seed(self) -> int:
        """Of everything drawn in this round."""
        return random.Random(self.run).getrandbits(31)

    def origins(self, registry: Registry) -> list[Version]:
        """The versions it starts from, each once. Raises VersionNotFound, VersionCorrupt."""
        policies, reward_models = {self.parent, self.reference}, {self.first_reward_model, self.previous_reward_model}
        return [
            *(registry.get(VersionKind.POLICY, number) for number in sorted(policies)),
            *(registry.get(VersionKind.REWARD_MODEL, number) for number in sorted(filter(None, reward_models))),
        ]


class Outcome(BaseModel):
    """How a round ended. A refused or failed one keeps its labels for the next."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    status: Literal["passed", "refused", "failed"]
    reasons: tuple[str, ...] = ()
    reward_model: int | None = None
    policy: int | None = None
    finished: float = 0.0


class Attempts(BaseModel):
    """Attempts at a round that began at the same point and that nothing ended: their worker was killed, or broke off.

    A machine without memory kills the worker, whoever starts it again has it killed again, and no outcome tells.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    reached: str = Field(description="what the round had computed when they began")
    killed: int = Field(description="how many there were, the one under way included")
    began: float = Field(description="unix seconds at which the last one began")


class RunDirectory:
    """What a round keeps on disk: ``state/runs/<run>/``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def plan(self) -> Plan:
        """The plan it was begun with."""
        return Plan.model_validate_json((self.path / _PLAN).read_bytes())

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while it has not."""
        path = self.path / _OUTCOME
        return Outcome.model_validate_json(path.read_bytes()) if path.exists() else None

    @property
    def dataset(self) -> Path:
        """The frozen dataset's file; it is missing until the round has built it."""
        return self.path / DATASET_FILE

    def begin(self, plan: Plan) -> None:
        """Write the plan, after which the round exists."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_atomically(self.path / _PLAN, plan.model_dump_json(indent=2).encode())

    def forget(self) -> None:
        """Remove what stages have computed: an unfinished round then begins again on the dataset it has now."""
        for work in self.path.glob("work-*"):
            shutil.rmtree(work)

    def claim(self, token: int) -> Path:
        """The working directory, ``work-<token>``, of the lease's holder: its predecessor's under a new name.

        A predecessor that was only paused finds its directory gone when it wakes; what it still writes harms nobody.
        """
        mine = self.path / f"work-{token}"
        found = sorted(self.path.glob("work-*"), key=lambda path: int(path.name.removeprefix("work-")))
        if found:
            found.pop().rename(mine)
        mine.mkdir(exist_ok=True)
        for leftover in [*mine.glob(".*"), *self.path.glob(".*")]:
            leftover.unlink(missing_ok=True)  # half written, and perhaps still open in the predecessor
        for stale in found:
            shutil.rmtree(stale)
        return mine

    def attempts(self) -> Attempts | None:
        """Attempts that were not ended; None where the last one was."""
        path = self.path / _ATTEMPTS
        return Attempts.model_validate_json(path.read_bytes()) if path.exists() else None

    def begin_attempt(self, work: Path) -> None:
        """Note that an attempt begins; what it computes before it is killed makes the next one the first again."""
        reached = " ".join(f"{path.name}:{path.stat().st_size}" for path in sorted(work.glob("*.json*")))
        before = self.attempts()
        again = before.killed if before is not None and before.reached == reached else 0
        noted = Attempts(reached=reached, killed=again + 1, began=time.time())
        replace_atomically(self.path / _ATTEMPTS, noted.model_dump_json().encode())

    def end_attempt(self) -> None:
        """Note that the attempt has ended: not by being killed, nor by an error that nobody foresaw."""
        (self.path / _ATTEMPTS).unlink(missing_ok=True)

    def conclude(self, outcome: Outcome, work: Path) -> None:
        """Keep the figures and the history, write how it ended, and drop weights and resume point."""
        for figures in work.glob("*.json*"):
            shutil.copy(figures, self.path)
        stamped = outcome.model_copy(update={"finished": time.time()})
        replace_atomically(self.path / _OUTCOME, stamped.model_dump_json(indent=2).encode())
        shutil.rmtree(work)

    @classmethod
    def all(cls, state: Path) -> list["RunDirectory"]:
        """Every round that was begun, in the order of their names."""
        return [cls(path.parent) for path in sorted((state / "runs").glob(f"*/{_PLAN}"))]
