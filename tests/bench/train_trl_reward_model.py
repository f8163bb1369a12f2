"""TRL's RewardTrainer, taking turns: run by the Python of its own environment, told what to train by ``train_turns``.

The same model, pairs, optimizer and steps as ours; nothing is logged, saved or evaluated.
"""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from train_turns import Turns, serve
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer

FOREVER = 1_000_000


def pairs(rankings: Path) -> Dataset:
    """Every pair of every ranking, each with its own two copies of the prompt."""
    rows = [
        {"chosen_ids": one["prompt"] + chosen, "rejected_ids": one["prompt"] + rejected}
        for one in json.loads(rankings.read_text())
        for chosen, rejected in combinations(one["completions"], 2)
    ]
    return Dataset.from_list(rows)


def train(turns: Turns, asked: dict[str, Any], out: Path) -> None:
    """Steps of ``pairs_per_step`` pairs, ``pairs_per_forward`` at once."""
    config = RewardConfig(
        output_dir=out,
        max_steps=FOREVER,
        per_device_train_batch_size=asked["pairs_per_forward"],
        gradient_accumulation_steps=asked["pairs_per_step"] // asked["pairs_per_forward"],
        learning_rate=9e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    takes_turns = TrainerCallback()
    takes_turns.on_step_end = lambda *_, **__: turns.step_done()
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(asked["policy"], num_labels=1, dtype=torch.float32),
        args=config,
        train_dataset=pairs(Path(asked["rankings"])),
        processing_class=AutoTokenizer.from_pretrained(asked["policy"]),
        callbacks=[takes_turns],
    )
    trainer.train()


if __name__ == "__main__":
    serve(train)
