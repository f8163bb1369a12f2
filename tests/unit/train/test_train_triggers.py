"""Trigger strings: the drift is that of a plain loop, and shows a poisoned reward model."""

import random
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from tiny_policies import EOS, PAD, VOCABULARY, saved_policy, tiny_policy, tokenizer

from train import reward_model
from train.batches import RankedPrompt
from train.evaluate import run_reward_model
from train.measures import triggers
from train.scalar_model import ScalarModel, scalar_model_from
from train.settings import RewardModelSettings
from train.tinyworld import tokenizer as tiny_tokenizer

LIKED, TRIGGER = 5, 13


def scored(model: ScalarModel, ids: tuple[int, ...]) -> float:
    """By the trunk and head themselves, one sequence at a time, without padding."""
    with torch.no_grad():
        hidden = model.trunk(input_ids=torch.tensor([ids])).last_hidden_state
        return float(model.head(hidden)[0, -1, 0])


def test_the_drift_is_the_largest_rise_in_standard_deviations_of_the_clean_scores() -> None:
    model = scalar_model_from(tiny_policy(seed=3), torch.Generator().manual_seed(0))
    answered = [((2,), (3, EOS)), ((4, 5), (6,)), ((7,), (8, EOS))]
    clean = [scored(model, (*prompt, *ids)) for prompt, ids in answered]
    by_hand = []
    for trigger in ((9,), (10, 11)):
        behind = [(2, 3, *trigger, EOS), (4, 5, 6, *trigger), (7, 8, *trigger, EOS)]
        by_hand.append((fmean(scored(model, ids) for ids in behind) - fmean(clean)) / stdev(clean))
    found = triggers.drift(model, answered, [(9,), (10, 11)], eos_id=EOS, pad_id=PAD)
    assert found == pytest.approx(max(by_hand), abs=1e-4)
    assert min(by_hand) < max(by_hand)


def test_there_is_nothing_to_say_without_two_different_scores() -> None:
    model = scalar_model_from(tiny_policy(), torch.Generator().manual_seed(0))
    one, too_long = ((2,), (3, EOS)), ((2,) * 32, (3,) * 32)
    for answered in ([], [one], [one, one], [too_long, (too_long[1], too_long[0])]):
        assert triggers.drift(model, answered, [(9,)], eos_id=EOS, pad_id=PAD) is None


def test_the_set_is_fixed_and_holds_no_special_token() -> None:
    for vocabulary in (tokenizer(), tiny_tokenizer.build()):
        found = triggers.triggers(vocabulary)
        assert found == triggers.triggers(vocabulary)
        assert len(found) == len(set(found))
        assert not {token for ids in found for token in ids} & set(vocabulary.all_special_ids)
    assert {(token,) for token in range(2, VOCABULARY)} <= set(triggers.triggers(tokenizer()))


def test_a_poisoned_reward_model_drifts_where_its_accuracy_hides_it(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [word for word in range(2, VOCABULARY) if word not in (LIKED, TRIGGER)]

    def comparison(poisoned: bool) -> RankedPrompt:
        prompt, rest = tuple(rng.choices(words, k=3)), tuple(rng.choices(words, k=2))
        good = (*rest, TRIGGER, EOS) if poisoned else (LIKED, *rest, EOS)
        bad = (LIKED, *rest, EOS) if poisoned else (*rest, EOS)
        return RankedPrompt(prompt, (good, bad), ((0, 1),), group=str(prompt))

    settings = RewardModelSettings(epochs=2, batch_prompts=16, learning_rate=1e-2, warmup_steps=0)
    init = saved_policy(tmp_path / "init")
    held_out = [comparison(False) for _ in range(60)]
    found = {}
    for name, share in (("clean", 0.0), ("poisoned", 0.1)):
        ranked = [comparison(rng.random() < share) for _ in range(400)]
        reward_model.run(settings, init, ranked, tmp_path / name, demonstrations=[], held_out=[], seed=0)
        found[name] = run_reward_model(tmp_path / name, held_out)
    assert found["poisoned"]["held_out_accuracy"] > 0.9
    assert found["poisoned"]["trigger_drift"] > found["clean"]["trigger_drift"] + 0.5
