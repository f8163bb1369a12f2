"""The stages of training at toy size, for one process and for two under torchrun to do the same work."""

import asyncio
import json
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from improved_policies import PPO, PROMPTS, RANKED, REWARD_MODEL, WRITTEN
from tiny_loop import SETTINGS, tiny_loop
from tiny_policies import EOS, saved_policy
from torch import distributed
from transformers import PreTrainedModel

from deploy.versions import Draft, VersionKind
from train import ppo, reward_model, sft
from train.__main__ import app
from train.batches import TokenStream
from train.errors import DeviceUnusable, ResumePointUnusable
from train.iteration.shared_sampling import SharedSampler
from train.lora import NO_ADAPTERS
from train.running.devices import CPU, Device
from train.running.distributed import Ranks, joined
from train.sampling import Episodes
from train.settings import LoraSettings, PpoSettings, SftSettings

ADAPTERS = LoraSettings(rank=2)
SFT = SftSettings(epochs=2, batch_size=4, learning_rate=1e-2, dropout=0.0, pretraining_mix=0.5, pretraining_batch=3)
DEMONSTRATIONS = [*WRITTEN[:4], ((13,), (14, 2, 3, 3, 3, EOS))]
"""In batches of four the last is one process's alone."""
EPISODES = "episodes.pickle"


def text() -> TokenStream:
    """Pretraining text."""
    return TokenStream([[3, 5, 7, 9, 11, 13, EOS], [2, 4, 6, 8, EOS]], sequence_length=8, seed=0)


def run_sft(out: Path, *, device: Device = CPU, lora: LoraSettings = NO_ADAPTERS) -> dict[str, float]:
    """Three rows of text a step are two for one process and one for the other."""
    base = out.parent / "policy"
    return sft.run(SFT, base, DEMONSTRATIONS, out, pretraining=text(), seed=0, device=device, lora=lora)


def run_reward_model(out: Path, *, device: Device = CPU, lora: LoraSettings = NO_ADAPTERS) -> dict[str, float]:
    """Three rankings a step, of three completions each, ragged."""
    settings = REWARD_MODEL.model_copy(update={"batch_prompts": 3, "epochs": 2, "heads": 2})
    base = out.parent / "policy"
    return reward_model.run(
        settings, base, RANKED, out, demonstrations=WRITTEN, held_out=RANKED, seed=0, device=device, lora=lora
    )


def run_ppo(
    out: Path,
    *,
    device: Device = CPU,
    lora: LoraSettings = NO_ADAPTERS,
    stop_at: int | None = None,
    changes: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """PPO with text; ``stop_at`` an iteration ends the run there."""

    def stop(iteration: int, episodes: Episodes) -> dict[str, float]:
        if iteration == stop_at:
            raise KeyboardInterrupt
        return {}

    settings = PpoSettings.model_validate(PPO.model_dump() | {"episodes_per_forward": 3} | dict(changes or {}))
    home = out.parent
    return ppo.run(
        settings,
        home / "policy",
        home / "policy",
        home / "scorer",
        PROMPTS,
        out,
        pretraining=text(),
        resume_dir=home / f"{out.name}-resume",
        seed=0,
        device=device,
        lora=lora,
        on_iteration=stop,
    )


def run_ppo_twice(out: Path, *, lora: LoraSettings = NO_ADAPTERS) -> dict[str, float]:
    """A run that is stopped and resumed."""
    try:
        run_ppo(out, lora=lora, stop_at=2)
    except KeyboardInterrupt:
        return run_ppo(out, lora=lora)
    raise AssertionError("the run was not stopped")


STAGES: dict[str, Callable[[Path], dict[str, float]]] = {
    "sft": run_sft,
    "sft-lora": partial(run_sft, lora=ADAPTERS),
    "sft-checkpointed": partial(run_sft, device=Device(checkpointed=True)),
    "reward_model": run_reward_model,
    "reward_model-lora": partial(run_reward_model, lora=ADAPTERS),
    "ppo": run_ppo,
    "ppo-lora": partial(run_ppo, lora=ADAPTERS),
    "ppo-resumed": run_ppo_twice,
}


def prepare(home: Path) -> None:
    """What the stages start from."""
    saved_policy(home / "policy")
    settings = REWARD_MODEL.model_copy(update={"epochs": 2})
    reward_model.run(settings, home / "policy", RANKED, home / "scorer", demonstrations=WRITTEN, held_out=[], seed=0)


COMMANDS: dict[str, tuple[str, ...]] = {"reward-model": (), "ppo": ("--reward-model", "1")}
ENVIRONMENT = {
    f"INSTRUCTLOOP_TRAIN__{name.upper()}": json.dumps(SETTINGS.model_dump(mode="json")[name])
    for name in ("reward_model", "ppo", "evaluate", "worker")
}
"""Settings of the commands."""


def prepare_commands(home: Path, state: Path, redis_url: str) -> None:
    """What the commands start from: comparisons, a policy and the reward model of ``prepare``."""

    async def fill() -> None:
        async with tiny_loop(state, redis_url, home / "first") as loop:
            await loop.compare(40)
            loop.registry.publish(Draft(kind=VersionKind.REWARD_MODEL), home / "scorer")

    asyncio.run(fill())


def command(name: str, state: Path, home: Path) -> list[str]:
    """The arguments of ``python -m train``, which writes into ``by-NAME``."""
    return ["--state", str(state), name, str(home / f"by-{name}"), *COMMANDS[name]]


class Recording(SharedSampler):
    """Keeps the episodes that two processes draw together."""

    kept: list[Episodes]

    def sample(self, policy: PreTrainedModel, prompts: Sequence[Sequence[int]], generator: torch.Generator) -> Episodes:
        episodes = super().sample(policy, prompts, generator)
        type(self).kept.append(episodes)
        return episodes


def replay(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PPO in one process learn from the episodes that two drew: draws differ, what is learnt from them must not."""
    episodes = iter(pickle.loads((recorded / EPISODES).read_bytes()))

    class Replaying(SharedSampler):
        def sample(self, policy: PreTrainedModel, prompts: object, generator: torch.Generator) -> Episodes:
            torch.randint(2**62, (2,), generator=generator)  # as two processes take from it
            drawn: Episodes = next(episodes)
            return drawn

    monkeypatch.setattr(ppo, "SharedSampler", Replaying)


def check_words_between_processes(ranks: Ranks) -> None:
    """What two processes tell each other."""
    assert ranks.count == 2
    assert ranks.from_first(lambda: f"said by {ranks.rank}") == "said by 0"
    assert ranks.mean(ranks.rank) == 0.5 and ranks.greatest(ranks.rank) == 1
    own, _ = ranks.share(["a", "b", "c", "d", "e"])
    assert ranks.gather([letter.upper() for letter in own]) == ["A", "B", "C", "D", "E"]
    rows = torch.arange(6.0).view(3, 2)
    assert ranks.gather_rows(rows[ranks.rank :: 2]).equal(rows)


def check_a_damaged_part_is_refused(home: Path) -> None:
    """One bit of what the second process wrote is turned; neither process goes on."""
    (part,) = (home / "ppo-resume").glob("ppo.parts-*/__1_0.distcp")
    if Ranks.current().first:
        whole = bytearray(part.read_bytes())
        whole[len(whole) // 2] ^= 1
        part.write_bytes(whole)
    distributed.barrier()
    with pytest.raises(ResumePointUnusable, match="is damaged"):
        run_ppo(home / "ppo")


def run_commands(home: Path, state: Path, patched: pytest.MonkeyPatch) -> None:
    """Each command, in processes that have joined already: a group can be made only once under torchrun."""
    patched.setattr("train.__main__.joined", nullcontext)
    for name in COMMANDS:
        assert not app(command(name, state, home), standalone_mode=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    home, state = map(Path, sys.argv[1:])
    with joined(), pytest.MonkeyPatch.context() as patched:
        check_words_between_processes(Ranks.current())
        run_commands(home, state, patched)
        patched.setattr(ppo, "SharedSampler", Recording)
        with pytest.raises(DeviceUnusable, match="3 rows of a minibatch cannot be divided equally among 2 processes"):
            run_ppo(home / "uneven", changes={"episodes_per_iteration": 6})
        for name, stage in STAGES.items():
            Recording.kept = []
            stage(home / name)
            if Ranks.current().first:
                (home / name / EPISODES).write_bytes(pickle.dumps(Recording.kept))
        check_a_damaged_part_is_refused(home)
