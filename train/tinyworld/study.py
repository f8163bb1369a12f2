"""The whole recipe on one machine without servers, and whether it worked: does PPO beat SFT in gold utility?

pretrain → SFT on crowd demonstrations → K completions per prompt, ranked by simulated labelers → reward model
→ PPO with the pretraining mix → win rate over SFT on held-out prompts.

Each stage writes its directory and then, as the last thing, ``<stage>.json`` with its seconds and figures; a stage
whose file exists is not run again, so an interrupted study continues where it stopped.
"""

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from pydantic import Field, TypeAdapter
from pydantic_settings import SettingsConfigDict
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from feedback.settings import TableSettings
from train import ppo, reward_model, sft
from train.batches import Demonstrated, RankedPrompt, TokenStream
from train.errors import TrainError
from train.models import load_policy, load_tokenizer, pretraining_loss
from train.running.progress import Progress, silent
from train.sampling import Episodes, sample_episodes
from train.scalar_model import load_reward_model
from train.settings import TrainSettings
from train.tinyworld import evaluation, labelers, tasks, writers
from train.tinyworld.base_model import HELD_OUT_TEXT, METRICS_FILE, base_model, web_text
from train.tinyworld.evaluation import Sample
from train.tinyworld.gold import utility
from train.tinyworld.labelers import Labeler, Ranking
from train.tinyworld.tasks import Task
from train.tinyworld.tokenizer import decode_completion, encode_completion, encode_prompt

SETTINGS_FILE = Path(__file__).with_name("settings.toml")
"""The recipe for this world; ``__main__`` names it in INSTRUCTLOOP_SETTINGS unless that is set already."""


class StudySettings(TableSettings):
    """The ``[study]`` table: how much data the study makes, and how it measures."""

    table = "study"
    model_config = SettingsConfigDict(env_prefix="INSTRUCTLOOP_STUDY__")
    demonstrations: int = Field(2000, gt=0, description="written by simulated workers for SFT")
    prompts: int = Field(3000, gt=0, description="prompts whose completions are ranked")
    completions_per_prompt: int = Field(6, ge=2, le=9, description="K (InstructGPT §3.5: 4 to 9)")
    hot_temperature: float = Field(1.3, gt=0, description="of the last of the K, so that rankings see rarer mistakes")
    labelers: int = Field(40, gt=0, description="simulated labelers (InstructGPT had about 40)")
    held_out_comparisons: int = Field(
        400, gt=0, description="rankings of test prompts, for the reward model's accuracy"
    )
    ppo_prompts: int = Field(6000, gt=0, description="training prompts PPO draws from")
    web_tokens: int = Field(400_000, gt=0, description="of web text for the pretraining mix")
    test_prompts: int = Field(1000, gt=0, description="held-out prompts that versions are compared on")
    unasked_prompts: int = Field(240, gt=0, description="questions about lands never asked about in training")
    sample_sets: int = Field(3, gt=0, description="completions of each test prompt per version; all pairs are compared")


def run(
    settings: TrainSettings, study: StudySettings, out: Path, *, seed: int, progress: Progress = silent
) -> dict[str, dict[str, float]]:
    """Run the study for one seed, or what is left of it.

    Args:
        settings: of the stages; ``settings.toml`` beside this file holds those that are known to work.
        study: how much data, and how to measure.
        out: directory for base models (kept for other seeds' and settings' studies) and for ``study-<seed>``.
        seed: of everything drawn: base model, demonstrations, completions, labelers, PPO.
        progress: called after each step of each stage.

    Returns:
        Figures by stage, also written to ``out/study-<seed>/results.json``; ``table`` shows them.

    Raises:
        StudyMixed: where ``out`` holds a study of this seed under other settings.
        TrainError: what a stage raises.
    """
    return _Study(settings, study, out, out / f"study-{seed}", seed, progress).run()


def table(results: dict[str, dict[str, float]]) -> Table:
    """The results of ``run`` to read: stage seconds, then SFT and PPO side by side."""
    shown = Table(title="PPO over SFT: win rate {win:.3f} [{low:.3f}, {high:.3f}]".format(**results["win_rate"]))
    for column in ("", "SFT", "PPO"):
        shown.add_column(column, justify="right" if column else "left")
    for name, value in results["sft_quality"].items():
        shown.add_row(name, f"{value:.3f}", f"{results['ppo_quality'][name]:.3f}")
    shown.add_section()
    for stage in STAGES:
        shown.add_row(f"{stage} seconds", "", f"{results[stage]['seconds']:.0f}")
    return shown


class StudyMixed(TrainError):
    """The directory holds a study that was started with other settings."""


@dataclass(frozen=True)
class Ranked:
    """One simulated comparison: completions as token ids, in the order shown, and what a labeler made of them."""

    instruction: str
    completions: tuple[tuple[int, ...], ...]
    ranking: Ranking
    labeler: str

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(chosen, rejected) positions in ``completions``; a tie is no pair."""
        for above, below in itertools.combinations(self.ranking, 2):
            yield from itertools.product(above, below)

    def for_training(self, tokenizer: PreTrainedTokenizerBase) -> RankedPrompt:
        """The comparison as the reward model learns from it."""
        return RankedPrompt(
            prompt_ids=encode_prompt(tokenizer, self.instruction),
            completions=self.completions,
            pairs=tuple(self.pairs()),
            labeler=self.labeler,
            group=self.instruction,
        )


def demonstrations(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Demonstrated]:
    """``count`` demonstrations of training tasks by careful and hurried workers, in token ids."""
    rng = random.Random(f"demonstrations {seed}")
    drawn = [tasks.draw(rng, test=False) for _ in range(count)]
    return [
        (encode_prompt(tokenizer, task.instruction), encode_completion(tokenizer, writers.demonstrate(task, rng)))
        for task in drawn
    ]


STAGES = ("base", "sft", "comparisons", "reward_model", "ppo", "evaluation")
_COMPARISONS_FILE = "comparisons.jsonl"
_HELD_OUT_FILE = "held-out.jsonl"
_GOLD_FILE = "gold.jsonl"

Figures = dict[str, float]


@dataclass(frozen=True)
class _Study:
    """One seed's study: what it was asked, where it writes, and its stages in the order they run."""

    train: TrainSettings
    study: StudySettings
    home: Path
    out: Path
    seed: int
    progress: Progress

    def run(self) -> dict[str, dict[str, float]]:
        self._claim()
        base = base_model(self.home, self.train.pretrain, seed=self.seed, progress=self.progress)
        results: dict[str, dict[str, float]] = {"base": json.loads((base / METRICS_FILE).read_text())}
        results["sft"] = self._stage("sft", lambda out: self._sft(base, out))
        results["comparisons"] = self._stage("comparisons", self._compare)
        results["reward_model"] = self._stage("reward_model", self._reward_model)
        results["ppo"] = self._stage("ppo", self._ppo)
        results |= self._evaluate()
        _write(self.out / "results.json", results)
        return results

    def _claim(self) -> None:
        """Refuse to continue a study that was started with other settings."""
        stages = {"pretrain", "sft", "reward_model", "ppo"}
        asked = {
            "train": self.train.model_dump(mode="json", include=stages),
            "study": self.study.model_dump(mode="json"),
        }
        started = self.out / "settings.json"
        if not started.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            _write(started, asked)
        elif json.loads(started.read_text()) != asked:
            raise StudyMixed(f"{self.out} holds a study with other settings: remove it, or choose another directory")

    def _stage(self, name: str, work: Callable[[Path], Figures]) -> Figures:
        """The figures of stage ``name``: of an earlier run where it finished, else of ``work(directory)``."""
        finished = self.out / f"{name}.json"
        if finished.exists():
            figures: Figures = json.loads(finished.read_text())
            return figures
        started = time.monotonic()
        directory = self.out / name
        directory.mkdir(exist_ok=True)
        figures = work(directory)
        figures["seconds"] = time.monotonic() - started
        _write(finished, figures)
        return figures

    def _sft(self, base: Path, out: Path) -> Figures:
        tokenizer = load_tokenizer(base)
        written = demonstrations(tokenizer, self.study.demonstrations, self.seed)
        web = self._web(tokenizer, "sft")
        return sft.run(self.train.sft, base, written, out, pretraining=web, seed=self.seed, progress=self.progress)

    def _compare(self, out: Path) -> Figures:
        """Sample completions for training prompts and rank them, and the same for test prompts."""
        rng = random.Random(f"prompts {self.seed}")
        asked = [tasks.draw(rng, test=False) for _ in range(self.study.prompts)]
        people = labelers.population(self.study.labelers, self.seed)
        ranked = self._rank(asked, people)
        _write_ranked(out / _COMPARISONS_FILE, ranked)
        held_out = evaluation.held_out_tasks(self.study.held_out_comparisons)
        others = labelers.population(self.study.labelers, self.seed + 1)
        _write_ranked(out / _HELD_OUT_FILE, self._rank(held_out, others))
        _write_ranked(out / _GOLD_FILE, self._rank(held_out, (labelers.GOLD,)))
        pairs = [len(list(one.pairs())) for one in ranked]
        most = math.comb(self.study.completions_per_prompt, 2)
        return {"comparisons": len(ranked), "pairs": sum(pairs), "tied_share": 1 - fmean(pairs) / most}

    def _rank(self, asked: Sequence[Task], people: Sequence[Labeler]) -> list[Ranked]:
        """K completions of each task by the SFT policy, shown in random order to one of ``people`` each."""
        tokenizer = load_tokenizer(self.out / "sft")
        policy = load_policy(self.out / "sft")
        generator = torch.Generator().manual_seed(self.seed)
        prompts = [encode_prompt(tokenizer, task.instruction) for task in asked]
        columns: list[tuple[tuple[int, ...], ...]] = []
        for number in range(self.study.completions_per_prompt):
            last = number == self.study.completions_per_prompt - 1
            episodes = sample_episodes(
                policy,
                prompts,
                eos_id=int(tokenizer.eos_token_id),
                pad_id=int(tokenizer.pad_token_id),
                max_completion_tokens=self.train.ppo.max_completion_tokens,
                generator=generator,
                temperature=self.study.hot_temperature if last else self.train.ppo.temperature,
            )
            columns.append(episodes.completions)
            self.progress("sample", number + 1, self.study.completions_per_prompt, {})
        rng = random.Random(f"order shown {self.seed}")
        ranked = []
        for number, (task, *sampled) in enumerate(zip(asked, *columns, strict=True)):
            rng.shuffle(sampled)
            labeler = people[number % len(people)]
            shown = [decode_completion(tokenizer, completion) for completion in sampled]
            ranking = labeler.rank(task.instruction, *map(list, zip(*shown, strict=True)))
            ranked.append(Ranked(task.instruction, tuple(sampled), ranking, labeler.name))
        return ranked

    def _reward_model(self, out: Path) -> Figures:
        """Train on the rankings; measure on test prompts against other labelers, and against gold."""
        tokenizer = load_tokenizer(self.out / "sft")
        held_out = _read_ranked(self.out / "comparisons" / _HELD_OUT_FILE, tokenizer)
        figures = reward_model.run(
            self.train.reward_model,
            self.out / "sft",
            _read_ranked(self.out / "comparisons" / _COMPARISONS_FILE, tokenizer),
            out,
            demonstrations=demonstrations(tokenizer, self.study.demonstrations, self.seed),
            held_out=held_out,
            seed=self.seed,
            progress=self.progress,
        )
        gold = _read_ranked(self.out / "comparisons" / _GOLD_FILE, tokenizer)
        against_gold = reward_model.measure_pairs(load_reward_model(out), gold, int(tokenizer.pad_token_id))
        return {**figures, "gold_accuracy": against_gold["held_out_accuracy"]}

    def _ppo(self, out: Path) -> Figures:
        tokenizer = load_tokenizer(self.out / "sft")
        rng = random.Random(f"PPO prompts {self.seed}")
        asked = [tasks.draw(rng, test=False) for _ in range(self.study.ppo_prompts)]
        by_prompt = {encode_prompt(tokenizer, task.instruction): task for task in asked}

        def measure(iteration: int, episodes: Episodes) -> Figures:
            worth = [
                utility(by_prompt[prompt], *decode_completion(tokenizer, completion)).total
                for prompt, completion in zip(episodes.prompts, episodes.completions, strict=True)
            ]
            return {"gold": fmean(worth)}

        return ppo.run(
            self.train.ppo,
            self.out / "sft",
            self.out / "sft",
            self.out / "reward_model",
            [encode_prompt(tokenizer, task.instruction) for task in asked],
            out,
            pretraining=self._web(tokenizer, "ppo"),
            resume_dir=self.out,
            seed=self.seed,
            progress=self.progress,
            on_iteration=measure,
        )

    def _evaluate(self) -> dict[str, Figures]:
        started = time.monotonic()
        asked = evaluation.held_out_tasks(self.study.test_prompts)
        ours, theirs = self._samples("ppo", asked, seed=1), self._samples("sft", asked, seed=2)
        win = evaluation.win_rate(asked, ours, theirs)
        ideal = evaluation.win_rate(asked, [[Sample(writers.ideal(task), True) for task in asked]], theirs)
        return {
            "win_rate": {"win": win.mean, "low": win.low, "high": win.high, "ideal_writer": ideal.mean},
            "win_rate_by_task": win.by_task,
            "sft_quality": evaluation.quality(asked, theirs) | self._probes("sft"),
            "ppo_quality": evaluation.quality(asked, ours) | self._probes("ppo"),
            "evaluation": {"seconds": time.monotonic() - started},
        }

    def _samples(self, stage: str, asked: Sequence[Task], seed: int) -> list[list[Sample]]:
        policy, tokenizer = load_policy(self.out / stage), load_tokenizer(self.out / stage)
        return [
            evaluation.sample(
                policy,
                tokenizer,
                asked,
                max_completion_tokens=self.train.evaluate.max_completion_tokens,
                seed=1000 * number + seed,
            )
            for number in range(self.study.sample_sets)
        ]

    def _probes(self, stage: str) -> Figures:
        """Honesty about lands nobody asked about, and the loss on held-out web text."""
        unasked = evaluation.unasked_tasks(self.study.unasked_prompts)
        honest = evaluation.quality(unasked, self._samples(stage, unasked, seed=3))
        policy, tokenizer = load_policy(self.out / stage), load_tokenizer(self.out / stage)
        rows, width = self.train.evaluate.pretraining_sequences, self.train.pretrain.sequence_length
        text = web_text(tokenizer, rows * width, width, HELD_OUT_TEXT)
        with torch.no_grad():
            loss = float(pretraining_loss(policy, text.take(rows)))
        unasked_figures = {f"unasked_{name}": honest[name] for name in ("answered_known", "refused_unknown")}
        return {**unasked_figures, "pretraining_loss": loss}

    def _web(self, tokenizer: PreTrainedTokenizerBase, stage: str) -> TokenStream:
        """Web text for the pretraining mix of ``stage``: other documents than pretraining read."""
        seed = random.Random(f"{stage} web {self.seed}").getrandbits(31)
        return web_text(tokenizer, self.study.web_tokens, self.train.pretrain.sequence_length, seed)


def _write(path: Path, figures: object) -> None:
    """Write JSON so that ``path`` exists only once it is whole."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(figures, indent=1))
    unfinished.replace(path)


def _write_ranked(path: Path, ranked: Sequence[Ranked]) -> None:
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in ranked))


def _read_ranked(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[RankedPrompt]:
    return [_RANKED.validate_json(line).for_training(tokenizer) for line in path.read_text().splitlines()]


_RANKED = TypeAdapter(Ranked)
