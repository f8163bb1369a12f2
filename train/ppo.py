"""PPO against a reward model, with a KL reward and a pretraining mix: PPO-ptx (InstructGPT §3.5, eq. 2, and §C.4).

    maximize  E[r(x, y) − β log(π(y|x)/π_ref(y|x))]  +  γ_ptx E[log π(pretraining text)]

A bandit: one prompt, one completion, one score at its end. Each iteration samples a batch of episodes from
the policy and passes over it once. Dropout is off in every model. All randomness of an iteration derives
from the seed and the iteration's number, so a resumed run needs no random state to be bit-identical.

Letters in shapes: B episodes, R completion tokens (right-padded).
"""

import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deploy.files import replace_atomically
from train import resume
from train.batches import Batch, TokenStream
from train.errors import DatasetUnusable, ModelUnusable
from train.learner import Learner
from train.losses import (
    advantages_and_returns,
    entropy,
    explained_variance,
    k3,
    kl_rewards,
    policy_loss,
    token_logprobs,
    value_loss,
)
from train.masked import masked_mean, whiten
from train.models import (
    completion_logits,
    nonfinite_weights,
    pad_id_of,
    pretraining_loss,
    save_policy,
)
from train.optimizer import cosine_factor, update
from train.progress import Progress, silent
from train.sampling import Episodes, check_room, sample_episodes
from train.settings import PpoSettings

RESUME_FILE = "ppo.pt"
HISTORY_FILE = "ppo-history.jsonl"
MAX_SAMPLER_GAP = 1e-3
"""Nats by which a sampler's log-probability may differ from the trainer's before it is an alarm; fp32 keeps 1e-5."""

OnIteration = Callable[[int, Episodes], dict[str, float]]
"""Called after each iteration with its number and episodes; what it measures joins the iteration's numbers."""

_log = logging.getLogger(__name__)


def run(
    settings: PpoSettings,
    policy_dir: Path,
    reference_dir: Path,
    reward_model_dir: Path,
    prompts: Sequence[tuple[int, ...]],
    out: Path,
    *,
    pretraining: TokenStream | None,
    resume_dir: Path | None,
    seed: int,
    progress: Progress = silent,
    on_iteration: OnIteration | None = None,
) -> dict[str, float]:
    """Train the policy in ``policy_dir`` and write the result (the averaged policy, where ``ema`` is on) to ``out``.

    Args:
        settings: sizes, learning rates, coefficients.
        policy_dir: the policy to start from.
        reference_dir: the policy that the KL reward measures from: the SFT policy.
        reward_model_dir: scores the episodes; the value model starts as its copy.
        prompts: token ids; every pass over them is in a new order.
        out: directory to write; what it holds is overwritten.
        pretraining: text for the mix; may be None only where ``settings.ptx_coef`` is 0.
        resume_dir: where to keep the resume point and the history of all iterations as JSON lines; None keeps none.
        seed: of prompt order, sampling and minibatches.
        progress: called after each iteration with its numbers.
        on_iteration: called after each iteration with its episodes.

    Returns:
        The numbers of the last iteration (see ``_numbers`` and ``_summary``), ``score_sd``, ``missing_eos_score`` and
        ``nonfinite_weights``.

    Raises:
        DatasetUnusable: where prompts do not fit the policy, or pretraining text is missing.
        ModelUnusable: where a directory does not hold the model it should, or their vocabularies differ.
        ResumePointUnusable: where the resume point is damaged or another run's.
        TrainingDiverged: where a gradient is not finite; the last resume point stands.
    """
    _check(settings, prompts, pretraining)
    learner = Learner.load(settings, policy_dir, reference_dir, reward_model_dir)
    check_room(learner.policy, prompts, settings.max_completion_tokens)
    given = (settings, seed, tuple(map(tuple, prompts)), pretraining.digest() if pretraining else None)
    fingerprint = resume.fingerprint_of(repr(given), (policy_dir, reference_dir, reward_model_dir))
    saved = resume.load(resume_dir / RESUME_FILE, fingerprint) if resume_dir else None
    if saved is not None:
        learner.restore(saved, pretraining)
    else:
        # 0. See how the reference policy's completions score, and scale by it.
        _calibrate_scores(learner, _prompts_of(0, settings, prompts, seed), settings, _generator(seed, -1))

    for iteration in range(learner.iteration, settings.iterations):
        started, generator = time.monotonic(), _generator(seed, iteration)

        # 1. Sample one completion for each of the next prompts.
        episodes = _sample(
            learner, learner.policy, _prompts_of(iteration, settings, prompts, seed), settings, generator
        )
        batch, mask = episodes.batch, episodes.batch.completion_mask

        # 2. Score the completions; see what the reference policy and the value model say of every token.
        scores, reference_logprobs, values = _assess(learner, batch, settings)
        seen_scores = torch.where(episodes.finished, scores, learner.missing_eos_score)

        # 3. Reward every token with the KL penalty, the last also with the score.
        rewards = kl_rewards(seen_scores, episodes.logprobs, reference_logprobs, mask, settings.kl_coef)

        # 4. Advantages and returns.
        advantages, returns = advantages_and_returns(rewards, values, mask, settings.gamma, settings.gae_lambda)
        if settings.whiten_advantages:
            advantages = whiten(advantages, mask)
        experience = _Experience(batch, episodes.logprobs, values, advantages, returns)

        # 5. One pass in minibatches: policy and pretraining text together, then the value model.
        factor = cosine_factor(
            iteration,
            settings.iterations,
            warmup=settings.policy_lr_warmup_iterations,
            final_fraction=settings.policy_lr_final_fraction,
        )
        policy_steps: list[dict[str, float]] = []
        value_losses: list[float] = []
        learning = iteration >= settings.value_only_iterations
        for rows in torch.randperm(len(batch), generator=generator).chunk(settings.minibatches):
            minibatch = experience.select(rows)
            if learning:
                step = _update_policy(learner, minibatch, pretraining, settings, settings.policy_lr * factor)
                learning = step is not None
                policy_steps += [step] if step else []
            value_losses.append(_update_value_model(learner, minibatch, settings))

        # 6. Average the policy over iterations.
        learner.average(settings.ema)

        # 7. Log.
        learner.iteration = iteration + 1
        numbers = {"iteration": float(iteration), "seconds": time.monotonic() - started}
        numbers |= _numbers(experience, episodes, scores * learner.score_sd, rewards, reference_logprobs)
        numbers |= {"value_loss": fmean(value_losses), "policy_lr": settings.policy_lr * factor}
        numbers |= _summary(policy_steps)
        if on_iteration is not None:
            numbers |= on_iteration(iteration, episodes)
        _alarm(numbers)
        learner.history.append(numbers)
        progress("ppo", learner.iteration, settings.iterations, numbers)

        # 8. Save a resume point.
        if resume_dir and (learner.iteration % settings.save_every == 0 or learner.iteration == settings.iterations):
            resume.save(resume_dir / RESUME_FILE, fingerprint, learner.state(pretraining))
            _write_history(resume_dir / HISTORY_FILE, learner.history)

    result = learner.policy if learner.averaged is None else learner.averaged
    save_policy(result, learner.tokenizer, out)
    return {
        **learner.history[-1],
        "score_sd": learner.score_sd,
        "missing_eos_score": learner.missing_eos_score,
        "nonfinite_weights": nonfinite_weights(result),
    }


@dataclass(frozen=True)
class _Experience:
    """A batch of episodes with what was known of them before the updates; tensors [B, R]."""

    batch: Batch
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> "_Experience":
        """The episodes ``rows``, without columns that are padding in all of them."""
        batch = self.batch.select(rows)
        width = batch.completion_mask.shape[1]
        of_tokens = (self.logprobs, self.values, self.advantages, self.returns)
        return _Experience(batch, *(x[rows, :width] for x in of_tokens))


def _sample(
    learner: Learner,
    policy: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    settings: PpoSettings,
    generator: torch.Generator,
) -> Episodes:
    return sample_episodes(
        policy,
        prompts,
        eos_id=int(learner.tokenizer.eos_token_id),
        pad_id=pad_id_of(learner.tokenizer),
        max_completion_tokens=settings.max_completion_tokens,
        temperature=settings.temperature,
        generator=generator,
    )


@torch.no_grad()
def _assess(learner: Learner, batch: Batch, settings: PpoSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B], reference log-probabilities [B, R] and values [B, R], in groups of similar length."""
    scores = torch.zeros(len(batch))
    reference_logprobs, values = (torch.zeros(batch.completion_mask.shape) for _ in range(2))
    for rows, part in batch.buckets(settings.episodes_per_iteration // settings.minibatches):
        width = part.completion_mask.shape[1]
        logits = completion_logits(learner.reference, part, settings.temperature)
        scores[rows] = learner.reward_model.score(part)
        reference_logprobs[rows, :width] = token_logprobs(logits, part.completion_ids)
        values[rows, :width] = learner.value_model.values(part)
    return scores, reference_logprobs, values


def _calibrate_scores(
    learner: Learner, prompts: Sequence[tuple[int, ...]], settings: PpoSettings, generator: torch.Generator
) -> None:
    """Scale scores to SD 1, where asked, and fix what is unfinished's, by the reference policy's completions."""
    episodes = _sample(learner, learner.reference, prompts, settings, generator)
    scores, _, _ = _assess(learner, episodes.batch, settings)
    mean, deviation = float(scores.mean()), float(scores.std())
    if not deviation > 0:
        raise ModelUnusable(f"the reward model's scores of {len(prompts)} completions have SD {deviation}")
    scale = deviation if settings.normalize_score else 1.0
    learner.missing_eos_score = (mean - settings.missing_eos_penalty * deviation) / scale
    learner.scale_scores(scale)


def _update_policy(
    learner: Learner, minibatch: _Experience, pretraining: TokenStream | None, settings: PpoSettings, lr: float
) -> dict[str, float] | None:
    """One step of the policy; None, and no step, where it is already ``target_kl`` away from where it sampled."""
    batch, mask = minibatch.batch, minibatch.batch.completion_mask
    logits = completion_logits(learner.policy, batch, settings.temperature)
    logprobs = token_logprobs(logits, batch.completion_ids)
    loss, clipped = policy_loss(logprobs, minibatch.logprobs, minibatch.advantages, mask, settings.clip)
    with torch.no_grad():
        update_kl = float(masked_mean(k3(minibatch.logprobs, logprobs), mask))
        if settings.target_kl is not None and update_kl > settings.target_kl:
            return None
        numbers = {
            "policy_loss": float(loss.detach()),
            "clipped_share": float(clipped),
            "entropy": float(masked_mean(entropy(logits), mask)),
            "update_kl": update_kl,
            "sampler_gap": float(torch.where(mask, logprobs - minibatch.logprobs, 0.0).abs().max()),
        }
    torch.autograd.backward(loss)
    if settings.ptx_coef and pretraining is not None:
        # A backward of its own, so that both graphs are never in memory together; the gradients add up (§C.4).
        text_loss = pretraining_loss(learner.policy, pretraining.take(settings.ptx_batch))
        torch.autograd.backward(settings.ptx_coef * text_loss)
        numbers["ptx_loss"] = float(text_loss.detach())
    update(learner.policy_optimizer, learner.policy.parameters(), lr, settings.max_grad_norm)
    return numbers


def _update_value_model(learner: Learner, minibatch: _Experience, settings: PpoSettings) -> float:
    """One step of the value model; returns its loss."""
    values = learner.value_model.values(minibatch.batch)
    mask = minibatch.batch.completion_mask
    loss = value_loss(values, minibatch.values, minibatch.returns, mask, settings.value_clip)
    torch.autograd.backward(loss)
    update(learner.value_optimizer, learner.value_model.parameters(), settings.value_lr, settings.max_grad_norm)
    return float(loss.detach())


def _numbers(
    experience: _Experience, episodes: Episodes, scores: Tensor, rewards: Tensor, reference_logprobs: Tensor
) -> dict[str, float]:
    """What an iteration's episodes looked like.

    ``score`` (on the reward model's own scale), ``reward`` (per completion, as PPO saw it), ``kl_to_reference`` (nats
    per completion, k1) with its standard error ``kl_se``, ``kl_k3`` (the same by k3), ``eos_share``,
    ``completion_tokens`` (mean), and the value model's ``explained_variance``.
    """
    mask = experience.batch.completion_mask
    kl = torch.where(mask, experience.logprobs - reference_logprobs, 0.0).sum(1)
    return {
        "score": float(scores.mean()),
        "reward": float(rewards.sum(1).mean()),
        "kl_to_reference": float(kl.mean()),
        "kl_se": float(kl.std() / len(kl) ** 0.5),
        "kl_k3": float(torch.where(mask, k3(experience.logprobs, reference_logprobs), 0.0).sum(1).mean()),
        "eos_share": float(episodes.finished.float().mean()),
        "completion_tokens": float(experience.batch.completion_lengths.float().mean()),
        "explained_variance": float(explained_variance(experience.values, experience.returns, mask)),
    }


def _summary(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """How many policy updates an iteration made, and the mean of their numbers.

    Of ``sampler_gap`` the first is taken: there the policy is still the one that sampled, so what differs between
    its log-probabilities then and now is error of the sampler.
    """
    if not steps:
        return {"policy_updates": 0.0}
    means = {name: fmean(step[name] for step in steps) for name in steps[0]}
    return {"policy_updates": float(len(steps)), **means, "sampler_gap": steps[0]["sampler_gap"]}


def _alarm(numbers: dict[str, float]) -> None:
    """Warn of numbers that sound mathematics rules out: then sampler and trainer do not see the same policy."""
    if numbers["kl_to_reference"] < -3 * numbers["kl_se"] - 1e-3:
        _log.warning("iteration %(iteration).0f: KL to the reference is negative, %(kl_to_reference).4f nats", numbers)
    if numbers.get("sampler_gap", 0.0) > MAX_SAMPLER_GAP:
        _log.warning("iteration %(iteration).0f: sampler and trainer differ by %(sampler_gap).2g nats", numbers)


def _prompts_of(
    iteration: int, settings: PpoSettings, prompts: Sequence[tuple[int, ...]], seed: int
) -> list[tuple[int, ...]]:
    """The prompts of an iteration: the next stretch of an endless row of passes, each in an order of its own."""
    start = iteration * settings.episodes_per_iteration
    numbers = range(start, start + settings.episodes_per_iteration)
    orders = {number // len(prompts): list(range(len(prompts))) for number in numbers}
    for number, order in orders.items():
        random.Random(f"{seed}/{number}").shuffle(order)
    return [prompts[orders[number // len(prompts)][number % len(prompts)]] for number in numbers]


def _generator(seed: int, iteration: int) -> torch.Generator:
    """The source of all randomness of one iteration; −1 is the sampling before the first."""
    return torch.Generator().manual_seed(random.Random(f"{seed}/iteration/{iteration}").getrandbits(63))


def _check(settings: PpoSettings, prompts: Sequence[tuple[int, ...]], pretraining: TokenStream | None) -> None:
    if not prompts:
        raise DatasetUnusable("there are no prompts to sample completions for")
    if settings.ptx_coef and pretraining is None:
        raise DatasetUnusable(
            f"ppo.ptx_coef is {settings.ptx_coef}, but no pretraining text was given: give some, or set it to 0"
        )


def _write_history(path: Path, history: Sequence[dict[str, float]]) -> None:
    replace_atomically(path, "".join(json.dumps(numbers) + "\n" for numbers in history).encode())
