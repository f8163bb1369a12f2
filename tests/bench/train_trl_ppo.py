"""TRL's experimental PPOTrainer, taking turns: run by the Python of its own environment, told by ``train_turns``.

The same models, prompts, lengths, optimizer and number of updates as ours. Where lengths are ragged, EOS ends a
completion; else there is no stop token.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from train_turns import Turns, serve
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

FOREVER = 1_000_000_000


class Laps:
    """Where an iteration's time goes, seen from the functions it calls: sampling, then scoring, then all the rest."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._last = time.perf_counter()

    def after(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which ends a lap of ``part`` each time it returns."""

        def timed(*arguments: Any, **named: Any) -> Any:
            returned = function(*arguments, **named)
            self.end(part)
            return returned

        return timed

    def end(self, part: str) -> None:
        """All time since the last lap was spent on ``part``."""
        now = time.perf_counter()
        self._turns.spent(part, now - self._last)
        self._last = now

    def begin(self) -> None:
        """Start anew."""
        self._last = time.perf_counter()


def train(turns: Turns, asked: dict[str, Any], out: Path) -> None:
    """Iterations of ``episodes`` in as many minibatches as asked, each one step."""
    episodes = asked["episodes"]
    config = PPOConfig(
        output_dir=out,
        total_episodes=FOREVER,
        per_device_train_batch_size=episodes,
        gradient_accumulation_steps=1,
        num_mini_batches=asked["minibatches"],
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=asked["sampled_together"],
        num_sample_generations=0,
        response_length=asked["completion_tokens"],
        stop_token="eos" if asked["ragged"] else None,
        missing_eos_penalty=None,
        temperature=1.0,
        learning_rate=9e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        weight_decay=0.0,
        gradient_checkpointing=False,
        bf16=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    laps = Laps(turns)
    takes_turns = TrainerCallback()

    def after_step(*_: Any, **__: Any) -> None:
        laps.end("update")
        turns.step_done()
        laps.begin()

    takes_turns.on_step_end = after_step
    ppo_trainer.batch_generation = laps.after("sample", ppo_trainer.batch_generation)
    ppo_trainer.get_reward = laps.after("score", ppo_trainer.get_reward)
    scorers = [
        AutoModelForSequenceClassification.from_pretrained(asked["policy"], num_labels=1, dtype=torch.float32)
        for _ in range(2)
    ]
    policies = [AutoModelForCausalLM.from_pretrained(asked["policy"], dtype=torch.float32) for _ in range(2)]
    tokenizer = AutoTokenizer.from_pretrained(asked["policy"], padding_side="left")
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policies[0],
        ref_model=policies[1],
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in json.loads(Path(asked["prompts"]).read_text())]),
        callbacks=[takes_turns],
    )
    laps.begin()
    trainer.train()


if __name__ == "__main__":
    serve(train)
