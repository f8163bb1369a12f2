"""The stages of training at toy size, for one process and for two under torchrun to do the same work."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_policies import EOS, saved_policy

from train import sft
from train.batches import Demonstrated, TokenStream
from train.devices import CPU, Device
from train.distributed import joined
from train.settings import LoraSettings, SftSettings

WRITTEN: list[Demonstrated] = [
    ((3, 4), (5, 6, 7, EOS)),
    ((7,), (8, EOS)),
    ((9, 10, 11), (12, EOS)),
    ((4, 4, 5), (6, 6, 6, 6, EOS)),
    ((13,), (14, EOS)),
]
"""Lengths differ, so that two processes' tokens do; in batches of two, the last is one process's alone."""


def text() -> TokenStream:
    """Pretraining text: three rows a step are two for one process and one for the other."""
    return TokenStream([[3, 5, 7, 9, 11, 13, EOS], [2, 4, 6, 8, EOS]], sequence_length=8, seed=0)


def run_sft(home: Path, *, device: Device = CPU, lora: LoraSettings | None = None) -> dict[str, float]:
    settings = SftSettings(
        epochs=2, batch_size=2, learning_rate=1e-2, dropout=0.0, pretraining_mix=0.5, pretraining_batch=3
    )
    return sft.run(
        settings,
        home.parent / "policy",
        WRITTEN,
        home,
        pretraining=text(),
        seed=0,
        device=device,
        lora=lora or LoraSettings(),
    )


STAGES: dict[str, Callable[[Path], dict[str, float]]] = {
    "sft": run_sft,
    "sft-lora": lambda home: run_sft(home, lora=LoraSettings(rank=2)),
    "sft-checkpointed": lambda home: run_sft(home, device=Device(checkpointed=True)),
}


def prepare(home: Path) -> None:
    """What the stages start from."""
    saved_policy(home / "policy")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined():
        for name, stage in STAGES.items():
            stage(Path(sys.argv[1]) / name)
