"""A reward model learns a preference it can see, from scratch and from an earlier one, and demonstrations score 0."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policies import saved_policy, tiny_policy

from train import reward_model
from train.batches import RankedPrompt
from train.packing import packed_scores
from train.scalar_model import load_reward_model
from train.settings import RewardModelSettings

EOS = 1
SETTINGS = RewardModelSettings(epochs=2, batch_prompts=16, learning_rate=3e-3)


@pytest.fixture
def policy_dir(tmp_path: Path) -> Path:
    return saved_policy(tmp_path / "policy", tiny_policy(width=32))


def rankings(count: int, seed: int, *, noise: float = 0.0, labeler: str = "") -> list[RankedPrompt]:
    """Labelers like the token 5: of two completions the one that has more of it is chosen; equal counts tie."""
    rng = random.Random(seed)
    ranked = []
    for _ in range(count):
        prompt = tuple(rng.randrange(2, 16) for _ in range(rng.randrange(2, 6)))
        completions = tuple(
            (*(rng.choice((5, rng.randrange(2, 16))) for _ in range(rng.randrange(2, 7))), EOS)
            for _ in range(rng.randrange(2, 6))
        )
        pairs = []
        for i in range(len(completions)):
            for j in range(i):
                likes_first = completions[i].count(5) > completions[j].count(5)
                if completions[i].count(5) != completions[j].count(5):
                    pairs.append((i, j) if likes_first != (rng.random() < noise) else (j, i))
        ranked.append(RankedPrompt(prompt, completions, tuple(pairs), labeler=labeler))
    return ranked


def test_accuracy_rises_above_chance_and_demonstrations_score_zero(policy_dir: Path, tmp_path: Path) -> None:
    demonstrations = [((3, 4), (5, 5, 6, EOS)), ((7, 8, 9), (5, 2, EOS)), ((2,), (5, 5, 5, 5, EOS))]
    held_out = rankings(100, seed=2)
    metrics = reward_model.run(
        SETTINGS,
        policy_dir,
        rankings(400, seed=1, noise=0.1),
        tmp_path / "rm",
        demonstrations=demonstrations,
        held_out=held_out,
        seed=0,
    )
    assert metrics["held_out_accuracy_low"] > 0.75
    assert metrics["held_out_loss"] < 0.6
    assert metrics["nonfinite_weights"] == 0
    model = load_reward_model(tmp_path / "rm")
    with torch.no_grad():
        scores = reward_model.score_completions(model, demonstrations, pad_id=0)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    assert reward_model.measure_pairs(model, held_out, 0)["held_out_accuracy"] == metrics["held_out_accuracy"]


def test_a_refit_restarts_from_the_earlier_reward_model(policy_dir: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"demonstrations": [], "held_out": rankings(100, seed=2), "seed": 0}
    reward_model.run(SETTINGS, policy_dir, rankings(400, seed=1), tmp_path / "first", **common)
    little = SETTINGS.model_copy(update={"epochs": 1, "learning_rate": 1e-4})
    refit = reward_model.run(little, tmp_path / "first", rankings(32, seed=3), tmp_path / "second", **common)
    fresh = reward_model.run(little, policy_dir, rankings(32, seed=3), tmp_path / "fresh", **common)
    assert refit["held_out_accuracy"] > 0.85
    assert fresh["held_out_accuracy"] < refit["held_out_accuracy"] - 0.1


def test_the_same_seed_gives_the_same_bytes(policy_dir: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        reward_model.run(
            SETTINGS, policy_dir, rankings(32, seed=1), tmp_path / name, demonstrations=[], held_out=[], seed=seed
        )
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_an_ensemble_learns_too_and_disagrees_more_on_what_it_was_not_shown(policy_dir: Path, tmp_path: Path) -> None:
    shown = rankings(400, seed=1, noise=0.1, labeler="ann")
    careful, contrary = rankings(60, seed=2, labeler="ann"), rankings(60, seed=3, noise=1.0, labeler="bob")
    settings = SETTINGS.model_copy(update={"heads": 4})
    metrics = reward_model.run(
        settings, policy_dir, shown, tmp_path / "rm", demonstrations=[], held_out=[*careful, *contrary], seed=0
    )
    assert metrics["held_out_accuracy_seen_labelers"] > 0.75
    assert metrics["held_out_accuracy_new_labelers"] < 0.25
    pairs = (metrics["held_out_pairs_seen_labelers"], metrics["held_out_pairs_new_labelers"])
    assert sum(pairs) == metrics["held_out_pairs"] == sum(len(one.pairs) for one in [*careful, *contrary])
    assert metrics["calibration_error"] > 0.15, "half the pairs are the other way round"
    assert metrics["shares_prompts"] == 1

    model = load_reward_model(tmp_path / "rm")
    assert model.heads == 4
    strange = [((3, 3), (15,) * 20), ((3, 3), (14, 2) * 10)]
    usual = [(one.prompt_ids, completion) for one in careful for completion in one.completions]
    with torch.no_grad():
        spread = [packed_scores(model, answered, 0).std(1).mean() for answered in (usual, strange)]
    assert spread[1] > 1.2 * spread[0]
