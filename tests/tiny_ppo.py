"""PPO on tiny models: a run takes a fraction of a second."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_policies import EOS, saved_policy, tiny_policy, tokenizer

from train import ppo
from train.batches import TokenStream
from train.sampling import Episodes
from train.scalar_model import save_reward_model, scalar_model_from
from train.settings import PpoSettings

PROMPTS = [(2, 3, 4), (5,), (6, 7), (8, 9, 10, 11), (12, 13), (14,)]
SETTINGS = PpoSettings(
    iterations=2,
    episodes_per_iteration=8,
    minibatches=2,
    policy_lr=1e-2,
    policy_lr_warmup_iterations=0,
    value_lr=1e-2,
    max_completion_tokens=6,
    value_only_iterations=0,
    target_kl=None,
    ptx_coef=0.0,
    ema=0.0,
    save_every=1,
)
Ran = tuple[dict[str, float], list[dict[str, float]], list[Episodes]]
"""What a run returned, its history, and the episodes of each iteration."""


def stream() -> TokenStream:
    return TokenStream([[2, 3, 4, 5, EOS], [6, 7, EOS], [8, 9, 10, 11, 12, EOS]], sequence_length=7, seed=0)


@dataclass(frozen=True)
class TinyPpo:
    """A policy, a different reference and a reward model with ``heads`` heads in ``home``."""

    home: Path
    heads: int = 1

    def __post_init__(self) -> None:
        saved_policy(self.home / "policy")
        saved_policy(self.home / "reference", tiny_policy(seed=1))
        model = scalar_model_from(tiny_policy(seed=2), torch.Generator().manual_seed(0), heads=self.heads)
        model.shift.fill_(0.3)
        save_reward_model(model, tokenizer(), self.home / "rm")

    def run(
        self,
        name: str = "run",
        *,
        policy: Path | None = None,
        reference: Path | None = None,
        prompts: Sequence[tuple[int, ...]] = tuple(PROMPTS),
        tasks: Sequence[str] | None = None,
        **changes: Any,
    ) -> Ran:
        """Run PPO with some settings changed; its resume point is in ``home / name``, its policy in ``out`` there."""
        seen: list[Episodes] = []

        def keep(iteration: int, episodes: Episodes) -> dict[str, float]:
            seen.append(episodes)
            return {"mine": float(iteration)}

        metrics = ppo.run(
            SETTINGS.model_copy(update=changes),
            policy or self.home / "policy",
            reference or self.home / "reference",
            self.home / "rm",
            prompts,
            self.home / name / "out",
            pretraining=stream(),
            resume_dir=self.home / name,
            seed=0,
            tasks=tasks,
            on_iteration=keep,
        )
        lines = (self.home / name / ppo.HISTORY_FILE).read_text().splitlines()
        return metrics, [json.loads(line) for line in lines], seen


@torch.no_grad()
def forward(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """What predicts each completion token, from one unpadded sequence: logits [R, V], or values [R]."""
    return differentiable_forward(model, prompt, completion)


def differentiable_forward(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    ids = torch.tensor([prompt + completion])
    if hasattr(model, "head"):
        every = model.numbers(model.trunk(input_ids=ids).last_hidden_state).mean(-1)[0]
    else:
        every = model(input_ids=ids).logits[0]
    predicting: torch.Tensor = every[len(prompt) - 1 : -1]
    return predicting


def logprobs_of(policy: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
    logprobs = forward(policy, prompt, completion).log_softmax(-1)
    return [logprobs[t, token].item() for t, token in enumerate(completion)]


def without_times(numbers: dict[str, float]) -> dict[str, float]:
    return {name: number for name, number in numbers.items() if not name.endswith("seconds")}
