"""Train by hand or let the worker do it.

Exit 0: done. Exit 1: refused, with the reason. Exit 2: wrong usage.
"""

import asyncio
import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console

from deploy import release as transitions
from deploy.errors import DeployError
from deploy.registry import Registry, ReleaseStore
from deploy.settings import DeploySettings
from deploy.signatures import Signatures
from deploy.versions import Draft, Version, VersionKind
from feedback.controls import in_force
from feedback.embedded import connect_url
from feedback.errors import FeedbackError
from feedback.records import Comparison, PooledPrompt
from feedback.settings import FeedbackSettings, LoopSettings, SettingsError
from feedback.store import FeedbackStore, LogEntry
from train import evaluate as evaluation
from train import ppo as ppo_stage
from train import report as version_report
from train import reward_model as reward_model_stage
from train import sft as sft_stage
from train.encoding import encoder_of
from train.errors import TrainError
from train.measures import side_by_side
from train.measures.world import world_of
from train.models import load_tokenizer
from train.rounds.datasets import Dataset, build
from train.rounds.log_watch import log_until
from train.rounds.reproduce import Rebuilt, rebuild, verified
from train.rounds.stores import Stores
from train.rounds.worker_metrics import served
from train.running.devices import Device
from train.running.distributed import Ranks, joined
from train.running.progress import Progress, drawn, silent
from train.settings import TrainSettings
from train.text import held_out_text, training_text
from train.tinyworld import study as tiny_study
from train.tinyworld.base_model import base_model
from train.worker import POOL_PROMPTS, Worker

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Seed = Annotated[int, typer.Option(help="Of everything drawn.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Out = Annotated[Path, typer.Argument(help="Directory to write the model to.")]

TINY_WORLD = "tinyworld"
"""A version whose manifest names this as its world is trained by the tiny world's recipe unless settings are given."""


@dataclass(frozen=True)
class _Loop:
    loop: LoopSettings

    @property
    def registry(self) -> Registry:
        return Registry(self.loop.state, Signatures.of(DeploySettings.load().signing))

    def version(self, kind: VersionKind, number: int) -> Version:
        """The version of that number, its files as they were published. Raises DeployError."""
        return verified(self.registry, kind, number)

    def settings(self) -> TrainSettings:
        """The training settings; where none are given, the recipe of the world that the first policy comes from."""
        given = os.environ.get("INSTRUCTLOOP_SETTINGS") or Path("instructloop.toml").exists()
        versions = self.registry.numbers(VersionKind.POLICY)
        first = self.registry.get(VersionKind.POLICY, versions[0]) if versions else None
        if not given and (first is None or first.manifest.settings.get("world") == TINY_WORLD):
            os.environ["INSTRUCTLOOP_SETTINGS"] = str(tiny_study.SETTINGS_FILE)
        return TrainSettings.load()


@app.callback()
def main(
    context: typer.Context,
    state: Annotated[Path | None, typer.Option(help="State directory; default: the settings', else ./state.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="A Redis of your own instead of the state directory's.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads PyTorch computes with.")] = 1,
) -> None:
    """Train by hand, or let the worker do it."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    context.with_resource(joined())
    level = logging.INFO if Ranks.current().first else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        context.obj = _Loop(LoopSettings.load(state=state, redis_url=redis_url))
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def pretrain(context: typer.Context, seed: Seed = 0) -> None:
    """Pretrain the tiny world's base model; it is kept, and made once."""
    with _refusing(), _shown() as progress:
        directory = base_model(_tiny_home(context.obj), context.obj.settings().pretrain, seed=seed, progress=progress)
    typer.echo(str(directory))


@app.command()
def sft(context: typer.Context, seed: Seed = 0) -> None:
    """Fine-tune the tiny world's base on demonstrations; publish it; the very first policy becomes stable."""
    loop: _Loop = context.obj
    with _refusing(), _shown() as progress:
        settings, study = loop.settings(), tiny_study.StudySettings.load()
        base = base_model(_tiny_home(loop), settings.pretrain, seed=seed, progress=progress)
        tokenizer, out = load_tokenizer(base), _tiny_home(loop) / f"sft-{seed}"
        written = tiny_study.demonstrations(tokenizer, study.demonstrations, seed)
        text = training_text(settings, tokenizer, seed + 1)
        metrics = sft_stage.run(
            settings.sft,
            base,
            written,
            out,
            pretraining=text,
            seed=seed,
            device=Device.choose(settings.device),
            lora=settings.lora,
            progress=progress,
        )
        if not Ranks.current().first:
            return
        draft = Draft(
            kind=VersionKind.POLICY,
            demonstrations=len(written),
            settings={"world": TINY_WORLD, "sft": settings.sft.model_dump(mode="json")},
            seeds={"run": seed},
            metrics=metrics,
            canary_prompts=evaluation.canary_prompts(settings.evaluate, out),
        )
        version = _publish(loop, draft, out)
    typer.echo(f"{version}: {version.path}")


@app.command("reward-model")
def reward_model(context: typer.Context, out: Out, policy: int = 1, seed: Seed = 0) -> None:
    """Train a reward model on the whole feedback log, from a policy's weights; publishes nothing."""
    loop: _Loop = context.obj
    with _refusing(), _shown() as progress:
        settings, version = loop.settings(), loop.version(VersionKind.POLICY, policy)
        dataset = Ranks.current().from_first(lambda: _dataset(loop, version, settings))
        metrics = reward_model_stage.run(
            settings.reward_model,
            version.path,
            [one.ranked for one in dataset.training],
            out,
            demonstrations=dataset.demonstrated,
            held_out=dataset.held_out_ranked,
            seed=seed,
            device=Device.choose(settings.device),
            lora=settings.lora,
            progress=progress,
        )
    _print(metrics)


@app.command()
def ppo(
    context: typer.Context,
    out: Out,
    reward_model: Annotated[int, typer.Option(help="Reward model version.")],
    policy: Annotated[int, typer.Option(help="Policy version to start from.")] = 1,
    reference: Annotated[int, typer.Option(help="Policy version that KL is measured to.")] = 1,
    seed: Seed = 0,
) -> None:
    """Train a policy against a reward model; publishes nothing. Resumes where it was stopped."""
    loop: _Loop = context.obj
    with _refusing(), _shown() as progress:
        settings, version = loop.settings(), loop.version(VersionKind.POLICY, policy)
        dataset = Ranks.current().from_first(lambda: _dataset(loop, version, settings))
        metrics = ppo_stage.run(
            settings.ppo,
            version.path,
            loop.version(VersionKind.POLICY, reference).path,
            loop.version(VersionKind.REWARD_MODEL, reward_model).path,
            dataset.prompt_ids,
            out,
            pretraining=training_text(settings, load_tokenizer(version.path), seed),
            resume_dir=out.with_name(f"{out.name}-resume"),
            seed=seed,
            tasks=dataset.prompt_tasks,
            device=Device.choose(settings.device),
            lora=settings.lora,
            progress=progress,
        )
    _print(metrics)


@app.command()
def evaluate(
    context: typer.Context,
    policy: int,
    reference: Annotated[int, typer.Option(help="Policy version that KL is measured to.")] = 1,
    reward_model: Annotated[int | None, typer.Option(help="Reward model version, for the score.")] = None,
    against: Annotated[int | None, typer.Option(help="Policy version to compare it with: adds win rates.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of the sampling; repeat for means over several.")] = None,
) -> None:
    """Measure a policy version on the log's held-out prompts, as the gate does, and print the numbers as JSON."""
    loop: _Loop = context.obj
    with _refusing(), _shown() as progress:
        settings, get = loop.settings(), partial(loop.version, VersionKind.POLICY)
        version, other, base = get(policy), None if against is None else get(against), get(reference)
        scorer = None if reward_model is None else loop.version(VersionKind.REWARD_MODEL, reward_model).path
        tokenizer = load_tokenizer(version.path)
        prompts, world = _dataset(loop, version, settings).held_out_prompt_ids, world_of(settings, tokenizer)

        def measure(one: Version, run: int, kept: Path) -> dict[str, float]:
            return evaluation.run(
                settings.evaluate,
                one.path,
                prompts,
                reference_dir=base.path,
                reward_model_dir=scorer,
                pretraining=held_out_text(settings, tokenizer),
                seed=run,
                world=world,
                completions=kept,
                progress=progress,
            )

        metrics = side_by_side.run(measure, version, other, seed or [0], _in_force(loop) if other else ())
    _print(metrics)


@app.command()
def reproduce(
    context: typer.Context,
    number: int,
    reward_model: Annotated[bool, typer.Option("--reward-model", help="A reward model instead of a policy.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a version again from its manifest and its frozen dataset; exit 1 where its weights differ by one bit."""
    loop: _Loop = context.obj
    kind = VersionKind.REWARD_MODEL if reward_model else VersionKind.POLICY
    with _refusing(), _shown() as progress:
        version = loop.registry.get(kind, number)
        rebuilt = rebuild(loop.registry, version, loop.loop.state / "runs", partial(_logged, loop), progress)
    if as_json:
        typer.echo(json.dumps(rebuilt.report(), indent=2))
    else:
        _say(version, rebuilt)
    if not rebuilt.equal:
        raise typer.Exit(1)


def _say(version: Version, rebuilt: Rebuilt) -> None:
    for warning in rebuilt.warnings:
        typer.echo(f"warning: {warning}", err=True)
    for file in rebuilt.files:
        equal = "equal" if file.equal else f"differs: published {file.published}, now {file.rebuilt}"
        typer.echo(f"{file.name}: {equal}")
    typer.echo(f"{version} is {'reproduced, bit for bit' if rebuilt.equal else 'NOT reproduced'}")


@app.command()
def report(context: typer.Context, number: int) -> None:
    """Write the report of a policy version, with the labelers' win rate of the log as it is now; print its path."""
    loop: _Loop = context.obj
    with _refusing():
        page = version_report.write(loop.registry, number, loop.loop.state / "runs", comparisons=_in_force(loop))
    typer.echo(str(page))


@app.command()
def worker(context: typer.Context) -> None:
    """Train whenever there is enough feedback, until SIGTERM or Ctrl-C; what is stopped is resumed."""
    loop: _Loop = context.obj
    with _refusing(), connect_url(loop.loop) as url:
        asyncio.run(_work(loop, url))


async def _work(loop: _Loop, url: str) -> None:
    settings = loop.settings()
    stores = Stores.connect(url, loop.loop.state, settings.worker, FeedbackSettings.load())
    found = Worker(loop.loop.state, stores, settings, DeploySettings.load())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, found.stop.set)
    try:
        with served(found.metrics, settings.worker.metrics_host, settings.worker.metrics_port):
            await found.run()
    finally:
        await stores.close()


@app.command()
def study(context: typer.Context, seed: Seed = 0, as_json: AsJson = False) -> None:
    """Run the whole recipe in the tiny world and compare PPO with SFT; takes minutes, and resumes."""
    with _refusing(), _shown() as progress:
        settings = context.obj.settings()
        found = tiny_study.run(
            settings, tiny_study.StudySettings.load(), _tiny_home(context.obj), seed=seed, progress=progress
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(tiny_study.table(found))


def _tiny_home(loop: _Loop) -> Path:
    return loop.loop.state / TINY_WORLD


def _publish(loop: _Loop, draft: Draft, source: Path) -> Version:
    """Publish, log it, and make the very first policy stable."""

    async def act(url: str) -> Version:
        releases = ReleaseStore.connect(url, loop.loop.state)
        try:
            version = loop.registry.publish(draft, source)
            await releases.record_publish(version, None)
            if (await releases.read()).stable is None:
                first = partial(transitions.first, number=version.number)
                await releases.change(first, verb="first", by="train", reason="the first policy")
        finally:
            await releases.close()
        return version

    with connect_url(loop.loop) as url:
        return asyncio.run(act(url))


def _dataset(loop: _Loop, policy: Version, settings: TrainSettings) -> Dataset:
    """The dataset of the whole log as it is now."""
    return build(*_read_log(loop), encoder_of(policy, settings), settings.worker)


def _logged(loop: _Loop, version: Version, settings: TrainSettings) -> Dataset:
    """The dataset a version was trained on, as the log gives it now."""
    parent = loop.registry.get(VersionKind.POLICY, version.manifest.reference_policy or 0)
    return build(*_read_log(loop, version.manifest.feedback_cursor), encoder_of(parent, settings), settings.worker)


def _read_log(loop: _Loop, cursor: str | None = None) -> tuple[list[LogEntry], list[PooledPrompt]]:
    """The log up to ``cursor``, or all of it, and the stored prompts there are now."""

    async def read(url: str) -> tuple[list[LogEntry], list[PooledPrompt]]:
        store = FeedbackStore.connect(url, FeedbackSettings.load())
        try:
            entries = await log_until(store, cursor or await store.head())
            return entries, await store.pool_prompts(POOL_PROMPTS)
        finally:
            await store.close()

    with connect_url(loop.loop) as url:
        return asyncio.run(read(url))


def _in_force(loop: _Loop) -> Sequence[Comparison]:
    """The labelers' comparisons that count, of the log as it is now."""
    entries, _ = _read_log(loop)
    return in_force(entry.record for entry in entries if isinstance(entry.record, Comparison)).ordinary


@contextmanager
def _shown() -> Iterator[Progress]:
    if not Ranks.current().first:
        yield silent
        return
    with drawn(Console(stderr=True)) as progress:
        yield progress


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (TrainError, DeployError, FeedbackError) as error:
        typer.echo(f"refused: {error}", err=True)
        raise typer.Exit(1) from error


def _print(metrics: dict[str, float]) -> None:
    if Ranks.current().first:
        typer.echo(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    app()
