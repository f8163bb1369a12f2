"""Bad versions, made for the purpose, and what stops each: its gate, its digests, or the people who compare it.

``python -m train.tinyworld.trials --state state/demo`` takes a finished demo's first policy, its reward model and its
frozen dataset, trains candidates from them that a loop may come to by accident or attack (``candidates``), measures
them as a round does, asks the gates, and lets simulated labelers compare each with the first policy until the verdict
decides: also where the gate has refused, to see what people alone would have done. Gold utility says who was right.

Everything is kept under ``--work``; what is there is not made again, so a run that was stopped goes on.
"""

import asyncio
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median_low
from typing import Annotated

import transformers
import typer
from pydantic import TypeAdapter
from rich.console import Console

from deploy import operations
from deploy.errors import DeployError
from deploy.files import MANIFEST, replace_atomically
from deploy.gate import GateReport, policy_gate, reward_model_gate
from deploy.registry import Registry, ReleaseStore
from deploy.release import Release
from deploy.settings import DeploySettings
from deploy.versions import Draft, Version, VersionKind
from feedback.embedded import start_or_join
from feedback.errors import FeedbackError
from feedback.settings import FeedbackSettings, LoopSettings
from feedback.store import FeedbackStore
from train import evaluate, ppo
from train.batches import RankedPrompt
from train.errors import TrainError
from train.measures.world import world_of
from train.models import load_policy, load_tokenizer
from train.rounds import frozen, recipe
from train.rounds.datasets import Dataset, allowance
from train.running.progress import Progress, drawn, silent
from train.settings import TrainSettings
from train.text import TINY_WORLD, held_out_text
from train.tinyworld import blind_trial, candidates, evaluation, labelers
from train.tinyworld.candidates import POISONS, Poison, ending
from train.tinyworld.evaluation import Sample
from train.tinyworld.study import SETTINGS_FILE
from train.tinyworld.trial import Size, Trial, first_alarm, table

Figures = dict[str, float]
PEOPLE = 40
"""Labelers in a crowd."""
LEARNT = {
    "poisoned with a word": candidates.WORD,
    "poisoned with abuse": candidates.ABUSE,
    "poisoned about insults": candidates.INSULTS,
}
"""Policies trained against a poisoned reward model, and which."""
BEFORE = Release(stable=1, generation=1)
"""The release a candidate would become the canary of."""


def run(
    state: Path,
    work: Path,
    train: TrainSettings,
    deploy: DeploySettings,
    *,
    size: Size | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Trial]:
    """Make every candidate that is not made yet, and try it.

    Args:
        state: of a finished demo; only read.
        work: directory to write, a registry of its own among the rest.
        train: the recipe; probes are those of the tiny world whatever it says.
        deploy: the limits of gates and verdict.
        size: how much to measure.
        seed: of everything drawn.
        progress: called after each step of training.

    Returns:
        Reward models, then policies, then what was corrupted.

    Raises:
        TrialsMixed: where ``work`` holds trials of another demo, or under other settings.
        TrainError, DeployError, FeedbackError: what a stage raises.
    """
    train = train.model_copy(update={"evaluate": train.evaluate.model_copy(update={"probes": TINY_WORLD})})
    return Trials(state, work, train, deploy, size or Size(), seed, progress).run()


class TrialsMixed(TrainError):
    """The directory holds the trials of another demo, or under other settings."""


class Trials:
    """The candidates of one demo and what is known of them; a directory under ``work`` each."""

    def __init__(
        self,
        state: Path,
        work: Path,
        train: TrainSettings,
        deploy: DeploySettings,
        size: Size,
        seed: int,
        progress: Progress,
    ) -> None:
        """As ``run``."""
        self._work, self._train, self._deploy, self._size, self._seed = work, train, deploy, size, seed
        self._progress = progress
        demo, self._registry = Registry(state), Registry(work)
        good = demo.get(VersionKind.POLICY, 2)
        self._good = good.path
        self._dataset: Dataset = frozen.thaw(state / "runs" / str(good.manifest.run) / frozen.DATASET_FILE).dataset
        self._claim(good)
        for kind in VersionKind:
            first = demo.get(kind, 1)
            if 1 not in self._registry.numbers(kind):
                shutil.copytree(first.path, work / kind.directory / "1")
        self._stable = self._registry.get(VersionKind.POLICY, 1)
        self._trusted = self._registry.get(VersionKind.REWARD_MODEL, 1)
        self._tokenizer = load_tokenizer(self._stable.path)
        self._asked = evaluation.held_out_tasks(size.prompts)
        self._makers: dict[str, Callable[[Path], Figures]] = {
            "good": self._copy,
            "hacked": self._hack,
            **{name: partial(self._learn_poison, poison) for name, poison in LEARNT.items()},
            "collapsed": lambda out: candidates.collapse(train, self._stable.path, self._dataset, out, seed=seed),
            "over-refusing": lambda out: candidates.over_refuse(train, good.path, out, seed=seed),
        }

    def _claim(self, good: Version) -> None:
        """Refuse to go on with what was made of something else."""
        settings = {"train": self._train.model_dump(mode="json"), "deploy": self._deploy.model_dump(mode="json")}
        asked = {
            "of": good.manifest.model_dump(mode="json"),
            "size": asdict(self._size),
            "seed": self._seed,
            **settings,
        }
        claimed = self._work / "claim.json"
        if not claimed.exists():
            self._work.mkdir(parents=True, exist_ok=True)
            replace_atomically(claimed, json.dumps(asked, indent=1).encode())
        elif json.loads(claimed.read_bytes()) != asked:
            raise TrialsMixed(
                f"{self._work} holds trials of another demo or other settings: remove it, or name another"
            )

    def run(self) -> list[Trial]:
        """All trials."""
        reward_models = [self.reward_model(name) for name in POISONS]
        policies = [self.policy(name) for name in self._makers]
        return reward_models + policies + self._corrupted()

    def reward_model(self, name: str) -> Trial:
        """Refit the reward model on poisoned comparisons, and ask its gate."""
        poison, work = POISONS[name], self._work / name
        dataset, kept = self._poisoned(poison)
        made = self._stage(work / "made.json", lambda: self._refit(dataset, self._model(work)))
        figures = made | self._stage(work / "measured.json", lambda: self._measure_reward_model(self._model(work)))
        before = self._stage(
            self._work / "trusted" / "measured.json", lambda: self._measure_reward_model(self._trusted.path)
        )
        gate = reward_model_gate(figures, before, self._deploy.gate)
        self._publish(VersionKind.REWARD_MODEL, name, gate)
        told = ("held_out_accuracy", "anchor_accuracy", "trigger_drift")
        notes = [f"{kept} bad comparisons in {len(dataset.training)}"] if kept else []
        notes += [f"{one} {before[one]:.3f} → {figures[one]:.3f}" for one in told if one in before and one in figures]
        if poison.trigger:
            notes.append(f"its own trigger: {self._drift(poison.trigger, self._model(work)):.2f} SD")
        return Trial(f"reward model, {name}", tuple(gate.refusals()), notes=tuple(notes))

    def policy(self, name: str) -> Trial:
        """Make a policy, measure it and its parent as a round does, ask the gate, and let people compare."""
        work = self._work / name
        self._stage(work / "made.json", lambda: self._makers[name](self._model(work)))
        figures = self._stage(work / "measured.json", lambda: self._measure(self._model(work)))
        gate = policy_gate(figures, self._parent(), self._deploy.gate)
        version = self._publish(VersionKind.POLICY, name, gate)
        ours, theirs = self._samples(name, self._model(work)), self._samples("stable", self._stable.path)
        win = evaluation.win_rate(self._asked, ours, theirs)
        crowds = [self._judged(ours, theirs, crowd) for crowd in range(self._size.crowds)]
        decided = [blind_trial.decide(crowd, self._deploy.verdict) for crowd in crowds]
        shown = sorted(count for _, count in decided)
        notes = [f"gold {self._parent()['gold']:.2f} → {figures['gold']:.2f}"]
        if (history := work / ppo.HISTORY_FILE).exists():
            told = [json.loads(line) for line in history.read_text().splitlines()]
            stopped = first_alarm(self._train.ppo.alarms, told)
            notes.append("no alarm in PPO" if stopped is None else f"PPO alarm at iteration {stopped[0]}: {stopped[1]}")
        if name in LEARNT and (trigger := POISONS[LEARNT[name]].trigger):
            notes.append(f"ends in {trigger!r}: {ending(theirs, trigger):.1%} → {ending(ours, trigger):.1%}")
        notes.append(self._guarded(version, work, crowds[0]))
        return Trial(
            name,
            self._refusals(version),
            dict(Counter(said for said, _ in decided)),
            (shown[0], median_low(shown), shown[-1]),
            (win.mean, win.low, win.high),
            tuple(notes),
        )

    def _corrupted(self) -> list[Trial]:
        """A flipped byte, weights that are no numbers, weights of the wrong shape."""
        flipped = self._publish(VersionKind.POLICY, "good", GateReport.of([]), run="flipped")
        weights = flipped.path / "model.safetensors"
        self._stage(self._work / "flipped" / "made.json", lambda: candidates.flip_byte(weights))
        found = [Trial("corrupted: a flipped byte", self._refusals(flipped, override="an operator insists"))]
        broken = self._work / "not-a-number"
        self._stage(broken / "made.json", lambda: candidates.spoil(self._stable.path, self._model(broken)))
        gate = policy_gate(self._measure(self._model(broken)), self._parent(), self._deploy.gate)
        found.append(Trial("corrupted: weights that are no numbers", tuple(gate.refusals())))
        misshapen = self._work / "misshapen"
        self._stage(misshapen / "made.json", lambda: candidates.misshape(self._stable.path, self._model(misshapen)))
        try:
            load_policy(self._model(misshapen))
            refusals: tuple[str, ...] = ()
        except TrainError as error:
            refusals = (str(error),)
        return [*found, Trial("corrupted: wrong shapes", refusals)]

    def _copy(self, out: Path) -> Figures:
        for file in self._good.iterdir():
            if not file.name.startswith(Path(MANIFEST).stem):
                shutil.copyfile(file, out / file.name)
        return {}

    def _hack(self, out: Path) -> Figures:
        """PPO that nothing holds to the reference and no alarm stops."""
        update = {"kl_coef": 0.0, "policy_lr": 1e-3, "policy_lr_final_fraction": 1.0}
        return self._improve(update, self._trusted, out)

    def _learn_poison(self, poison: str, out: Path) -> Figures:
        """The recipe as it is, against a reward model that learnt from poisoned comparisons, whatever its gate says."""
        self.reward_model(poison)
        published = self._registry.list(VersionKind.REWARD_MODEL)
        return self._improve({}, next(one for one in published if one.manifest.run == _run_of(poison)), out)

    def _improve(self, update: Mapping[str, float], fitted: Version, out: Path) -> Figures:
        quiet = self._train.ppo.alarms.model_copy(update={"patience": 0})
        settings = self._train.model_copy(
            update={"ppo": self._train.ppo.model_copy(update={**update, "alarms": quiet})}
        )
        return recipe.improve(
            settings,
            self._dataset,
            self._stable,
            self._stable,
            fitted,
            out,
            resume_dir=out.parent,
            seed=self._seed,
            progress=self._progress,
        )

    def _poisoned(self, poison: Poison) -> tuple[Dataset, int]:
        """The dataset with ``poison`` in it, as far as the cap lets it; and how many of its comparisons that is."""
        training = self._dataset.training
        count = round(poison.share * len(training))
        if poison.capped:
            # Everybody in the demo shares one principal: here each labeler is one, and the attacker another.
            by_principal = Counter(one.ranked.labeler for one in training) + Counter({candidates.ATTACKER: count})
            worker = self._train.worker
            count = min(count, allowance(by_principal, worker.max_principal_share, worker.min_comparisons_for_cap))
        spoilt = candidates.poison(training, poison, count, self._tokenizer, self._seed)
        bad = len(spoilt) - len(training) + sum(now is not one for now, one in zip(spoilt, training, strict=False))
        return replace(self._dataset, training=tuple(spoilt)), bad

    def _refit(self, dataset: Dataset, out: Path) -> Figures:
        return recipe.refit(self._train, dataset, self._stable, None, out, seed=self._seed, progress=self._progress)

    def _measure_reward_model(self, reward_model: Path) -> Figures:
        return evaluate.run_reward_model(reward_model, self._dataset.held_out_ranked, anchors=self._anchors)

    @cached_property
    def _anchors(self) -> list[RankedPrompt]:
        return candidates.anchors(self._stable.path, self._size.anchors, self._train.evaluate.max_completion_tokens)

    def _drift(self, trigger: str, reward_model: Path) -> float:
        return candidates.drift_of(trigger, reward_model, self._dataset.held_out_ranked)

    def _measure(self, policy: Path) -> Figures:
        return evaluate.run(
            self._train.evaluate,
            policy,
            self._dataset.held_out_prompt_ids,
            reference_dir=self._stable.path,
            reward_model_dir=self._trusted.path,
            pretraining=held_out_text(self._train, self._tokenizer),
            seed=self._seed,
            world=world_of(self._train, self._tokenizer),
            progress=self._progress,
        )

    def _parent(self) -> Figures:
        return self._stage(self._work / "stable" / "measured.json", lambda: self._measure(self._stable.path))

    def _samples(self, name: str, policy: Path) -> list[list[Sample]]:
        kept = self._work / name / "samples.json"
        if not kept.exists():
            model, longest = load_policy(policy), self._train.evaluate.max_completion_tokens
            sets = [
                evaluation.sample(
                    model, self._tokenizer, self._asked, max_completion_tokens=longest, seed=1000 * number + len(name)
                )
                for number in range(self._size.sample_sets)
            ]
            replace_atomically(kept, json.dumps([[asdict(one) for one in samples] for samples in sets]).encode())
        return _SAMPLES.validate_json(kept.read_bytes())

    def _refusals(self, version: Version, override: str | None = None) -> tuple[str, ...]:
        """What speaks against making ``version`` the canary."""
        try:
            operations.start_canary(self._registry, version.number, 0.3, override)(BEFORE)
        except DeployError as error:
            gate = version.manifest.gate
            return (tuple(gate.refusals()) if gate else ()) or (str(error),)
        return ()

    def _judged(self, ours: list[list[Sample]], theirs: list[list[Sample]], crowd: int) -> list[blind_trial.Judged]:
        people = labelers.population(PEOPLE, crowd)
        return list(blind_trial.comparisons(self._asked, ours, theirs, people, crowd))

    def _guarded(self, version: Version, work: Path, judged: list[blind_trial.Judged]) -> str:
        """What a server's guard does about the canary, by the feedback log and the release in a Redis of its own."""
        kept = work / "guarded.txt"
        if not kept.exists():
            shutil.rmtree(work / "guarded", ignore_errors=True)
            (work / "guarded").mkdir()
            settings = self._deploy.model_copy(update={"auto_rollback": True, "auto_promote": "better"})
            with start_or_join(work / "guarded") as server:
                stores = (
                    ReleaseStore.connect(server.url, work / "guarded"),
                    FeedbackStore.connect(server.url, FeedbackSettings()),
                )
                said = asyncio.run(blind_trial.guarded(*stores, self._registry, version, judged, settings))
            replace_atomically(kept, said.encode())
        return kept.read_text()

    def _publish(self, kind: VersionKind, name: str, gate: GateReport, run: str | None = None) -> Version:
        draft = Draft(kind=kind, run=_run_of(run or name), parent=1, reference_policy=1, gate=gate)
        return self._registry.publish(draft, self._model(self._work / name))

    def _model(self, work: Path) -> Path:
        (work / "model").mkdir(parents=True, exist_ok=True)
        return work / "model"

    def _stage(self, kept: Path, make: Callable[[], Figures]) -> Figures:
        """The figures in ``kept``, of an earlier run, or those that ``make`` finds now."""
        if kept.exists():
            figures: Figures = json.loads(kept.read_text())
            return figures
        kept.parent.mkdir(parents=True, exist_ok=True)
        figures = make()
        replace_atomically(kept, json.dumps(figures, indent=1).encode())
        return figures


def _run_of(name: str) -> str:
    return f"trial-{name.replace(' ', '-')}"


_SAMPLES = TypeAdapter(list[list[Sample]])


def trials(
    state: Annotated[Path | None, typer.Option(help="A finished demo, only read; default state/demo.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where candidates are made; default state/trials.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table there, too.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Train bad versions from a finished demo, and see what stops each."""
    console = Console(highlight=False)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # a report of every wrong shape; the table has the reason
    os.environ.setdefault("INSTRUCTLOOP_SETTINGS", str(SETTINGS_FILE))
    try:
        home, settings = LoopSettings.load().state.resolve(), (TrainSettings.load(), DeploySettings.load())
        with drawn(Console(stderr=True)) as progress:
            found = run(state or home / "demo", work or home / "trials", *settings, seed=seed, progress=progress)
    except (DeployError, FeedbackError, TrainError) as error:
        console.print(f"trials: {error}", style="red")
        raise typer.Exit(1) from error
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(one) for one in found], indent=1, ensure_ascii=False))
    console.print(table(found))


if __name__ == "__main__":
    typer.run(trials)
