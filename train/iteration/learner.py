"""The four models of PPO, what trains two of them, and all of it that changes (InstructGPT §3.5 and §C.4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.batches import TokenStream
from train.errors import ModelUnusable
from train.iteration.kl_control import adapted
from train.lora import NO_ADAPTERS, Unadapted, adapt, learning
from train.models import load_policy, load_tokenizer
from train.running.devices import CPU, Device
from train.running.distributed import Ranks
from train.running.optimizer import adamw
from train.scalar_model import ScalarModel, load_reward_model
from train.settings import LoraSettings, PpoSettings


@dataclass
class Learner:
    """The four models, what trains them, and how far they are.

    With adapters they stand on two trunks: policy and reference share one where training starts from the reference,
    value model and reward model the other, each pair one with its adapters and one without. (The reward model's cannot
    be the policy's too: a published reward model is whole, trained as far as its own adapters took it.)

    Attributes:
        device: what they compute on.
        ranks: the processes that each have a part of them.
        tokenizer: the policy's.
        policy: learns.
        reference: where the KL reward measures from; frozen. It may be the policy, ``Unadapted``.
        reward_model: scores completions, divided by ``score_sd``; frozen.
        value_model: expects rewards; learns, from the reward model's weights on.
        averaged: exponential moving average over iterations of what the policy learns, or None. Of adapters, each of
            the two factors is averaged.
        policy_optimizer, value_optimizer: of the two that learn.
        score_sd: what scores were divided by.
        missing_eos_score: the score of every unfinished completion, after that division.
        sampler_gap: the most so far, in nats, by which sampler and trainer differed in a token's log-probability.
        kl_coef: β of the KL reward, as adapted so far.
        iteration: iterations done.
        history: the numbers of each.
    """

    device: Device
    ranks: Ranks
    tokenizer: PreTrainedTokenizerBase
    policy: PreTrainedModel
    reference: PreTrainedModel
    reward_model: ScalarModel
    value_model: ScalarModel
    averaged: dict[str, Tensor] | None
    policy_optimizer: torch.optim.AdamW
    value_optimizer: torch.optim.AdamW
    score_sd: float
    missing_eos_score: float
    sampler_gap: float
    kl_coef: float
    iteration: int
    history: list[dict[str, float]]

    @classmethod
    def load(
        cls,
        settings: PpoSettings,
        policy_dir: Path,
        reference_dir: Path,
        reward_model_dir: Path,
        *,
        device: Device = CPU,
        lora: LoraSettings = NO_ADAPTERS,
        seed: int = 0,
    ) -> "Learner":
        """The models as they are before the first iteration; ``seed`` is of adapters.

        Raises ModelUnusable where a directory does not hold what it should, vocabularies differ, or a pessimistic
        score is asked of a reward model with one head.
        """
        policy, reward_model = load_policy(policy_dir), load_reward_model(reward_model_dir)
        shared = bool(lora.rank) and policy_dir.resolve() == reference_dir.resolve()
        reference = policy if shared else load_policy(reference_dir).requires_grad_(False)
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
        value_model = reward_model.merged(reward_model.trunk if lora.rank else None)
        adapt(policy, lora, seed=seed)
        adapt(value_model.trunk, lora, seed=seed)
        if lora.rank:
            reward_model = reward_model.on(Unadapted(reward_model.trunk))
        reward_model.requires_grad_(False)
        ranks = Ranks.current()
        for model in (policy, value_model, reward_model, *(() if shared else (reference,))):
            device.prepare(ranks.shard(model))
        return cls(
            device=device,
            ranks=ranks,
            tokenizer=load_tokenizer(policy_dir),
            policy=policy,
            reference=Unadapted(policy) if shared else reference,
            reward_model=reward_model,
            value_model=value_model,
            averaged={name: weight.detach().clone() for name, weight in learning(policy)} if settings.ema else None,
            policy_optimizer=adamw(policy, settings.policy_lr, epsilon=1e-5),
            value_optimizer=adamw(value_model, settings.value_lr, epsilon=1e-5),
            score_sd=1.0,
            missing_eos_score=0.0,
            sampler_gap=0.0,
            kl_coef=settings.kl_coef,
            iteration=0,
            history=[],
        )

    def trained(self) -> dict[str, tuple[nn.Module, torch.optim.AdamW]]:
        """The two models that learn, by name, with what trains them."""
        return {
            "policy": (self.policy, self.policy_optimizer),
            "value_model": (self.value_model, self.value_optimizer),
        }

    def scale_scores(self, score_sd: float) -> None:
        """Divide what the reward model says, and the value model expects, by ``score_sd``."""
        self.score_sd = score_sd
        self.reward_model.scale(1 / score_sd)
        self.value_model.scale(1 / score_sd)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the averaged policy, where there is one, 1 − decay of the way to the policy."""
        if self.averaged is not None:
            for name, weight in learning(self.policy):
                self.averaged[name].lerp_(weight, 1 - decay)

    @torch.no_grad()
    def result(self) -> PreTrainedModel:
        """The policy to publish: itself, with its averaged weights put into it where they are kept."""
        if self.averaged is not None:
            for name, weight in learning(self.policy):
                weight.copy_(self.averaged[name])
        return self.policy

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
        """What a resume point holds beside the averaged policy and what is ``trained``."""
        return {
            "pretraining": None if pretraining is None else pretraining.position(),
            "score_sd": self.score_sd,
            "missing_eos_score": self.missing_eos_score,
            "sampler_gap": self.sampler_gap,
            "kl_coef": self.kl_coef,
            "iteration": self.iteration,
            "history": self.history,
        }

    def restore(self, saved: Mapping[str, Any], pretraining: TokenStream | None) -> None:
        """Go to the moment ``state`` was taken; the weights of ``trained`` are the caller's to put back."""
        self.scale_scores(saved["score_sd"])
        self.missing_eos_score, self.sampler_gap = saved["missing_eos_score"], saved["sampler_gap"]
        self.kl_coef = saved["kl_coef"]
        if pretraining is not None:
            pretraining.seek(saved["pretraining"])
        self.iteration, self.history = saved["iteration"], saved["history"]
