"""The most memory a stage of ours takes, in a process that does nothing else: ``python train_memory.py STAGE HOME``.

Prints JSON, all in MiB: ``peak`` of the resident memory above what it was when all was imported, and what must be
there: ``weights``, ``gradients`` and ``optimizer``. The rest are activations, and what the allocator keeps.
"""

import json
import re
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import torch
from train_inputs import Inputs

from train import ppo, reward_model, sft
from train.batches import RankedPrompt
from train.settings import AlarmSettings, PpoSettings, RewardModelSettings, SftSettings

STAGES = ("sft", "reward model", "ppo")
_FLOAT_MIB = 4 / 2**20


def status(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def run_sft(inputs: Inputs, out: Path) -> None:
    """Two steps of 16 demonstrations, with no text mixed in."""
    demonstrations = [(one.prompt_ids, one.completions[0]) for one in _ranked(inputs, 32)]
    settings = SftSettings(epochs=1, batch_size=16, pretraining_mix=0)
    sft.run(settings, inputs.policy, demonstrations, out, pretraining=None, seed=0)


def run_reward_model(inputs: Inputs, out: Path) -> None:
    """Two steps of 16 prompts with six completions each."""
    settings = RewardModelSettings(batch_prompts=16)
    reward_model.run(settings, inputs.policy, _ranked(inputs, 32), out, demonstrations=[], held_out=[], seed=0)


def run_ppo(inputs: Inputs, out: Path) -> None:
    """Two iterations of 64 episodes."""
    settings = PpoSettings(
        iterations=2,
        episodes_per_iteration=64,
        max_completion_tokens=64,
        value_only_iterations=0,
        target_kl=None,
        ptx_coef=0,
        normalize_score=False,
        alarms=AlarmSettings(patience=0),
    )
    given = inputs.ppo(ragged=False)
    prompts = [tuple(prompt) for prompt in json.loads(given.prompts.read_text())]
    ppo.run(
        settings,
        given.policy,
        given.policy,
        given.reward_model,
        prompts,
        out,
        pretraining=None,
        resume_dir=None,
        seed=0,
    )


def _ranked(inputs: Inputs, prompts: int) -> list[RankedPrompt]:
    pairs = tuple(combinations(range(6), 2))
    return [
        RankedPrompt(tuple(one["prompt"]), tuple(map(tuple, one["completions"])), pairs)
        for one in json.loads(inputs.rankings(6, 128, prompts).read_text())
    ]


_RUN: dict[str, tuple[Callable[[Inputs, Path], None], int, int]] = {
    "sft": (run_sft, 1, 0),
    "reward model": (run_reward_model, 1, 0),
    # The policy and the value model learn; the reference, the reward model and the averaged policy do not.
    "ppo": (run_ppo, 2, 3),
}
"""For each stage how many models learn in it, and how many more there are."""


def main(stage: str, home: Path) -> None:
    """Run ``stage`` on the inputs in ``home`` and print what it took."""
    torch.set_num_threads(1)
    inputs = Inputs(home)
    run, learning, frozen = _RUN[stage]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports, is forgotten (proc(5))
    before = status("VmRSS")
    run(inputs, home / f"{stage}-out")
    peak, model = status("VmHWM") - before, inputs.parameters * _FLOAT_MIB
    found = {"peak": peak, "weights": (learning + frozen) * model}
    found |= {"gradients": learning * model, "optimizer": 2 * learning * model}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
