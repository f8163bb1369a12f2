"""Pairs, scores and measures against naive loops over single pairs; bad data is named."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_policies import EOS, PAD, WINDOW, saved_policy, tiny_policy

from feedback.labelers import PRIOR_WEIGHT
from train import reward_model
from train.batches import RankedPrompt, collate
from train.errors import DatasetUnusable, TrainingDiverged
from train.losses import ranking_loss
from train.reward_model import (
    collect_pairs,
    informative_pairs,
    measure_pairs,
    score_sequences,
    set_shift,
    with_mean_weight_1,
)
from train.scalar_model import ScalarModel, load_reward_model, scalar_model_from
from train.settings import RewardModelSettings

SAME = (2, 3, EOS)
RANKED = [
    RankedPrompt((5, 6), ((7, EOS), (8, 9, EOS), (10,)), ((0, 1), (0, 2), (2, 1))),
    RankedPrompt((4,), (SAME, SAME, (9, 9, 9, 9)), ((0, 2), (1, 2), (0, 1)), weight=0.5),
]


def score(model: ScalarModel, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    return model.score(collate([prompt], [completion], PAD)).item()


def test_a_pair_of_equal_completions_is_left_out_and_equal_completions_are_scored_once() -> None:
    assert informative_pairs(RANKED[1]) == [(0, 2), (1, 2)]
    pairs = collect_pairs(RANKED)
    assert sorted(pairs.sequences) == sorted(
        [(5, 6, 7, EOS), (5, 6, 8, 9, EOS), (5, 6, 10), (4, *SAME), (4, 9, 9, 9, 9)]
    )
    named = [
        (pairs.sequences[chosen], pairs.sequences[rejected], prompt)
        for chosen, rejected, prompt in zip(
            pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.prompt.tolist(), strict=True
        )
    ]
    assert named[0] == ((5, 6, 7, EOS), (5, 6, 8, 9, EOS), 0)
    assert named[3:] == [((4, *SAME), (4, 9, 9, 9, 9), 1)] * 2
    assert pairs.weight.tolist() == [1.0, 0.5]


@torch.no_grad()
def test_scores_come_in_the_order_given_and_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_model, "SEQUENCES_PER_FORWARD", 3)
    model = scalar_model_from(tiny_policy())
    sequences = [(2, 3, 4, 5, 6, 7), (8,), (9, 10), (2,) * 12, (3, 3, 3), (4, 5)]
    expected = [score(model, sequence[:1], sequence[1:]) for sequence in sequences]
    assert score_sequences(model, sequences, PAD).tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_the_loss_is_the_mean_over_prompts_of_the_mean_over_pairs() -> None:
    model = scalar_model_from(tiny_policy())
    total = 0.0
    for prompt in RANKED:
        losses = []
        for i, j in informative_pairs(prompt):
            chosen = score(model, prompt.prompt_ids, prompt.completions[i])
            rejected = score(model, prompt.prompt_ids, prompt.completions[j])
            losses.append(math.log(1 + math.exp(rejected - chosen)))
        total += prompt.weight * sum(losses) / len(losses)
    pairs = collect_pairs(RANKED)
    found = ranking_loss(
        score_sequences(model, pairs.sequences, PAD), pairs.chosen, pairs.rejected, pairs.prompt, pairs.weight
    )
    assert found.item() == pytest.approx(total / 2, abs=1e-5)


@torch.no_grad()
def test_accuracy_counts_pairs_whose_chosen_scores_higher() -> None:
    model = scalar_model_from(tiny_policy())
    by_score = sorted(((7, EOS), (8, 9, EOS), (10,), (11, 2)), key=lambda completion: score(model, (5, 6), completion))
    right = RankedPrompt((5, 6), tuple(by_score), ((3, 0), (2, 1), (3, 1)))
    wrong = RankedPrompt((5, 6), tuple(by_score), ((0, 3),))
    tied = RankedPrompt((5, 6), tuple(by_score), ())
    measured = measure_pairs(model, [right, wrong, tied], PAD)
    assert measured["held_out_pairs"] == 4
    assert measured["held_out_accuracy"] == 0.75
    # Wilson (1927) for 3 of 4 at z = 1.96, by hand: (0.75 + 0.4802 ± 1.96 √(0.75·0.25/4 + 0.06)) / 1.9604.
    assert measured["held_out_accuracy_low"] == pytest.approx(0.3006, abs=1e-3)
    assert measured["held_out_accuracy_high"] == pytest.approx(0.9544, abs=1e-3)
    assert measure_pairs(model, [tied], PAD) == {"held_out_pairs": 0}


def test_the_shift_makes_a_set_average_zero_also_the_second_time() -> None:
    model = scalar_model_from(tiny_policy())
    sequences = [(2, 3, 4), (5, 6), (7, 8, 9, 10)]
    for bias in (3.0, -1.0):
        with torch.no_grad():
            model.head.bias.fill_(bias)
            before = score_sequences(model, sequences, PAD)
            set_shift(model, sequences, PAD)
            after = score_sequences(model, sequences, PAD)
        assert after.mean().item() == pytest.approx(0, abs=1e-6)
        assert (after - after[0]).tolist() == pytest.approx((before - before[0]).tolist(), abs=1e-5)


def run(out: Path, ranked: list[RankedPrompt], **changes: float) -> dict[str, float]:
    settings = RewardModelSettings(batch_prompts=2).model_copy(update=changes)
    return reward_model.run(
        settings, saved_policy(out / "policy"), ranked, out / "rm", demonstrations=[], held_out=RANKED, seed=0
    )


def test_what_was_learnt_from_is_counted(tmp_path: Path) -> None:
    tied = RankedPrompt((4,), ((2,), (3,)), ())
    metrics = run(tmp_path, [*RANKED, tied, RankedPrompt((4,), (SAME, SAME), ((0, 1),))])
    assert (metrics["prompts"], metrics["prompts_without_pairs"], metrics["pairs"]) == (2, 2, 5)
    assert metrics["held_out_pairs"] == 5


def test_weights_average_1_and_equal_ones_change_nothing(tmp_path: Path) -> None:
    scaled = with_mean_weight_1([replace(RANKED[0], weight=0.9), replace(RANKED[1], weight=0.3)])
    assert [prompt.weight for prompt in scaled] == pytest.approx([1.5, 0.5])
    assert with_mean_weight_1([]) == []
    run(tmp_path / "plain", [replace(prompt, weight=1.0) for prompt in RANKED])
    run(tmp_path / "equal", [replace(prompt, weight=PRIOR_WEIGHT) for prompt in RANKED])
    plain, equal = ((tmp_path / name / "rm" / "model.safetensors").read_bytes() for name in ("plain", "equal"))
    assert plain == equal, "where all are trusted alike, the loss is the paper's"


def test_who_is_not_trusted_at_all_is_left_out(tmp_path: Path) -> None:
    contrary = [replace(prompt, pairs=tuple((j, i) for i, j in prompt.pairs), weight=0.0) for prompt in RANKED]
    one = replace(RANKED[0], weight=0.4)
    metrics = run(tmp_path / "with", [*contrary, one])
    assert (metrics["prompts"], metrics["prompts_without_weight"], metrics["pairs"]) == (1, 2, 3)
    run(tmp_path / "without", [one])
    assert (tmp_path / "with/rm/model.safetensors").read_bytes() == (
        tmp_path / "without/rm/model.safetensors"
    ).read_bytes()
    with pytest.raises(DatasetUnusable, match="guess or invert"):
        run(tmp_path / "none", contrary)


@torch.no_grad()
def test_measures_do_not_depend_on_weights() -> None:
    model = scalar_model_from(tiny_policy())
    plain = measure_pairs(model, [replace(prompt, weight=1.0) for prompt in RANKED], PAD)
    assert plain == measure_pairs(model, [replace(RANKED[0], weight=0.0), RANKED[1]], PAD)


def test_without_demonstrations_the_ranked_completions_average_zero(tmp_path: Path) -> None:
    run(tmp_path, RANKED)
    with torch.no_grad():
        scores = score_sequences(load_reward_model(tmp_path / "rm"), collect_pairs(RANKED).sequences, PAD)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)


def test_comparisons_without_a_preference_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetUnusable, match="none of 1"):
        run(tmp_path, [RankedPrompt((4,), (SAME, SAME), ((0, 1),))])


def test_a_completion_beyond_the_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetUnusable, match=f"reads {WINDOW}"):
        run(tmp_path, [RankedPrompt((4,), ((2,) * WINDOW, (3,)), ((0, 1),))])


def test_a_diverging_run_says_so_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged):
        run(tmp_path, RANKED, learning_rate=1e30, epochs=9, warmup_steps=0)
    assert not (tmp_path / "rm").exists()
