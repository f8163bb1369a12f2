"""Adapters: silent at first, off they give the base back, and what is written with them is a plain model."""

from pathlib import Path

import pytest
import torch
from tiny_policies import EOS, FAMILIES, saved_policy, tiny_policy, tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from train import sft
from train.batches import Demonstrated, collate
from train.errors import ModelUnusable
from train.lora import Unadapted, adapt, learning, plain_weights
from train.models import completion_logits, load_policy, save_policy
from train.running.devices import CPU, Device
from train.running.optimizer import adamw, update
from train.settings import LoraSettings, SftSettings

RANK_2 = LoraSettings(rank=2, alpha=4)
BATCH = collate([(3, 4, 5, 6, 7, 8), (9,), (10, 11, 12)], [(13, EOS), (14, 15, 2, 3, EOS), (4, 4, 4)], 0)


def _adapted(family: str = "llama", *, trained: bool = True) -> PreTrainedModel:
    policy = adapt(tiny_policy(family), RANK_2, seed=0)
    if trained:
        with torch.no_grad():
            for _, weight in learning(policy):
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_say_nothing_and_off_they_never_do(family: str) -> None:
    base = completion_logits(tiny_policy(family), BATCH)
    assert completion_logits(_adapted(family, trained=False), BATCH).equal(base)
    trained = _adapted(family)
    adapted = completion_logits(trained, BATCH)
    assert (adapted - base).abs().max() > 0.1
    assert completion_logits(Unadapted(trained), BATCH).equal(base)
    assert completion_logits(trained, BATCH).equal(adapted)


def test_the_update_is_the_product_of_the_papers_two_matrices() -> None:
    """W x + (α/r) B A x (Hu et al. 2021, §4.1), here of one layer by hand."""
    layer = _adapted().model.layers[0].self_attn.q_proj
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((2, 16), (16, 2))
    expected = x @ tiny_policy().model.layers[0].self_attn.q_proj.weight.T + (4 / 2) * (x @ a.T @ b.T)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_a_plain_model_that_computes_the_same(family: str, tmp_path: Path) -> None:
    policy, plain = _adapted(family), tiny_policy(family)
    save_policy(policy, tokenizer(family), tmp_path)
    saved = load_policy(tmp_path)
    assert {name for name, _ in saved.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert torch.allclose(completion_logits(saved, BATCH), completion_logits(policy, BATCH), atol=1e-5)
    assert set(plain_weights(plain)) == {name for name, _ in plain.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_the_same_from_checkpointed_activations(family: str) -> None:
    gradients = []
    for device in (CPU, Device(checkpointed=True)):
        policy = device.prepare(_adapted(family))
        torch.autograd.backward(sft.completion_loss(policy, BATCH))
        gradients.append([weight.grad for _, weight in learning(policy)])
    assert all(ours.equal(expected) for ours, expected in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_get_gradients_and_optimizer_states(family: str) -> None:
    policy, plain = _adapted(family), tiny_policy(family)
    kept = []
    for model in (policy, plain):
        optimizer = adamw(model, 1e-2)
        torch.autograd.backward(sft.completion_loss(model, BATCH))
        assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())
        update(optimizer, model.parameters(), 1e-2, 1.0)
        kept.append(sum(moment.numel() for state in optimizer.state.values() for moment in state.values()))
    assert {".lora_A." in name or ".lora_B." in name for name, _ in learning(policy)} == {True}
    assert kept[0] < kept[1] / 3
    for name, weight in plain.named_parameters():
        assert weight.requires_grad, name


def test_demonstrations_are_learnt_by_updates_of_the_rank_asked_for(tmp_path: Path) -> None:
    base = saved_policy(tmp_path / "base")
    settings = SftSettings(epochs=60, batch_size=2, learning_rate=2e-2, dropout=0.0, pretraining_mix=0.0)
    written: list[Demonstrated] = [((3, 4), (5, 6, EOS)), ((7,), (8, EOS))]
    figures = sft.run(settings, base, written, tmp_path / "out", pretraining=None, seed=0, lora=RANK_2)
    assert figures["loss"] < 0.3 < figures["first_epoch_loss"]
    before, after = load_policy(base).state_dict(), load_policy(tmp_path / "out").state_dict()
    moved = {name: after[name] - before[name] for name in before}
    assert {name for name, change in moved.items() if change.any()} == {
        name for name in before if name.endswith("_proj.weight")
    }
    assert {_rank(change) for name, change in moved.items() if name.endswith("_proj.weight")} == {2}


def _rank(matrix: Tensor) -> int:
    """The rank of a matrix that was rounded to fp32."""
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-4))


def test_the_seed_draws_the_adapters() -> None:
    drawn = [adapt(tiny_policy(), RANK_2, seed=seed).state_dict() for seed in (1, 1, 2)]
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert drawn[0][name].equal(drawn[1][name]) and not drawn[0][name].equal(drawn[2][name])


def test_rank_0_leaves_a_model_as_it_is() -> None:
    policy = adapt(tiny_policy(), LoraSettings(), seed=0)
    assert len(learning(policy)) == len(list(tiny_policy().parameters()))


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("no_such_layer", "no_such_layer"),
        ("embed_tokens", "only linear layers besides the unembedding can be adapted, not embed_tokens"),
        ("lm_head", "only linear layers besides the unembedding can be adapted, not lm_head"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(target: str, complaint: str) -> None:
    with pytest.raises(ModelUnusable, match=complaint):
        adapt(tiny_policy("untied"), LoraSettings(rank=2, target_modules=(target,)), seed=0)


def test_named_layers_alone_are_adapted() -> None:
    policy = adapt(tiny_policy(), LoraSettings(rank=2, target_modules=("q_proj", "v_proj")), seed=0)
    assert len(learning(policy)) == 2 * 2 * 2  # layers, projections, factors
