"""The two trainings of a round, from a dataset and published versions to weights.

The weights follow from the arguments alone, whatever was stopped and resumed on the way, so that ``reproduce`` can do
them again.
"""

import logging
from functools import partial
from pathlib import Path

from deploy.versions import Version
from train import ppo, reward_model
from train.errors import ResumePointUnusable
from train.measures.world import world_of
from train.models import load_tokenizer
from train.rounds.datasets import Dataset, with_replay
from train.running.devices import Device
from train.running.progress import Progress
from train.settings import TrainSettings
from train.text import training_text

THREADS = "threads"
"""Beside the settings in a manifest: PyTorch's threads, whose number decides the order of sums."""

_LOGGER = logging.getLogger(__name__)


def refit(
    settings: TrainSettings,
    dataset: Dataset,
    reference: Version,
    first: Version | None,
    out: Path,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """Train a reward model into ``out``; returns the figures of ``reward_model.run``.

    Args:
        settings: of the stage.
        dataset: comparisons to learn from and to measure on, and demonstrations.
        reference: the policy whose weights the first reward model starts from, and learns from everything.
        first: the first reward model: later ones start there, on fresh comparisons and a replay, for one epoch.
        out: directory to write.
        seed: of everything drawn.
        progress: called after each step.

    Raises:
        TrainError: as ``reward_model.run``.
    """
    stage = settings.reward_model
    if first is None:
        init, ranked = reference.path, [one.ranked for one in dataset.training]
    else:
        init, ranked = first.path, with_replay(dataset.training, first.manifest.feedback_cursor, seed)
        stage = stage.model_copy(update={"epochs": 1})
    return reward_model.run(
        stage,
        init,
        ranked,
        out,
        demonstrations=dataset.demonstrated,
        held_out=dataset.held_out_ranked,
        seed=seed,
        device=Device.choose(settings.device),
        lora=settings.lora,
        progress=progress,
    )


def improve(
    settings: TrainSettings,
    dataset: Dataset,
    parent: Version,
    reference: Version,
    fitted: Version,
    out: Path,
    *,
    resume_dir: Path | None,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """Train a policy into ``out``; returns the figures of ``ppo.run``.

    Args:
        settings: of the stage and its pretraining text.
        dataset: prompts to sample completions for.
        parent: the policy to start from.
        reference: the policy that KL is measured to.
        fitted: the reward model.
        out: directory to write.
        resume_dir: where the resume point is kept; one that cannot be used is dropped and PPO starts anew.
        seed: of everything drawn.
        progress: called after each iteration.

    Raises:
        TrainError: as ``ppo.run``.
    """
    tokenizer = load_tokenizer(parent.path)
    train = partial(
        ppo.run,
        settings.ppo,
        parent.path,
        reference.path,
        fitted.path,
        dataset.prompt_ids,
        out,
        resume_dir=resume_dir,
        seed=seed,
        tasks=dataset.prompt_tasks,
        device=Device.choose(settings.device),
        lora=settings.lora,
        progress=progress,
        on_iteration=world_of(settings, tokenizer).of_iteration,
    )
    try:
        return train(pretraining=training_text(settings, tokenizer, seed))
    except ResumePointUnusable as error:
        if resume_dir is None:
            raise
        _LOGGER.warning("PPO starts anew: %s", error)
        (resume_dir / ppo.RESUME_FILE).unlink()
        return train(pretraining=training_text(settings, tokenizer, seed))
