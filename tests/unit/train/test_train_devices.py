"""Mixed precision keeps fp32 weights, checkpointing changes no gradient, and copies of a prepared model stand alone."""

import copy
from pathlib import Path

import pytest
import torch
from distributed_stages import prepare, run_ppo, run_reward_model
from safetensors.torch import load_file
from tiny_policies import EOS, FAMILIES, saved_policy, tiny_policy
from torch import Tensor
from transformers import PreTrainedModel

from train import sft
from train.batches import Batch, collate
from train.errors import DeviceUnusable
from train.models import completion_logits, load_policy
from train.running.devices import CPU, Device, blocks, exact
from train.scalar_model import scalar_model_from
from train.settings import DeviceSettings, SftSettings

BATCH = collate([(3, 4, 5, 6, 7, 8), (9,), (10, 11, 12)], [(13, EOS), (14, 15, 2, 3, EOS), (4, 4, 4)], 0)
HALF = Device(autocast=torch.bfloat16)


def _loss_and_gradient(policy: PreTrainedModel) -> tuple[Tensor, Tensor]:
    loss = sft.completion_loss(policy, BATCH)
    torch.autograd.backward(loss)
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in policy.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_close_and_the_weights_whole(family: str) -> None:
    policy = HALF.prepare(tiny_policy(family))
    logits = completion_logits(policy, BATCH)
    exact = completion_logits(tiny_policy(family), BATCH)
    assert logits.dtype == torch.float32
    assert not logits.equal(exact) and logits.equal(logits.bfloat16().float())  # computed in bf16
    loss, gradient = _loss_and_gradient(policy)
    exact_loss, exact_gradient = _loss_and_gradient(tiny_policy(family))
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.01)
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.99
    assert {weight.dtype for weight in policy.parameters()} == {gradient.dtype} == {torch.float32}


def test_half_precision_can_be_put_aside() -> None:
    policy = HALF.prepare(tiny_policy())
    before = completion_logits(policy, BATCH)
    with exact(policy):
        assert completion_logits(policy, BATCH).equal(completion_logits(tiny_policy(), BATCH))
    assert completion_logits(policy, BATCH).equal(before)


def test_a_cache_is_filled_once_where_activations_are_checkpointed() -> None:
    policy = Device(checkpointed=True).prepare(tiny_policy())
    answer = policy(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True)
    torch.autograd.backward(answer.logits.sum())
    assert answer.past_key_values.get_seq_length() == 3


def test_a_scalar_head_says_more_than_bf16_can() -> None:
    exact, model = (scalar_model_from(tiny_policy(), torch.Generator().manual_seed(0)) for _ in range(2))
    HALF.prepare(model)
    with torch.no_grad():
        scores = model.score(BATCH)
        assert not scores.equal(scores.bfloat16().float())
        assert torch.allclose(scores, exact.score(BATCH), atol=0.05)


@pytest.mark.parametrize("device", [HALF, Device(checkpointed=True)])
def test_a_copy_of_a_prepared_model_computes_with_its_own_weights(device: Device) -> None:
    policy = device.prepare(tiny_policy())
    before = completion_logits(policy, BATCH)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(1)
    assert completion_logits(policy, BATCH).equal(before)
    assert not completion_logits(other, BATCH).equal(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_keeps_less_and_changes_nothing(family: str) -> None:
    plain, checkpointed = tiny_policy(family), Device(checkpointed=True).prepare(tiny_policy(family))
    assert len(blocks(checkpointed)) == 2
    assert _kept_numbers(checkpointed) < _kept_numbers(plain) / 2
    for ours, expected in zip(_loss_and_gradient(checkpointed), _loss_and_gradient(plain), strict=True):
        assert ours.equal(expected)


def test_checkpointed_dropout_is_the_same_both_times() -> None:
    policies = [device.prepare(tiny_policy("gpt2", dropout=0.5)).train() for device in (CPU, Device(checkpointed=True))]
    gradients = []
    for policy in policies:
        with CPU.seeded(3):
            gradients.append(_loss_and_gradient(policy)[1])
    assert gradients[0].equal(gradients[1])


def _kept_numbers(policy: PreTrainedModel) -> int:
    """How many numbers autograd keeps for the backward pass of a loss."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sft.completion_loss(policy, BATCH)
    return sum(kept)


def test_demonstrations_are_learnt_in_half_precision(tmp_path: Path) -> None:
    base = saved_policy(tmp_path / "base")
    settings = SftSettings(epochs=40, batch_size=2, learning_rate=1e-2, dropout=0.0, pretraining_mix=0.0)
    written = [((3, 4), (5, 6, EOS)), ((7,), (8, EOS))]
    losses = {
        device: sft.run(settings, base, written, tmp_path / "out", pretraining=None, seed=0, device=device)["loss"]
        for device in (CPU, HALF)
    }
    assert losses[CPU] < 0.05 and losses[HALF] == pytest.approx(losses[CPU], abs=0.02)
    assert {weight.dtype for weight in load_policy(tmp_path / "out").parameters()} == {torch.float32}


def test_reward_models_and_policies_learn_in_half_precision(tmp_path: Path) -> None:
    prepare(tmp_path)
    exact_fit, half_fit = (
        run_reward_model(tmp_path / f"fit-{device.autocast}", device=device) for device in (CPU, HALF)
    )
    assert half_fit["loss"] == pytest.approx(exact_fit["loss"], rel=0.05) and half_fit["loss"] != exact_fit["loss"]
    assert half_fit["shares_prompts"] == 1.0  # which is tried in full precision
    exact_run, half_run = (run_ppo(tmp_path / f"run-{device.autocast}", device=device) for device in (CPU, HALF))
    assert half_run["score_sd"] == pytest.approx(exact_run["score_sd"], rel=0.02)
    assert half_run["ptx_loss"] == pytest.approx(exact_run["ptx_loss"], rel=0.02)
    weights = list(load_policy(tmp_path / "run-torch.bfloat16").parameters())
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert not any(weight.equal(weight.bfloat16().float()) for weight in weights)  # nor were they rounded on the way


def test_reward_models_and_policies_learn_the_same_from_checkpointed_activations(tmp_path: Path) -> None:
    prepare(tmp_path)
    for device in (CPU, Device(checkpointed=True)):
        run_reward_model(tmp_path / f"fit-{device.checkpointed}", device=device)
        run_ppo(tmp_path / f"run-{device.checkpointed}", device=device)
    for stage, tolerance in (("run", 0.0), ("fit", 1e-4)):  # rankings then share no prompts, which rounds otherwise
        plain, checkpointed = (load_file(tmp_path / f"{stage}-{kept}" / "model.safetensors") for kept in (False, True))
        assert all(torch.allclose(checkpointed[name], plain[name], rtol=0, atol=tolerance) for name in plain)


def test_a_batch_is_placed_whole() -> None:
    placed = Device(torch.device("meta")).place(BATCH)
    tensors = [value for value in vars(placed).values() if isinstance(value, Tensor)]
    assert len(tensors) == 4 and all(tensor.is_meta for tensor in tensors)
    assert isinstance(placed, Batch) and placed.prompt_length == BATCH.prompt_length


def test_seeding_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with CPU.seeded(1):
        first = torch.rand(2)
    assert torch.rand(2).equal(expected)
    with CPU.seeded(1):
        assert torch.rand(2).equal(first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_auto_is_the_cpu_in_full_precision_and_cuda_is_refused() -> None:
    assert Device.choose(DeviceSettings()) == CPU
    asked = DeviceSettings(precision="bf16", compile=True, checkpointing=True)
    assert Device.choose(asked) == Device(torch.device("cpu"), torch.bfloat16, compiled=True, checkpointed=True)
    with pytest.raises(DeviceUnusable, match=r"train\.device\.device is cuda, but PyTorch finds no GPU"):
        Device.choose(DeviceSettings(device="cuda"))
