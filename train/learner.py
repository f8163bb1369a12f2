"""The four models of PPO, what trains two of them, and all of it that changes (InstructGPT §3.5 and §C.4)."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.batches import TokenStream
from train.errors import ModelUnusable
from train.kl_control import adapted
from train.models import load_policy, load_tokenizer
from train.optimizer import adamw
from train.scalar_model import ScalarModel, load_reward_model
from train.settings import PpoSettings


@dataclass
class Learner:
    """The four models, what trains them, and how far they are.

    Attributes:
        tokenizer: the policy's.
        policy: learns.
        reference: where the KL reward measures from; frozen.
        reward_model: scores completions, divided by ``score_sd``; frozen.
        value_model: expects rewards; learns, from the reward model's weights on.
        averaged: exponential moving average of the policy over iterations, or None.
        policy_optimizer, value_optimizer: of the two that learn.
        score_sd: what scores were divided by.
        missing_eos_score: the score of every unfinished completion, after that division.
        sampler_gap: the most so far, in nats, by which sampler and trainer differed in a token's log-probability.
        kl_coef: β of the KL reward, as adapted so far.
        iteration: iterations done.
        history: the numbers of each.
    """

    tokenizer: PreTrainedTokenizerBase
    policy: PreTrainedModel
    reference: PreTrainedModel
    reward_model: ScalarModel
    value_model: ScalarModel
    averaged: PreTrainedModel | None
    policy_optimizer: torch.optim.AdamW
    value_optimizer: torch.optim.AdamW
    score_sd: float
    missing_eos_score: float
    sampler_gap: float
    kl_coef: float
    iteration: int
    history: list[dict[str, float]]

    @classmethod
    def load(cls, settings: PpoSettings, policy_dir: Path, reference_dir: Path, reward_model_dir: Path) -> "Learner":
        """The models as they are before the first iteration.

        Raises ModelUnusable where a directory does not hold what it should, vocabularies differ, or a pessimistic
        score is asked of a reward model with one head.
        """
        policy, reference = load_policy(policy_dir), load_policy(reference_dir)
        reward_model = load_reward_model(reward_model_dir)
        sizes = {policy.config.vocab_size, reference.config.vocab_size, reward_model.trunk.config.vocab_size}
        if len(sizes) > 1:
            raise ModelUnusable(
                f"{policy_dir}, {reference_dir} and {reward_model_dir} have vocabularies of {sorted(sizes)} tokens; "
                "the policy, its reference and the reward model must read the same tokens"
            )
        if settings.score_pessimism and reward_model.heads == 1:
            raise ModelUnusable(
                f"ppo.score_pessimism is {settings.score_pessimism}, but {reward_model_dir} has one head, which never "
                "disagrees with itself: train it with more heads, or set score_pessimism to 0"
            )
        value_model = reward_model.merged()
        averaged = copy.deepcopy(policy).requires_grad_(False) if settings.ema else None
        return cls(
            tokenizer=load_tokenizer(policy_dir),
            policy=policy,
            reference=reference.requires_grad_(False),
            reward_model=reward_model.requires_grad_(False),
            value_model=value_model,
            averaged=averaged,
            policy_optimizer=adamw(policy, settings.policy_lr, epsilon=1e-5),
            value_optimizer=adamw(value_model, settings.value_lr, epsilon=1e-5),
            score_sd=1.0,
            missing_eos_score=0.0,
            sampler_gap=0.0,
            kl_coef=settings.kl_coef,
            iteration=0,
            history=[],
        )

    def scale_scores(self, score_sd: float) -> None:
        """Divide what the reward model says, and the value model expects, by ``score_sd``."""
        self.score_sd = score_sd
        self.reward_model.scale(1 / score_sd)
        self.value_model.scale(1 / score_sd)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the averaged policy, where there is one, 1 − decay of the way to the policy."""
        if self.averaged is not None:
            for mean, weight in zip(self.averaged.parameters(), self.policy.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)

    def steer_kl(self, kl: float, settings: PpoSettings) -> None:
        """Adapt β, where ``settings`` name a target, to an iteration whose completions were ``kl`` nats away."""
        if settings.adaptive_kl_target is not None:
            self.kl_coef = adapted(
                self.kl_coef,
                kl,
                target=settings.adaptive_kl_target,
                horizon=settings.adaptive_kl_horizon,
                episodes=settings.episodes_per_iteration,
            )

    def note(self, numbers: dict[str, float]) -> None:
        """Finish an iteration: keep its numbers."""
        self.iteration += 1
        self.history.append(numbers)
        self.sampler_gap = max(self.sampler_gap, numbers.get("sampler_gap", 0.0))

    def state(self, pretraining: TokenStream | None) -> dict[str, Any]:
        """What a resume point holds; the reference and the reward model never change."""
        return {
            "policy": self.policy.state_dict(),
            "value_model": self.value_model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
            "pretraining": None if pretraining is None else pretraining.position(),
            "score_sd": self.score_sd,
            "missing_eos_score": self.missing_eos_score,
            "sampler_gap": self.sampler_gap,
            "kl_coef": self.kl_coef,
            "iteration": self.iteration,
            "history": self.history,
        }

    def restore(self, saved: dict[str, Any], pretraining: TokenStream | None) -> None:
        """Go to the moment ``state`` was taken."""
        self.scale_scores(saved["score_sd"])
        self.missing_eos_score, self.sampler_gap = saved["missing_eos_score"], saved["sampler_gap"]
        self.kl_coef = saved["kl_coef"]
        self.policy.load_state_dict(saved["policy"])
        self.value_model.load_state_dict(saved["value_model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(saved["averaged"])
        self.policy_optimizer.load_state_dict(saved["policy_optimizer"])
        self.value_optimizer.load_state_dict(saved["value_optimizer"])
        if pretraining is not None:
            pretraining.seek(saved["pretraining"])
        self.iteration, self.history = saved["iteration"], saved["history"]
