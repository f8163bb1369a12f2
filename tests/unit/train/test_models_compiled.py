"""Compiled transformer blocks compute what the others do; half a minute each, so ``make test-models`` runs them."""

import pytest
import torch
from tiny_policies import EOS, tiny_policy

from train import sft
from train.batches import collate
from train.running.devices import Device

BATCH = collate([(3, 4, 5, 6, 7, 8), (9,), (10, 11, 12)], [(13, EOS), (14, 15, 2, 3, EOS), (4, 4, 4)], 0)


@pytest.mark.models
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # two of torch's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_compute_the_same(family: str, checkpointed: bool) -> None:
    compiled = Device(compiled=True, checkpointed=checkpointed).prepare(tiny_policy(family))
    plain = tiny_policy(family)
    losses = [sft.completion_loss(policy, BATCH) for policy in (compiled, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    for loss in losses:
        torch.autograd.backward(loss)
    for ours, expected in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, expected.grad, atol=1e-4)
