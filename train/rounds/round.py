"""One round of improvement: refit the reward model, train a policy against it, measure both, publish what passes.

A round is planned once (its cursor into the feedback log, the versions it starts from) and everything after
follows from the plan, so that a round that was killed is finished by running it again. Each stage ends by
writing its figures; a stage whose figures exist is not run again, PPO continues at its resume point, and a
version carries the name of its round, by which the registry never publishes it twice.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from deploy.files import replace_atomically
from deploy.gate import GateReport, policy_gate, reward_model_gate
from deploy.registry import Registry
from deploy.settings import GateSettings
from deploy.versions import Draft, Version, VersionKind
from train import evaluate
from train.batches import RankedPrompt
from train.errors import DatasetUnusable
from train.measures import completed, win_rate
from train.measures.world import world_of
from train.models import load_tokenizer
from train.report import COMPLETIONS, PARENT_COMPLETIONS
from train.rounds import recipe
from train.rounds.frozen import Frozen
from train.rounds.runs import Outcome, Plan
from train.running.progress import Progress
from train.settings import TrainSettings
from train.text import held_out_text

Figures = dict[str, float]
Publish = Callable[[Draft, Path], Version]


class Round:
    """The work of one round, in the calling thread."""

    def __init__(
        self,
        plan: Plan,
        work: Path,
        frozen: Frozen,
        registry: Registry,
        settings: TrainSettings,
        gate: GateSettings,
        *,
        own: Callable[[], Sequence[RankedPrompt]],
        publish: Publish,
        progress: Progress,
    ) -> None:
        """Prepare a round.

        Args:
            plan: what the round starts from.
            work: directory for models, figures and resume points; continued where it holds some.
            frozen: the dataset of the plan's cursor.
            registry: where the plan's versions are.
            settings: of the stages.
            gate: limits.
            own: reads what labelers said of completions among the parent's own, of held-out prompts alone.
            publish: makes a version, if this worker may still do so.
            progress: called after each step; what it raises ends the round where it stands, to be resumed.
        """
        self._plan = plan
        self._work = work
        self._dataset, self._dataset_sha256 = frozen.dataset, frozen.sha256
        self._registry = registry
        self._settings = settings
        self._gate = gate
        self._own = own
        self._publish = publish
        self._told = progress
        self._step: dict[str, tuple[int, int]] = {}

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
        counts = self._dataset.counts
        figures |= {name: counts[name] for name in ("largest_principal", "principal_allowance") if name in counts}
        figures |= self._stage("evaluate_reward_model", lambda: self._measure_reward_model(out, self._own()))
        compared: Figures = {}
        if previous is not None:
            compared = self._stage("previous_reward_model", lambda: self._measure_reward_model(previous.path))
        gate = reward_model_gate(figures, compared or None, self._gate)
        if not gate.passed:
            return gate
        draft = self._draft(VersionKind.REWARD_MODEL).model_copy(
            update={
                "parent": plan.first_reward_model,
                "metrics": figures | {f"previous_{name}": value for name, value in compared.items()},
                "gate": gate,
            }
        )
        return self._publish(draft, out)

    def _fit(self, first: Version | None, out: Path) -> Figures:
        """From the reference policy's weights on everything; later from the first reward model, with replay."""
        return recipe.refit(
            self._settings,
            self._dataset,
            self._policy_version(self._plan.reference),
            first,
            out,
            seed=self._plan.seed,
            progress=self._progress,
        )

    def _measure_reward_model(self, reward_model: Path, own: Sequence[RankedPrompt] = ()) -> Figures:
        dataset = self._dataset
        return evaluate.run_reward_model(reward_model, dataset.held_out_ranked, anchors=dataset.anchors_ranked, own=own)

    def _policy(self, fitted: Version) -> Version | GateReport:
        """2. PPO from the parent; measure it and its parent on the same prompts; publish, with what the gate says."""
        plan, out = self._plan, self._work / VersionKind.POLICY
        trained = self._stage("ppo", lambda: self._ppo(fitted, out))
        figures = self._stage("evaluate", lambda: self._measure("evaluate", out, fitted, COMPLETIONS))
        before = self._policy_version(plan.parent).path
        parent = self._stage(
            "evaluate_parent", lambda: self._measure("evaluate_parent", before, fitted, PARENT_COMPLETIONS)
        )
        if not figures["nonfinite_weights"]:
            figures |= win_rate.by_completions(
                [completed.read(self._work / COMPLETIONS)], [completed.read(self._work / PARENT_COMPLETIONS)]
            )
        gate = policy_gate(figures, parent, self._gate)
        if figures["nonfinite_weights"]:
            return gate
        metrics = figures | {f"parent_{name}": value for name, value in parent.items()}
        draft = self._draft(VersionKind.POLICY).model_copy(
            update={
                "parent": plan.parent,
                "reward_model": fitted.number,
                "metrics": metrics | {f"ppo_{name}": value for name, value in trained.items()},
                "gate": gate,
                "canary_prompts": evaluate.canary_prompts(self._settings.evaluate, out),
            }
        )
        return self._publish(draft, out)

    def _ppo(self, fitted: Version, out: Path) -> Figures:
        if not self._dataset.prompts or not self._dataset.held_out_prompts:
            raise DatasetUnusable("no prompt is short enough to sample completions for: see ppo.max_completion_tokens")
        return recipe.improve(
            self._settings,
            self._dataset,
            self._policy_version(self._plan.parent),
            self._policy_version(self._plan.reference),
            fitted,
            out,
            resume_dir=self._work,
            seed=self._plan.seed,
            progress=self._progress,
        )

    def _measure(self, name: str, policy: Path, fitted: Version, completions: str) -> Figures:
        """Measure a policy as stage ``name``; what it wrote is kept, for the report and for win rates."""

        def progress(_: str, done: int, total: int, numbers: Figures) -> None:
            self._progress(name, done, total, numbers)

        tokenizer = load_tokenizer(policy)
        return evaluate.run(
            self._settings.evaluate,
            policy,
            self._dataset.held_out_prompt_ids,
            reference_dir=self._policy_version(self._plan.reference).path,
            reward_model_dir=fitted.path,
            pretraining=held_out_text(self._settings, tokenizer),
            seed=self._plan.seed,
            world=world_of(self._settings, tokenizer),
            completions=self._work / completions,
            progress=progress,
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
        self._progress(name, *self._step.get(name, (1, 1)), figures)
        return figures

    def _progress(self, stage: str, done: int, total: int, numbers: Figures) -> None:
        """Tell the caller, and remember where the stage is: its figures belong to its last step."""
        if done:
            self._step[stage] = done, total
        self._told(stage, done, total, numbers)

    def _draft(self, kind: VersionKind) -> Draft:
        """What both versions of a round say alike; with the settings, all that ``reproduce`` needs."""
        return Draft(
            kind=kind,
            run=self._plan.run,
            reference_policy=self._plan.reference,
            feedback_cursor=self._plan.cursor,
            dataset_sha256=self._dataset_sha256,
            comparisons=len(self._dataset.training),
            demonstrations=len(self._dataset.demonstrations),
            settings=self._settings.model_dump(mode="json") | {recipe.THREADS: torch.get_num_threads()},
            seeds={"run": self._plan.seed},
        )

    def _policy_version(self, number: int) -> Version:
        return self._registry.get(VersionKind.POLICY, number)

    def _version(self, kind: VersionKind, number: int | None) -> Version | None:
        return None if number is None else self._registry.get(kind, number)
