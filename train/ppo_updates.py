"""The updates of an iteration: steps of the policy and of the value model in turn (InstructGPT §3.5, §C.4).

A minibatch passes through a model in parts, whose gradients add up to those of its mean over tokens.
"""

from statistics import fmean

import torch

from train.batches import TokenStream
from train.experience import Experience
from train.learner import Learner
from train.losses import entropy, k3, policy_loss, token_logprobs, value_loss
from train.masked import masked_mean
from train.models import completion_logits, pretraining_loss
from train.optimizer import cosine_factor, update
from train.settings import PpoSettings


def learn(
    learner: Learner,
    experience: Experience,
    pretraining: TokenStream | None,
    settings: PpoSettings,
    generator: torch.Generator,
) -> dict[str, float]:
    """One pass over the episodes in random minibatches: each for the policy, with text, and for the value model.

    The policy learns from ``value_only_iterations`` on, and in an iteration until it is ``target_kl`` away.

    Returns:
        ``policy_lr``, ``value_loss`` (mean over minibatches) and ``policy_updates``. Where the policy learnt, also
        ``stopped_early``, the share of minibatches it did not learn from any more; the means over its updates of what
        ``_update_policy`` returns; and, as ``sampler_gap``, the first ``drift``: there the policy is still the one that
        sampled, so what differs between its log-probabilities then and now is error of the sampler.
    """
    policy_lr = settings.policy_lr * cosine_factor(
        learner.iteration,
        settings.iterations,
        warmup=settings.policy_lr_warmup_iterations,
        final_fraction=settings.policy_lr_final_fraction,
    )
    steps: list[dict[str, float]] = []
    value_losses: list[float] = []
    learning = learner.iteration >= settings.value_only_iterations
    lengths = experience.batch.completion_lengths
    for rows in torch.randperm(len(experience), generator=generator).chunk(settings.minibatches):
        own, weight = learner.ranks.share(rows.tolist(), lengths[rows].tolist())
        minibatch = experience.select(torch.tensor(own))
        if learning:
            step = _update_policy(learner, minibatch, weight, pretraining, settings, policy_lr)
            learning = step is not None
            steps += [step] if step else []
        value_losses.append(_update_value_model(learner, minibatch, weight, settings))
    numbers = {"policy_lr": policy_lr, "value_loss": fmean(value_losses), "policy_updates": float(len(steps))}
    if steps:
        numbers |= {"stopped_early": 1 - len(steps) / settings.minibatches, "sampler_gap": steps[0]["drift"]}
        numbers |= {name: fmean(step[name] for step in steps) for name in steps[0] if name != "drift"}
    return numbers


def _update_policy(
    learner: Learner,
    minibatch: Experience,
    weight: float,
    pretraining: TokenStream | None,
    settings: PpoSettings,
    lr: float,
) -> dict[str, float] | None:
    """One step of the policy; None, and no step, where it is already ``target_kl`` away from where it sampled.

    ``minibatch`` is this process's share of it, and ``weight`` that of a mean over the share.

    Returns means over the minibatch's tokens of ``policy_loss``, ``clipped_share``, ``entropy`` (nats) and
    ``update_kl`` (nats from the policy that sampled, k3), of the text's ``ptx_loss`` where it is mixed in, and
    ``drift``: the most by which the log-probability of a token has changed since it was sampled.

    Raises TrainingDiverged where the gradient is not finite.
    """
    numbers = dict.fromkeys(("policy_loss", "clipped_share", "entropy", "update_kl", "drift"), 0.0)
    for own_part, of_own in minibatch.parts(settings.episodes_per_forward):
        part, share = own_part.placed(learner.device), weight * of_own
        batch, mask = part.batch, part.batch.completion_mask
        logits = completion_logits(learner.policy, batch, settings.temperature)
        logprobs = token_logprobs(logits, batch.completion_ids)
        loss, clipped = policy_loss(logprobs, part.logprobs, part.advantages, mask, settings.clip)
        torch.autograd.backward(share * loss)
        with torch.no_grad():
            numbers["policy_loss"] += share * float(loss.detach())
            numbers["clipped_share"] += share * float(clipped)
            numbers["entropy"] += share * float(masked_mean(entropy(logits), mask))
            numbers["update_kl"] += share * float(masked_mean(k3(part.logprobs, logprobs), mask))
            drift = float(torch.where(mask, logprobs - part.logprobs, 0.0).abs().max())
            numbers["drift"] = max(numbers["drift"], drift)
    drift = learner.ranks.greatest(numbers.pop("drift"))
    numbers = {name: learner.ranks.mean(number) for name, number in numbers.items()} | {"drift": drift}
    if settings.target_kl is not None and numbers["update_kl"] > settings.target_kl:
        learner.policy_optimizer.zero_grad(set_to_none=True)
        return None
    if settings.ptx_coef and pretraining is not None:
        numbers["ptx_loss"] = _add_text_gradient(learner, pretraining, settings)
    update(learner.policy_optimizer, learner.policy.parameters(), lr, settings.max_grad_norm)
    return numbers


def _add_text_gradient(learner: Learner, pretraining: TokenStream, settings: PpoSettings) -> float:
    """Add γ_ptx times the gradient of the next-token loss on pretraining text; returns that loss, nats per token.

    A backward of its own, so that both graphs are never in memory together; the gradients add up (§C.4).
    """
    text, mean = pretraining.take(settings.ptx_batch), 0.0
    own, weight = learner.ranks.share(range(len(text)))
    for rows in torch.split(text[own], settings.episodes_per_forward):
        share = weight * len(rows) / len(own)
        loss = pretraining_loss(learner.policy, rows)
        torch.autograd.backward(settings.ptx_coef * share * loss)
        mean += share * float(loss.detach())
    return learner.ranks.mean(mean)


def _update_value_model(learner: Learner, minibatch: Experience, weight: float, settings: PpoSettings) -> float:
    """One step of the value model; returns its loss. Raises TrainingDiverged where the gradient is not finite."""
    mean = 0.0
    for own_part, of_own in minibatch.parts(settings.episodes_per_forward):
        part, share = own_part.placed(learner.device), weight * of_own
        values = learner.value_model.values(part.batch)
        mask = part.batch.completion_mask
        loss = value_loss(values, part.values, part.returns, mask, settings.value_clip)
        torch.autograd.backward(share * loss)
        mean += share * float(loss.detach())
    update(learner.value_optimizer, learner.value_model.parameters(), settings.value_lr, settings.max_grad_norm)
    return learner.ranks.mean(mean)
