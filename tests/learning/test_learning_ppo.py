"""PPO raises the score while the KL to the reference stays bounded; a stopped run resumed is the same run."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_policies import saved_policy, tiny_policy

from train import ppo, reward_model
from train.batches import RankedPrompt, TokenStream
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
def policy_dir(tmp_path: Path) -> Path:
    return saved_policy(tmp_path / "policy", tiny_policy(width=32))


@pytest.fixture
def reward_model_dir(policy_dir: Path, tmp_path: Path) -> Path:
    """Likes completions with many of token 5."""
    rng = random.Random(1)
    ranked = []
    for _ in range(300):
        completions = tuple(
            (*(rng.choice((5, rng.randrange(2, 16))) for _ in range(rng.randrange(1, 7))), EOS) for _ in range(4)
        )
        pairs = tuple((i, j) for i in range(4) for j in range(4) if completions[i].count(5) > completions[j].count(5))
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
    assert len(history) == SETTINGS.iterations
    assert metrics["score"] > history[0]["score"] + metrics["score_sd"]
    assert fives[-1] > 2 * fives[0]  # and for the reason intended
    assert all(numbers["kl_to_reference"] < 8 for numbers in history)
    assert metrics["entropy"] > 1  # nats; the policy did not collapse onto one completion
    assert history[3]["explained_variance"] > history[0]["explained_variance"]  # the value model starts badly


def test_a_larger_kl_coefficient_keeps_the_policy_closer(
    policy_dir: Path, reward_model_dir: Path, tmp_path: Path
) -> None:
    distance = {}
    for kl_coef in (0.0, 1.0):
        settings = SETTINGS.model_copy(update={"kl_coef": kl_coef})
        arguments = (policy_dir, policy_dir, reward_model_dir, PROMPTS, tmp_path / f"out-{kl_coef}")
        metrics = ppo.run(settings, *arguments, pretraining=stream(), resume_dir=None, seed=0)
        distance[kl_coef] = metrics["kl_to_reference"]
    assert distance[1.0] < 0.5 * distance[0.0]


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from test_learning_ppo import PROMPTS, SETTINGS, stream
from train import ppo

torch.set_num_threads(1)
home, name, die_after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def die(stage, done, total, numbers):
    if done == die_after:
        os.kill(os.getpid(), signal.SIGKILL)

settings = SETTINGS.model_copy(update={"iterations": 8, "save_every": 3, "ema": 0.8})
directories = (home / "policy", home / "policy", home / "rm")
ppo.run(settings, *directories, PROMPTS, home / name / "out",
        pretraining=stream(), resume_dir=home / name, seed=0, progress=die)
"""


def test_a_run_killed_and_started_again_ends_with_the_same_bytes(
    policy_dir: Path, reward_model_dir: Path, tmp_path: Path
) -> None:
    assert (policy_dir, reward_model_dir) == (tmp_path / "policy", tmp_path / "rm")

    def start(name: str, die_after: int) -> int:
        learning = Path(__file__).parent
        found = os.pathsep.join(map(str, (learning, learning.parent, learning.parent.parent)))
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), name, str(die_after)]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": found}, check=False).returncode

    assert start("whole", die_after=0) == 0
    assert start("killed", die_after=5) == -signal.SIGKILL
    assert (tmp_path / "killed" / ppo.RESUME_FILE).exists()
    assert not (tmp_path / "killed" / "out").exists()
    assert start("killed", die_after=0) == 0
    whole, killed = ((tmp_path / name / "out" / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
