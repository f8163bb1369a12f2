"""Our reward model and PPO, taking turns: ``python train_ours.py``, told what to train as ``train_turns`` says."""

import json
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

from train_turns import Turns, serve

from train import packing, ppo, reward_model
from train.batches import RankedPrompt, TokenStream
from train.settings import AlarmSettings, PpoSettings, RewardModelSettings

FOREVER = 1_000_000
TEXT_TOKENS = 128
"""Of a sequence of the pretraining mix."""


def train_reward_model(turns: Turns, asked: dict[str, Any], out: Path) -> None:
    """Steps of ``batch_prompts`` prompts; with ``packed`` false each completion reads its own copy of the prompt."""
    ranked = [
        RankedPrompt(
            tuple(one["prompt"]),
            tuple(map(tuple, one["completions"])),
            tuple(combinations(range(len(one["completions"])), 2)),
        )
        for one in json.loads(Path(asked["rankings"]).read_text())
    ]
    settings = RewardModelSettings(epochs=FOREVER, batch_prompts=asked["batch_prompts"])
    # Found unable to share a prompt, a model is trained as one that cannot: the slower way that ours has anyway.
    sharing = nullcontext() if asked["packed"] else patch.object(packing, "_shares_prompts", return_value=False)
    with sharing:
        reward_model.run(
            settings,
            Path(asked["policy"]),
            ranked,
            out,
            demonstrations=[],
            held_out=[],
            seed=0,
            progress=lambda stage, done, total, numbers: turns.step_done(),
        )


def train_policy(turns: Turns, asked: dict[str, Any], out: Path) -> None:
    """Iterations of ``episodes``, with ``ptx_batch`` sequences of text a minibatch where that is not 0."""

    def after(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        for part in ("sample", "score", "update"):
            turns.spent(part, numbers[f"{part}_seconds"])
        turns.step_done()

    settings = PpoSettings(
        iterations=FOREVER,
        episodes_per_iteration=asked["episodes"],
        minibatches=asked["minibatches"],
        max_completion_tokens=asked["completion_tokens"],
        value_only_iterations=0,
        policy_lr_warmup_iterations=0,
        target_kl=None,
        ptx_coef=27.8 if asked["ptx_batch"] else 0.0,
        ptx_batch=asked["ptx_batch"] or 1,
        ema=0.0,
        normalize_score=False,
        alarms=AlarmSettings(patience=0),
    )
    prompts = [tuple(prompt) for prompt in json.loads(Path(asked["prompts"]).read_text())]
    text = TokenStream(prompts, TEXT_TOKENS, 0) if asked["ptx_batch"] else None
    policy, scorer = Path(asked["policy"]), Path(asked["reward_model"])
    ppo.run(settings, policy, policy, scorer, prompts, out, pretraining=text, resume_dir=None, seed=0, progress=after)


def train(turns: Turns, asked: dict[str, Any], out: Path) -> None:
    """Whichever of the two is asked for."""
    (train_reward_model if asked["what"] == "reward model" else train_policy)(turns, asked, out)


if __name__ == "__main__":
    serve(train)
