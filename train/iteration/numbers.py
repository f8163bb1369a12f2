"""What is reported of the episodes of a PPO iteration: of all, and of each task among them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.iteration.experience import Assessment, Experience, largest_gap
from train.losses import explained_variance, k3
from train.sampling import Episodes


def of_episodes(
    experience: Experience,
    episodes: Episodes,
    assessment: Assessment,
    rewards: Tensor,
    score_sd: float,
    tasks: Sequence[str] | None,
) -> dict[str, float]:
    """What an iteration's episodes looked like.

    Args:
        experience: what was learnt from the episodes.
        episodes: as sampled.
        assessment: what the models said of them.
        rewards: [B, R] of every token.
        score_sd: what scores were divided by.
        tasks: of each episode; None reports no tasks.

    Returns:
        ``score`` (mean over heads, on the reward model's own scale), ``score_disagreement`` (SD over heads, where there
        are several), ``reward`` (per completion, as PPO saw it), ``kl_to_reference`` (nats per completion, k1) with its
        standard error ``kl_se``, ``kl_k3`` (the same by k3), ``eos_share``, ``completion_tokens`` (mean), the value
        model's ``explained_variance``; and for each task ``score[task]``, ``kl[task]`` and ``completion_tokens[task]``.
    """
    mask = experience.batch.completion_mask
    kl = torch.where(mask, assessment.logprobs - assessment.reference_logprobs, 0.0).sum(1)
    scores = assessment.scores * score_sd
    lengths = experience.batch.completion_lengths.float()
    numbers = {
        "score": float(scores.mean()),
        "reward": float(rewards.sum(1).mean()),
        "kl_to_reference": float(kl.mean()),
        "kl_se": float(kl.std() / len(kl) ** 0.5),
        "kl_k3": float(torch.where(mask, k3(assessment.logprobs, assessment.reference_logprobs), 0.0).sum(1).mean()),
        "eos_share": float(episodes.finished.float().mean()),
        "completion_tokens": float(lengths.mean()),
        "explained_variance": float(explained_variance(experience.values, experience.returns, mask)),
    }
    if scores.shape[1] > 1:
        numbers["score_disagreement"] = float(scores.std(1, correction=0).mean())
    if not torch.equal(assessment.logprobs, episodes.logprobs):
        numbers["sampler_gap"] = largest_gap(assessment.logprobs, episodes)
    for task in sorted(set(tasks or ())):
        rows = torch.tensor([task == other for other in tasks or ()])
        for name, of_episode in (("score", scores.mean(1)), ("kl", kl), ("completion_tokens", lengths)):
            numbers[f"{name}[{task}]"] = float(of_episode[rows].mean())
    return numbers
