"""One round of improvement: refit the reward model, train a policy against it, measure both, publish what passes.

A round is planned once (its cursor into the feedback log, the versions it starts from) and everything after
follows from the plan, so that a round that was killed is finished by running it again. Each stage ends by
writing its figures; a stage whose figures exist is not run again, PPO continues at its resume point, and a
version carries the name of its round, by which the registry never publishes it twice.
"""

import contextlib
import json
import logging
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from deploy.files import replace_atomically
from deploy.gate import GateReport, policy_gate, reward_model_gate
from deploy.registry import Registry
from deploy.settings import GateSettings
from deploy.versions import Draft, Version, VersionKind
from train import evaluate, ppo, reward_model
from train.datasets import Dataset, with_replay
from train.errors import DatasetUnusable, ResumePointUnusable
from train.models import load_tokenizer
from train.progress import Progress
from train.settings import TrainSettings
from train.text import held_out_text, training_text

_LOGGER = logging.getLogger(__name__)
_PLAN, _OUTCOME, _POOL = "plan.json", "outcome.json", "pool.json"

Figures = dict[str, float]
Publish = Callable[[Draft, Path], Version]


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


class Outcome(BaseModel):
    """How a round ended. A refused or failed one keeps its labels for the next."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    status: Literal["passed", "refused", "failed"]
    reasons: tuple[str, ...] = ()
    reward_model: int | None = None
    policy: int | None = None
    finished: float = 0.0


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

    def pool(self) -> list[JsonValue]:
        """The stored prompts at the time of the plan: Redis forgets them, a resumed round must not."""
        prompts: list[JsonValue] = json.loads((self.path / _POOL).read_bytes())
        return prompts

    def begin(self, plan: Plan, pool: list[JsonValue]) -> None:
        """Write the plan, after which the round exists."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_atomically(self.path / _POOL, json.dumps(pool).encode())
        replace_atomically(self.path / _PLAN, plan.model_dump_json(indent=2).encode())

    def claim(self, token: int) -> Path:
        """The working directory, ``work-<token>``, of the lease's holder: its predecessor's under a new name.

        A predecessor that was only paused finds its directory gone when it wakes; what it still writes harms nobody.
        """
        mine = self.path / f"work-{token}"
        found = sorted(self.path.glob("work-*"), key=lambda path: int(path.name.removeprefix("work-")))
        if found:
            found.pop().rename(mine)
        mine.mkdir(exist_ok=True)
        for leftover in mine.glob(".*"):
            leftover.unlink()  # half written, and perhaps still open in the predecessor
        for stale in found:
            shutil.rmtree(stale)
        return mine

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


class Round:
    """The work of one round, in the calling thread."""

    def __init__(
        self,
        plan: Plan,
        work: Path,
        dataset: Dataset,
        registry: Registry,
        settings: TrainSettings,
        gate: GateSettings,
        *,
        publish: Publish,
        progress: Progress,
    ) -> None:
        """Prepare a round.

        Args:
            plan: what the round starts from.
            work: directory for models, figures and resume points; continued where it holds some.
            dataset: of the plan's cursor.
            registry: where the plan's versions are.
            settings: of the stages.
            gate: limits.
            publish: makes a version, if this worker may still do so.
            progress: called after each step; what it raises ends the round where it stands, to be resumed.
        """
        self._plan = plan
        self._work = work
        self._dataset = dataset
        self._registry = registry
        self._settings = settings
        self._gate = gate
        self._publish = publish
        self._progress = progress

    def run(self) -> Outcome:
        """Run what is left of the round.

        Raises:
            TrainError: a stage cannot work with what it was given.
            DeployError: a version is corrupt, or cannot be published.
        """
        self._stage("dataset", lambda: dict(self._dataset.counts))
        fitted = self._reward_model()
        if isinstance(fitted, GateReport):
            return Outcome(status="refused", reasons=tuple(fitted.refusals()))
        policy = self._policy(fitted)
        if isinstance(policy, GateReport):
            return Outcome(status="refused", reasons=tuple(policy.refusals()), reward_model=fitted.number)
        gate = policy.manifest.gate
        reasons = tuple(gate.refusals()) if gate else ()
        status: Literal["passed", "refused"] = "refused" if reasons else "passed"
        return Outcome(status=status, reasons=reasons, reward_model=fitted.number, policy=policy.number)

    def _reward_model(self) -> Version | GateReport:
        """1. Refit, measure beside the previous one, publish if it passes."""
        plan, out = self._plan, self._work / VersionKind.REWARD_MODEL
        first = self._version(VersionKind.REWARD_MODEL, plan.first_reward_model)
        previous = self._version(VersionKind.REWARD_MODEL, plan.previous_reward_model)
        figures = self._stage("reward_model", lambda: self._fit(first, out))
        compared = self._stage("previous_reward_model", lambda: self._measure_previous(previous))
        gate = reward_model_gate(figures, compared or None, self._gate)
        if not gate.passed:
            return gate
        draft = self._draft(VersionKind.REWARD_MODEL, ("reward_model",)).model_copy(
            update={
                "parent": plan.first_reward_model,
                "metrics": figures | {f"previous_{name}": value for name, value in compared.items()},
                "gate": gate,
            }
        )
        return self._publish(draft, out)

    def _fit(self, first: Version | None, out: Path) -> Figures:
        """From the reference policy's weights on everything; later from the first reward model, with replay."""
        settings, dataset = self._settings.reward_model, self._dataset
        if first is None:
            init, ranked = self._policy_version(self._plan.reference).path, [one.ranked for one in dataset.training]
        else:
            init = first.path
            ranked = with_replay(dataset.training, first.manifest.feedback_cursor, self._plan.seed)
            settings = settings.model_copy(update={"epochs": 1})
        return reward_model.run(
            settings,
            init,
            ranked,
            out,
            demonstrations=dataset.demonstrations,
            held_out=dataset.held_out,
            seed=self._plan.seed,
            progress=self._progress,
        )

    def _measure_previous(self, previous: Version | None) -> Figures:
        return evaluate.run_reward_model(previous.path, self._dataset.held_out) if previous else {}

    def _policy(self, fitted: Version) -> Version | GateReport:
        """2. PPO from the parent; measure it and its parent on the same prompts; publish, with what the gate says."""
        plan, out = self._plan, self._work / VersionKind.POLICY
        trained = self._stage("ppo", lambda: self._ppo(fitted, out))
        figures = self._stage("evaluate", lambda: self._measure(out, fitted))
        parent = self._stage("evaluate_parent", lambda: self._measure(self._policy_version(plan.parent).path, fitted))
        gate = policy_gate(figures, parent, self._gate)
        if figures["nonfinite_weights"]:
            return gate
        metrics = figures | {f"parent_{name}": value for name, value in parent.items()}
        draft = self._draft(VersionKind.POLICY, ("ppo", "evaluate")).model_copy(
            update={
                "parent": plan.parent,
                "reward_model": fitted.number,
                "metrics": metrics | {f"ppo_{name}": value for name, value in trained.items()},
                "gate": gate,
                "canary_prompts": evaluate.canary_prompts(self._settings.evaluate, out, self._dataset.held_out_prompts),
            }
        )
        return self._publish(draft, out)

    def _ppo(self, fitted: Version, out: Path) -> Figures:
        parent, reference = self._policy_version(self._plan.parent), self._policy_version(self._plan.reference)
        if not self._dataset.prompts or not self._dataset.held_out_prompts:
            raise DatasetUnusable("no prompt is short enough to sample completions for: see ppo.max_completion_tokens")

        def train() -> Figures:
            return ppo.run(
                self._settings.ppo,
                parent.path,
                reference.path,
                fitted.path,
                self._dataset.prompts,
                out,
                pretraining=training_text(self._settings, load_tokenizer(parent.path), self._plan.seed),
                resume_dir=self._work,
                seed=self._plan.seed,
                progress=self._progress,
            )

        try:
            return train()
        except ResumePointUnusable as error:
            _LOGGER.warning("PPO starts anew: %s", error)
            (self._work / ppo.RESUME_FILE).unlink()
            return train()

    def _measure(self, policy: Path, fitted: Version) -> Figures:
        return evaluate.run(
            self._settings.evaluate,
            policy,
            self._dataset.held_out_prompts,
            reference_dir=self._policy_version(self._plan.reference).path,
            reward_model_dir=fitted.path,
            pretraining=held_out_text(self._settings, load_tokenizer(policy)),
            seed=self._plan.seed,
        )

    def _stage(self, name: str, work: Callable[[], Figures]) -> Figures:
        """The figures of a stage: those on disk where it has finished before, else of ``work``."""
        path = self._work / f"{name}.json"
        with contextlib.suppress(FileNotFoundError):
            figures: Figures = json.loads(path.read_bytes())
            return figures
        self._progress(name, 0, 1, {})
        figures = work()
        replace_atomically(path, json.dumps(figures, indent=2).encode())
        return figures

    def _draft(self, kind: VersionKind, stages: tuple[str, ...]) -> Draft:
        settings = self._settings.model_dump(mode="json")
        return Draft(
            kind=kind,
            run=self._plan.run,
            reference_policy=self._plan.reference,
            feedback_cursor=self._plan.cursor,
            comparisons=len(self._dataset.training),
            demonstrations=len(self._dataset.demonstrations),
            settings={name: settings[name] for name in stages},
            seeds={"run": self._plan.seed},
        )

    def _policy_version(self, number: int) -> Version:
        return self._registry.get(VersionKind.POLICY, number)

    def _version(self, kind: VersionKind, number: int | None) -> Version | None:
        return None if number is None else self._registry.get(kind, number)
