"""Log-probabilities and scores against plain unpadded forwards; what is saved is what is loaded."""

import math
from pathlib import Path

import pytest
import torch
from tiny_policies import EOS, FAMILIES, saved_policy, tiny_policy, tokenizer

from deploy.files import files_to_publish
from train.batches import collate
from train.errors import ModelUnusable
from train.models import (
    HEAD_FILE,
    completion_logits,
    is_reward_model,
    load_policy,
    load_tokenizer,
    nonfinite_weights,
    pad_id_of,
    pretraining_loss,
)
from train.scalar_model import ScalarModel, load_reward_model, save_reward_model, scalar_model_from

PROMPTS = [(3, 4, 5, 6, 7, 8), (9,), (10, 11, 12)]
COMPLETIONS = [(13, EOS), (14, 15, 2, 3, EOS), (4, 4, 4)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad_id", [0, EOS])
def test_padding_changes_no_logit(family: str, pad_id: int) -> None:
    policy = tiny_policy(family)
    with torch.no_grad():
        padded = completion_logits(policy, collate(PROMPTS, COMPLETIONS, pad_id))
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            alone = policy(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            assert torch.allclose(padded[row, : len(completion)], alone, atol=1e-5)


def test_logits_are_divided_by_the_temperature() -> None:
    policy, batch = tiny_policy(), collate(PROMPTS, COMPLETIONS, 0)
    with torch.no_grad():
        assert torch.allclose(completion_logits(policy, batch, 0.5), 2 * completion_logits(policy, batch), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pretraining_loss_is_transformers_own(family: str) -> None:
    policy = tiny_policy(family)
    tokens = torch.randint(0, 16, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = policy(input_ids=tokens, labels=tokens).loss
        assert pretraining_loss(policy, tokens).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_stands_at_the_last_real_token_and_values_before_each_completion_token(family: str) -> None:
    model = scalar_model_from(tiny_policy(family))
    model.shift.fill_(0.25)
    batch = collate(PROMPTS, COMPLETIONS, 0)
    with torch.no_grad():
        scores, values = model.score(batch), model.values(batch)
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            ids = torch.tensor([prompt + completion])
            per_token = model.numbers(model.trunk(input_ids=ids).last_hidden_state).mean(-1)[0]
            by_hand = model.head(model.trunk(input_ids=ids).last_hidden_state)[0, :, 0] - 0.25
            assert torch.allclose(per_token, by_hand, atol=1e-5)
            assert scores[row].item() == pytest.approx(by_hand[-1].item(), abs=1e-5)
            expected = by_hand[len(prompt) - 1 : -1]
            assert torch.allclose(values[row, : len(completion)], expected, atol=1e-5)


def test_a_fresh_head_is_small_and_unbiased_and_its_trunk_a_copy() -> None:
    policy = tiny_policy(width=256)
    model = scalar_model_from(policy, torch.Generator().manual_seed(0))
    assert model.head.weight.std().item() == pytest.approx(1 / math.sqrt(257), rel=0.15)
    assert model.head.bias.item() == 0
    assert model.head.weight.equal(scalar_model_from(policy, torch.Generator().manual_seed(0)).head.weight)
    before = policy.get_input_embeddings().weight.clone()
    with torch.no_grad():
        model.trunk.get_input_embeddings().weight.add_(1)
    assert policy.get_input_embeddings().weight.equal(before)


def test_scaling_a_model_scales_every_score() -> None:
    model, batch = scalar_model_from(tiny_policy()), collate(PROMPTS, COMPLETIONS, 0)
    with torch.no_grad():
        model.head.bias.fill_(0.5)
        model.shift.fill_(2.0)
        before = model.score(batch)
        model.scale(0.1)
        assert torch.allclose(model.score(batch), 0.1 * before, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_is_loaded_in_full_precision_without_dropout(family: str, tmp_path: Path) -> None:
    saved_policy(tmp_path, tiny_policy(family, dropout=0.9))
    policy, batch = load_policy(tmp_path), collate(PROMPTS, COMPLETIONS, 0)
    with torch.no_grad():
        assert completion_logits(policy, batch).equal(completion_logits(tiny_policy(family), batch))
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    assert files_to_publish(tmp_path)
    assert not is_reward_model(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_reward_model_is_loaded_with_head_and_shift(family: str, tmp_path: Path) -> None:
    model, batch = scalar_model_from(tiny_policy(family)), collate(PROMPTS, COMPLETIONS, 0)
    with torch.no_grad():
        model.head.bias.fill_(0.5)
        model.shift.fill_(-3.0)
        save_reward_model(model, tokenizer(), tmp_path)
        assert load_reward_model(tmp_path).score(batch).equal(model.score(batch))
    assert is_reward_model(tmp_path)
    assert {"config.json", "model.safetensors", HEAD_FILE} <= {path.name for path in files_to_publish(tmp_path)}
    with pytest.raises(ModelUnusable, match="not a policy"):
        load_policy(tmp_path)


def test_a_directory_that_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match=r"config\.json"):
        load_policy(tmp_path)
    with pytest.raises(ModelUnusable, match="tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ModelUnusable, match=HEAD_FILE):
        load_reward_model(saved_policy(tmp_path))


def test_damaged_weights_say_so(tmp_path: Path) -> None:
    saved_policy(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelUnusable, match=str(tmp_path)):
        load_policy(tmp_path)


def test_a_head_of_another_width_says_so(tmp_path: Path) -> None:
    save_reward_model(scalar_model_from(tiny_policy(width=32)), tokenizer(), tmp_path / "wide")
    save_reward_model(scalar_model_from(tiny_policy()), tokenizer(), tmp_path / "narrow")
    (tmp_path / "narrow" / HEAD_FILE).write_bytes((tmp_path / "wide" / HEAD_FILE).read_bytes())
    with pytest.raises(ModelUnusable, match="scalar head"):
        load_reward_model(tmp_path / "narrow")


def test_the_pad_token_falls_back_to_eos() -> None:
    with_pad, without_pad = tokenizer(), tokenizer()
    without_pad.pad_token = None
    assert (pad_id_of(with_pad), pad_id_of(without_pad)) == (0, EOS)


def test_nonfinite_weights_are_counted() -> None:
    model = ScalarModel(tiny_policy().get_decoder())
    assert nonfinite_weights(model) == 0
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
        model.trunk.get_input_embeddings().weight[3, :2] = math.inf
    assert nonfinite_weights(model) == 3
