"""Sampling from a policy whose transformer blocks are compiled; nothing is compiled for it, so this is quick."""

import pytest
import torch
from tiny_policies import EOS, PAD, tiny_policy

from train.running.devices import Device
from train.sampling import Episodes, sample_episodes

PROMPTS = [(3, 4, 5, 6), (7,), (8, 9)]


def sampled(device: Device) -> Episodes:
    random = torch.Generator().manual_seed(0)
    return sample_episodes(
        device.prepare(tiny_policy()), PROMPTS, eos_id=EOS, pad_id=PAD, max_completion_tokens=8, generator=random
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_a_compiled_policy_is_sampled_from_as_it_is() -> None:
    compiled, plain = sampled(Device(compiled=True)), sampled(Device())
    assert compiled.completions == plain.completions
    assert compiled.logprobs.equal(plain.logprobs)
