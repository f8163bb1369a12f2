"""PPO raises the score while the KL to the reference stays bounded; a stopped run resumed is the same run."""

import json
import random
from pathlib import Path

import pytest
import torch

from train import ppo, reward_model
from train.batches import RankedPrompt, TokenStream
from train.models import load_policy
from train.sampling import Episodes
from train.settings import PpoSettings, RewardModelSettings

EOS = 1
PROMPTS = [(a, b) for a in range(2, 14) for b in range(2, 14)]
SETTINGS = PpoSettings(
    iterations=20,
    episodes_per_iteration=128,
    minibatches=4,
    policy_lr=2e-3,
    policy_lr_warmup_iterations=3,
    value_lr=3e-3,
    kl_coef=0.05,
    max_completion_tokens=8,
    value_only_iterations=2,
    ptx_coef=0.1,
    ptx_batch=4,
    ema=0.0,
    save_every=5,
)


def stream() -> TokenStream:
    rng = random.Random(0)
    documents = [[*(rng.randrange(2, 16) for _ in range(rng.randrange(3, 20))), EOS] for _ in range(50)]
    return TokenStream(documents, sequence_length=16, seed=3)


@pytest.fixture
def reward_model_dir(policy_dir: Path, tmp_path: Path) -> Path:
    """Likes completions with many of token 5."""
    rng = random.Random(1)
    ranked = []
    for _ in range(300):
        completions = tuple(
            (*(rng.choice((5, rng.randrange(2, 16))) for _ in range(rng.randrange(1, 7))), EOS) for _ in range(4)
        )
        pairs = tuple(
            (i, j) for i in range(4) for j in range(4) if completions[i].count(5) > completions[j].count(5)
        )
        ranked.append(RankedPrompt(rng.choice(PROMPTS), completions, pairs))
    settings = RewardModelSettings(epochs=2, batch_prompts=16, learning_rate=3e-3)
    reward_model.run(settings, policy_dir, ranked, tmp_path / "rm", demonstrations=[], held_out=[], seed=0)
    return tmp_path / "rm"


def test_the_score_rises_and_the_kl_stays_bounded(policy_dir: Path, reward_model_dir: Path, tmp_path: Path) -> None:
    fives: list[float] = []

    def count_fives(iteration: int, episodes: Episodes) -> dict[str, float]:
        fives.append(sum(completion.count(5) for completion in episodes.completions) / len(episodes.completions))
        return {"fives": fives[-1]}

    metrics = ppo.run(
        SETTINGS,
        policy_dir,
        policy_dir,
        reward_model_dir,
        PROMPTS,
        tmp_path / "out",
        pretraining=stream(),
        resume_dir=tmp_path / "run",
        seed=0,
        on_iteration=count_fives,
    )
    history = [json.loads(line) for line in (tmp_path / "run" / ppo.HISTORY_FILE).read_text().splitlines()]
    for h in history:
        print({k: round(v, 3) for k, v in h.items()})
    assert len(history) == 20
    assert history[-1]["score"] > history[0]["score"] + metrics["score_sd"]
    assert 0 < metrics["kl_to_reference"] < 12
