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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median_low
from typing import Annotated

import typer
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

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
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from train import alarms, evaluate, frozen, ppo, recipe
from train.batches import RankedPrompt
from train.datasets import Dataset, allowance
from train.errors import TrainError
from train.models import load_policy, load_tokenizer
from train.progress import Progress, silent
from train.settings import AlarmSettings, TrainSettings
from train.text import TINY_WORLD, held_out_text
from train.tinyworld import blind_trial, candidates, evaluation, labelers
from train.tinyworld.blind_trial import Judged
from train.tinyworld.candidates import POISONS, Poison
from train.tinyworld.evaluation import Sample
from train.tinyworld.study import SETTINGS_FILE
from train.world import world_of

Figures = dict[str, float]
PEOPLE = 40
"""Labelers in a crowd."""
MOST_REASONS = 4
"""Told of one candidate in the table; the JSON has all."""
REFUSED = Release(stable=1, generation=1)
"""The release a candidate would become the canary of."""


@dataclass(frozen=True)
class Size:
    """How much a trial measures.

    Attributes:
        prompts: held-out prompts that candidate and stable version complete.
        sample_sets: completions of each prompt by each.
        crowds: how often the blind comparisons are made anew, each time in another order by other labelers.
        anchors: held-out prompts whose completions the gold labeler ranks, as known answers for reward models.
    """

    prompts: int = 1000
    sample_sets: int = 2
    crowds: int = 21
    anchors: int = 100


@dataclass(frozen=True)
class Trial:
    """What became of one candidate.

    Attributes:
        name: which candidate.
        refusals: what its gate, or the registry, has against it; none where it may become the canary.
        verdicts: how many crowds came to which verdict, whatever the gate said.
        comparisons: blind comparisons until it, ties among them: fewest, median and most of the crowds.
        gold: its win rate over the stable version by gold utility, with the ends of its 95 % interval.
        notes: what else was seen.
    """

    name: str
    refusals: tuple[str, ...]
    verdicts: dict[str, int] | None = None
    comparisons: tuple[int, int, int] | None = None
    gold: tuple[float, float, float] | None = None
    notes: tuple[str, ...] = ()


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
        TrainError, DeployError, FeedbackError: what a stage raises.
    """
    train = train.model_copy(update={"evaluate": train.evaluate.model_copy(update={"probes": TINY_WORLD})})
    return Trials(state, work, train, deploy, size or Size(), seed, progress).run()


def table(trials: list[Trial]) -> Table:
    """The trials to read."""
    shown = Table("candidate", "refused because", "verdict of blind comparisons", "after", "gold win rate", "notes")
    for one in trials:
        why = [reason.partition(" (")[0] for reason in one.refusals]
        more = [f"and {len(why) - MOST_REASONS} more"] if len(why) > MOST_REASONS else []
        verdicts = ", ".join(f"{name} {count}" for name, count in (one.verdicts or {}).items())
        after = "{1} ({0} to {2})".format(*one.comparisons) if one.comparisons else ""
        gold = "{:.3f} [{:.3f}, {:.3f}]".format(*one.gold) if one.gold else ""
        reasons = "\n".join([*why[:MOST_REASONS], *more]) or "passed"
        shown.add_row(one.name, reasons, verdicts, after, gold, "\n".join(one.notes))
        shown.add_section()
    return shown


def first_alarm(settings: AlarmSettings, history: alarms.History) -> tuple[int, str] | None:
    """After how many iterations a run with this history would have been stopped, and why; None where never.

    The sampler's gap is not in it: sampler and trainer are the same code here.
    """
    for count in range(1, len(history) + 1):
        if raised := alarms.check(settings, history[:count], sampler_gap=0.0):
            return count, str(raised[0])
    return None


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
            "poisoned with a word": lambda out: self._learn_poison(candidates.WORD, out),
            "poisoned with abuse": lambda out: self._learn_poison(candidates.ABUSE, out),
            "collapsed": lambda out: candidates.collapse(train, self._stable.path, self._dataset, out, seed=seed),
            "over-refusing": lambda out: candidates.over_refuse(train, good.path, out, seed=seed),
        }

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
        decided = [blind_trial.decide([one.outcome for one in crowd], self._deploy.verdict) for crowd in crowds]
        notes = [f"gold {before:.2f} → {now:.2f}" for before, now in [(self._parent()["gold"], figures["gold"])]]
        if (history := work / ppo.HISTORY_FILE).exists():
            told = [json.loads(line) for line in history.read_text().splitlines()]
            stopped = first_alarm(self._train.ppo.alarms, told)
            notes.append("no alarm in PPO" if stopped is None else f"PPO alarm at iteration {stopped[0]}: {stopped[1]}")
        notes.append(self._guarded(version, work, crowds[0]))
        return Trial(
            name,
            self._refusals(version),
            dict(Counter(verdict.decision for verdict, _ in decided)),
            _spread([shown for _, shown in decided]),
            (win.mean, win.low, win.high),
            tuple(notes),
        )

    def _corrupted(self) -> list[Trial]:
        """A flipped byte, weights that are no numbers, weights of the wrong shape."""
        flipped = self._publish(VersionKind.POLICY, "good", GateReport.of([]), run="flipped")
        weights = flipped.path / "model.safetensors"
        self._stage(self._work / "flipped" / "made.json", lambda: candidates.flip_byte(weights))
        trials = [Trial("corrupted: a flipped byte", self._refusals(flipped, override="an operator insists"))]
        broken = self._work / "not-a-number"
        self._stage(broken / "made.json", lambda: candidates.spoil(self._stable.path, self._model(broken)))
        gate = policy_gate(self._measure(self._model(broken)), self._parent(), self._deploy.gate)
        trials.append(Trial("corrupted: weights that are no numbers", tuple(gate.refusals())))
        misshapen = self._work / "misshapen"
        self._stage(misshapen / "made.json", lambda: candidates.misshape(self._stable.path, self._model(misshapen)))
        try:
            load_policy(self._model(misshapen))
            refusals: tuple[str, ...] = ()
        except TrainError as error:
            refusals = (str(error),)
        return [*trials, Trial("corrupted: wrong shapes", refusals)]

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
        return replace(self._dataset, training=tuple(spoilt)), count

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
            operations.start_canary(self._registry, version.number, 0.3, override)(REFUSED)
        except DeployError as error:
            gate = version.manifest.gate
            return (tuple(gate.refusals()) if gate else ()) or (str(error),)
        return ()

    def _judged(self, ours: list[list[Sample]], theirs: list[list[Sample]], crowd: int) -> list[Judged]:
        people = labelers.population(PEOPLE, crowd)
        return list(blind_trial.comparisons(self._asked, ours, theirs, people, crowd))

    def _guarded(self, version: Version, work: Path, judged: list[Judged]) -> str:
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


def _spread(counts: Sequence[int]) -> tuple[int, int, int]:
    return min(counts), median_low(counts), max(counts)


_SAMPLES = TypeAdapter(list[list[Sample]])


def trials(
    state: Annotated[Path, typer.Option(help="A finished demo's state directory; only read.")] = Path("state/demo"),
    work: Annotated[Path, typer.Option(help="Where candidates are made; what is there is used.")] = Path(
        "state/trials"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table there, too.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Train bad versions from a finished demo, and see what stops each."""
    console = Console(highlight=False)
    os.environ.setdefault("INSTRUCTLOOP_SETTINGS", str(SETTINGS_FILE))
    try:
        found = run(state.resolve(), work.resolve(), TrainSettings.load(), DeploySettings.load(), seed=seed)
    except (DeployError, FeedbackError, TrainError) as error:
        console.print(f"trials: {error}", style="red")
        raise typer.Exit(1) from error
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(one) for one in found], indent=1, ensure_ascii=False))
    console.print(table(found))


if __name__ == "__main__":
    typer.run(trials)
