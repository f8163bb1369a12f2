"""Pairs, scores and measures against naive loops over single pairs; bad data is named."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policies import EOS, PAD, WINDOW, saved_policy, tiny_policy

from feedback.labelers import PRIOR_WEIGHT
from train import packing, reward_model
from train.batches import Demonstrated, RankedPrompt, collate
from train.errors import DatasetUnusable, TrainingDiverged
from train.losses import ranking_loss
from train.reward_model import (
    bootstrap_counts,
    collect_pairs,
    informative_pairs,
    measure_pairs,
    parts,
    score_completions,
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
    assert sorted(pairs.answered) == sorted(
        [((5, 6), (7, EOS)), ((5, 6), (8, 9, EOS)), ((5, 6), (10,)), ((4,), SAME), ((4,), (9, 9, 9, 9))]
    )
    named = [
        (pairs.answered[chosen], pairs.answered[rejected], prompt)
        for chosen, rejected, prompt in zip(
            pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.prompt.tolist(), strict=True
        )
    ]
    assert named[0] == (((5, 6), (7, EOS)), ((5, 6), (8, 9, EOS)), 0)
    assert named[3:] == [(((4,), SAME), ((4,), (9, 9, 9, 9)), 1)] * 2
    assert pairs.weight.tolist() == [1.0, 0.5]


def test_ranks_apart_are_counted_between_ties() -> None:
    # 0 over (1 = 2) over 3: three ranks.
    ranked = RankedPrompt((5,), ((2,), (3,), (4,), (6,)), ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3)))
    assert collect_pairs([ranked]).apart.tolist() == [1, 1, 2, 1, 1]
    assert collect_pairs(RANKED[:1]).apart.tolist() == [2, 1, 1]
    circle = RankedPrompt((5,), ((2,), (3,), (4,)), ((0, 1), (1, 2), (2, 0)))
    assert collect_pairs([circle]).apart.tolist() == [1, 1, 1]


def test_a_step_goes_in_parts_that_fit_in_memory_and_split_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_model, "TOKENS_PER_BACKWARD", 24)
    lengths = [9, 2, 3, 9, 2, 1]
    ranked = [
        RankedPrompt((2,) * length, ((3,), (4, 5)), ((0, 1),), labeler=str(i)) for i, length in enumerate(lengths)
    ]
    found = parts(ranked)
    assert sorted(i for part in found for i in part) == list(range(6))
    of_prompt = [{i for i in part if lengths[i] == length} for length in (9, 2) for part in found]
    assert {frozenset(group) for group in of_prompt if group} == {frozenset({0, 3}), frozenset({1, 4})}
    assert len(found) > 1
    for part in found:
        distinct = {lengths[i] for i in part}
        assert len(distinct) == 1 or sum(distinct) + 3 * len(part) <= 24


def test_in_how_many_parts_a_step_goes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = [replace(prompt, prompt_ids=(*prompt.prompt_ids, i)) for i in range(2, 6) for prompt in RANKED]
    whole = run(tmp_path / "whole", ranked, batch_prompts=8, learning_rate=1e-3)
    monkeypatch.setattr(reward_model, "TOKENS_PER_BACKWARD", 1)
    parted = run(tmp_path / "parted", ranked, batch_prompts=8, learning_rate=1e-3)
    assert parted["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    answered = collect_pairs(ranked).answered
    with torch.no_grad():
        one, other = (
            score_completions(load_reward_model(tmp_path / name / "rm"), answered, PAD) for name in ("whole", "parted")
        )
    # A first step of Adam is the gradient's sign, which rounding turns where the gradient is nearly 0.
    assert torch.allclose(one, other, atol=5e-3)


@torch.no_grad()
def test_scores_come_in_the_order_given_and_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TOKENS_PER_FORWARD", {"cpu": 12})
    model = scalar_model_from(tiny_policy())
    sequences = [(2, 3, 4, 5, 6, 7), (8,), (9, 10), (2,) * 12, (3, 3, 3), (4, 5)]
    expected = [score(model, sequence[:1], sequence[1:]) for sequence in sequences]
    answered = [((), sequence) for sequence in sequences]
    assert score_completions(model, answered, PAD).tolist() == pytest.approx(expected, abs=1e-5)


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
        score_completions(model, pairs.answered, PAD).unsqueeze(1),
        pairs.chosen,
        pairs.rejected,
        pairs.prompt,
        pairs.weight.unsqueeze(1),
    )
    assert found.item() == pytest.approx(total / 2, abs=1e-5)


@torch.no_grad()
def test_accuracy_counts_pairs_whose_chosen_scores_higher() -> None:
    model = scalar_model_from(tiny_policy())
    completions = ((7, EOS), (8, 9, EOS), (10,), (11, 2))
    by_score, others = (
        tuple(sorted(completions, key=lambda completion: score(model, prompt, completion))) for prompt in ((5, 6), (4,))
    )
    right = RankedPrompt((5, 6), by_score, ((3, 0), (2, 1), (3, 1)))
    wrong = RankedPrompt((4,), others, ((0, 3),))
    tied = RankedPrompt((5, 6), by_score, ())
    measured = measure_pairs(model, [right, wrong, tied], PAD)
    assert measured["held_out_pairs"] == 4
    assert measured["held_out_accuracy"] == 0.75
    # Two prompts, right in three pairs and wrong in one: deviations of 3 · 0.25 and −0.75 make a variance of 1.125 / 16
    # where 4 independent pairs have 0.1875 / 4, so they count as 4 / 1.5. Wilson (1927) for 2 of 2.667 at z = 1.96:
    # (0.75 + 0.7203 ± 1.96 √(0.0703 + 0.1350)) / 2.4406.
    assert measured["held_out_accuracy_low"] == pytest.approx(0.2385, abs=1e-3)
    assert measured["held_out_accuracy_high"] == pytest.approx(0.9663, abs=1e-3)
    assert measure_pairs(model, [tied], PAD) == {"held_out_pairs": 0}


@torch.no_grad()
def test_accuracy_is_told_apart_by_labelers_seen_in_training_and_new_ones() -> None:
    model = scalar_model_from(tiny_policy())
    worse, better = sorted(((7, EOS), (8, 9, EOS)), key=lambda completion: score(model, (5, 6), completion))
    right = RankedPrompt((5, 6), (worse, better), ((1, 0),), labeler="ann")
    wrong = replace(right, pairs=((0, 1),))
    held_out = [right, right, wrong, replace(wrong, labeler="bob"), replace(wrong, labeler="")]
    plain = measure_pairs(model, held_out, PAD)
    assert not any(name.endswith("labelers") for name in plain)
    measured = measure_pairs(model, held_out, PAD, seen_labelers={"ann", ""})
    assert {name: measured[name] for name in measured if name.endswith("labelers")} == pytest.approx(
        {
            "held_out_pairs_seen_labelers": 3,
            "held_out_accuracy_seen_labelers": 2 / 3,
            "held_out_pairs_new_labelers": 1,
            "held_out_accuracy_new_labelers": 0,
        }
    )
    assert measured["held_out_pairs"] == 5
    assert measure_pairs(model, [right], PAD, seen_labelers={"ann"})["held_out_pairs_new_labelers"] == 0


@torch.no_grad()
def test_a_model_of_great_scores_is_not_calibrated() -> None:
    model = scalar_model_from(tiny_policy())
    worse, better = sorted(((7, EOS), (8, 9, EOS)), key=lambda completion: score(model, (5, 6), completion))
    right = RankedPrompt((5, 6), (worse, better), ((1, 0),))
    wrong = replace(right, pairs=((0, 1),))
    model.scale(1e-6)
    assert measure_pairs(model, [right, wrong], PAD)["calibration_error"] == pytest.approx(0, abs=1e-5)
    model.scale(1e12)
    assert measure_pairs(model, [right, wrong], PAD)["calibration_error"] == pytest.approx(0.5, abs=1e-5)


def test_the_shift_makes_a_set_average_zero_also_the_second_time() -> None:
    model = scalar_model_from(tiny_policy())
    written = [((2, 3), (4,)), ((5,), (6,)), ((7, 8), (9, 10))]
    for bias in (3.0, -1.0):
        with torch.no_grad():
            model.head.bias.fill_(bias)
            before = score_completions(model, written, PAD)
            set_shift(model, written, PAD)
            after = score_completions(model, written, PAD)
        assert after.mean().item() == pytest.approx(0, abs=1e-6)
        assert (after - after[0]).tolist() == pytest.approx((before - before[0]).tolist(), abs=1e-5)


@torch.no_grad()
def test_every_head_of_an_ensemble_is_shifted_by_itself() -> None:
    model = scalar_model_from(tiny_policy(), heads=3)
    model.head.bias.copy_(torch.tensor([5.0, 0.0, -2.0]))
    written = [((2, 3), (4,)), ((5,), (6,))]
    set_shift(model, written, PAD)
    assert packing.packed_scores(model, written, PAD).mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-5)


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
        scores = score_completions(load_reward_model(tmp_path / "rm"), collect_pairs(RANKED).answered, PAD)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)


def test_a_head_alone_learns_from_each_comparison_once_and_several_from_bootstrap_samples() -> None:
    def counts(heads: int) -> torch.Tensor:
        return bootstrap_counts(4000, heads, torch.Generator().manual_seed(0))

    assert counts(1).eq(1).all()
    sampled = counts(3)
    assert sampled.mean(0).tolist() == pytest.approx([1, 1, 1], abs=0.06)
    assert sampled.eq(0).float().mean().item() == pytest.approx(math.exp(-1), abs=0.02)  # 37 % are left out of a sample
    assert torch.corrcoef(sampled.T).fill_diagonal_(0).abs().max().item() < 0.06


def test_an_ensemble_is_trained_saved_and_taken_up_again(tmp_path: Path) -> None:
    run(tmp_path, RANKED, heads=3)
    settings = RewardModelSettings(batch_prompts=2, heads=3, learning_rate=1e-9)
    common: dict[str, Any] = {"demonstrations": [], "held_out": [], "seed": 0}
    reward_model.run(settings, tmp_path / "rm", RANKED, tmp_path / "again", **common)
    first, again = load_reward_model(tmp_path / "rm"), load_reward_model(tmp_path / "again")
    assert (first.heads, again.heads) == (3, 3)
    assert torch.allclose(first.head.weight, again.head.weight, atol=1e-6)
    spread = torch.pdist(first.head.weight.detach())
    assert spread.min() > 0.1, "heads that start alike disagree about nothing"
    one = settings.model_copy(update={"heads": 1})
    reward_model.run(one, tmp_path / "rm", RANKED, tmp_path / "single", **common)
    assert load_reward_model(tmp_path / "single").heads == 1


def test_every_refit_sets_the_demonstrations_to_zero_again(tmp_path: Path) -> None:
    written: list[Demonstrated] = [((5, 6), (7, EOS)), ((4,), (9, 9, EOS))]
    settings = RewardModelSettings(batch_prompts=2, heads=2, learning_rate=1e-2, warmup_steps=0)
    start, shifts = saved_policy(tmp_path / "policy"), []
    for name in ("first", "second"):
        metrics = reward_model.run(
            settings, start, RANKED, tmp_path / name, demonstrations=written, held_out=[], seed=0
        )
        start = tmp_path / name
        shifts.append(metrics["shift"])
        with torch.no_grad():
            found = packing.packed_scores(load_reward_model(start), written, PAD)
        assert found.mean(0).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert abs(shifts[1] - shifts[0]) > 1e-3, "the old shift would have been wrong"


def test_a_margin_is_asked_of_those_further_apart(tmp_path: Path) -> None:
    ranked = [RankedPrompt((5, 6), ((7, EOS), (8, 9, EOS), (10,)), ((0, 1), (0, 2), (1, 2)))]
    metrics = run(tmp_path, ranked, margin=4.0, learning_rate=1e-12)
    with torch.no_grad():
        model = load_reward_model(tmp_path / "rm")
        first, second, third = (score(model, (5, 6), completion) for completion in ranked[0].completions)
    leads = (first - second, second - third, first - third - 4.0)
    assert metrics["loss"] == pytest.approx(sum(math.log(1 + math.exp(-lead)) for lead in leads) / 3, abs=1e-5)


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
