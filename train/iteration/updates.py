"""The updates of an iteration: steps of the policy and of the value model in turn (InstructGPT §3.5, §C.4).

A minibatch passes through a model in parts, whose gradients add up to those of its mean over tokens.
"""

from statistics import fmean

import torch

from train.batches import TokenStream, passes
from train.iteration.experience import Experience, parts
from train.iteration.learner import Learner
from train.losses import entropy, k3, policy_loss, value_loss
from train.masked import masked_mean
from train.models import pretraining_loss, token_logits
from train.running.optimizer import cosine_factor, update
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
        ``policy_lr``, ``value_loss`` (mean over minibatches) and ``policy_updates``. Where it was to learn, also
        ``stopped_early``, the share of minibatches it did not learn from any more; the means over its updates of what
        ``_update_policy`` returns; and, as ``sampler_gap``, the first ``drift``, even of a minibatch it did not learn
        from: there the policy is still the one that sampled, so what differs between its log-probabilities then and now
        is error of the sampler.
    """
    policy_lr = settings.policy_lr * cosine_factor(
        learner.iteration,
        settings.iterations,
        warmup=settings.policy_lr_warmup_iterations,
        final_fraction=settings.policy_lr_final_fraction,
    )
    steps: list[dict[str, float]] = []
    drifts: list[float] = []
    value_losses: list[float] = []
    learning = learner.iteration >= settings.value_only_iterations
    for rows in torch.randperm(len(experience), generator=generator).chunk(settings.minibatches):
        minibatch = experience.select(rows)
        if learning:
            step, learning = _update_policy(learner, minibatch, pretraining, settings, policy_lr)
            drifts.append(step.pop("drift"))
            steps += [step] if learning else []
        value_losses.append(_update_value_model(learner, minibatch, settings))
    numbers = {"policy_lr": policy_lr, "value_loss": fmean(value_losses), "policy_updates": float(len(steps))}
    if drifts:
        numbers |= {"stopped_early": 1 - len(steps) / settings.minibatches, "sampler_gap": drifts[0]}
    if steps:
        numbers |= {name: fmean(step[name] for step in steps) for name in steps[0]}
    return numbers


def _update_policy(
    learner: Learner,
    minibatch: Experience,
    pretraining: TokenStream | None,
    settings: PpoSettings,
    lr: float,
) -> tuple[dict[str, float], bool]:
    """One step of the policy, or none where it is already ``target_kl`` away from where it sampled.

    Returns means over the minibatch's tokens of ``policy_loss``, ``clipped_share``, ``entropy`` (nats) and
    ``update_kl`` (nats from the policy that sampled, k3), of the text's ``ptx_loss`` where it is mixed in, and
    ``drift``: the most by which the log-probability of a token has changed since it was sampled; and whether it
    stepped.

    Raises TrainingDiverged where the gradient is not finite.
    """
    numbers = dict.fromkeys(("policy_loss", "clipped_share", "entropy", "update_kl", "drift"), 0.0)
    for part, share in parts(learner, minibatch, settings):
        batch, mask = part.batch, part.batch.completion_mask
        of_all = token_logits(learner.policy, batch, settings.temperature).log_softmax(1)
        logprobs = batch.of_tokens(of_all.gather(1, batch.completion_ids[mask].unsqueeze(1)).squeeze(1))
        loss, clipped = policy_loss(logprobs, part.logprobs, part.advantages, mask, settings.clip)
        torch.autograd.backward(share * loss)
        with torch.no_grad():
            numbers["policy_loss"] += share * float(loss.detach())
            numbers["clipped_share"] += share * float(clipped)
            numbers["entropy"] += share * float(entropy(of_all).mean())
            numbers["update_kl"] += share * float(masked_mean(k3(part.logprobs, logprobs), mask))
            drift = float(torch.where(mask, logprobs - part.logprobs, 0.0).abs().max())
            numbers["drift"] = max(numbers["drift"], drift)
    drift = learner.ranks.greatest(numbers.pop("drift"))
    numbers = {name: learner.ranks.mean(number) for name, number in numbers.items()} | {"drift": drift}
    if settings.target_kl is not None and numbers["update_kl"] > settings.target_kl:
        learner.policy_optimizer.zero_grad(set_to_none=True)
        return numbers, False
    if settings.ptx_coef and pretraining is not None:
        numbers["ptx_loss"] = _add_text_gradient(learner, pretraining, settings)
    update(learner.policy_optimizer, learner.policy.parameters(), lr, settings.max_grad_norm)
    return numbers, True


def _add_text_gradient(learner: Learner, pretraining: TokenStream, settings: PpoSettings) -> float:
    """Add γ_ptx times the gradient of the next-token loss on pretraining text; returns that loss, nats per token.

    A backward of its own, so that both graphs are never in memory together; the gradients add up (§C.4).
    """
    text, mean = pretraining.take(settings.ptx_batch), 0.0
    own, weight = learner.ranks.share(range(len(text)))
    lengths = [text.shape[1]] * len(own)
    for group in passes(lengths, settings.episodes_per_forward, device=learner.device.where.type):
        share = weight * len(group) / len(own)
        loss = pretraining_loss(learner.policy, text[[own[i] for i in group]])
        torch.autograd.backward(settings.ptx_coef * share * loss)
        mean += share * float(loss.detach())
    return learner.ranks.mean(mean)


def _update_value_model(learner: Learner, minibatch: Experience, settings: PpoSettings) -> float:
    """One step of the value model; returns its loss. Raises TrainingDiverged where the gradient is not finite."""
    mean = 0.0
    for part, share in parts(learner, minibatch, settings):
        expected, mask = learner.value_model.values(part.batch), part.batch.completion_mask
        loss = value_loss(expected, part.values, part.returns, mask, settings.value_clip)
        torch.autograd.backward(share * loss)
        mean += share * float(loss.detach())
    update(learner.value_optimizer, learner.value_model.parameters(), settings.value_lr, settings.max_grad_norm)
    return learner.ranks.mean(mean)
