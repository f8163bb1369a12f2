"""Episodes with all that is known of them before the updates: what PPO learns from.

Letters in shapes: B episodes, R completion tokens (right-padded), n heads of the reward model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from train.batches import Batch, passes
from train.errors import ModelUnusable
from train.iteration.learner import Learner
from train.losses import advantages_and_returns, kl_rewards, token_logprobs
from train.masked import whiten
from train.models import token_logits
from train.sampling import Episodes, Sampler
from train.settings import PpoSettings

EXACT_GAP = 1e-4
"""Nats up to which a sampler's log-probabilities are taken for the trainer's own: the rounding of fp32."""


@dataclass(frozen=True)
class Assessment:
    """What the models say of sampled episodes.

    Attributes:
        scores: [B, n] of the whole completion, by each head of the reward model.
        logprobs: [B, R] of each token under the policy that sampled, by the trainer's reckoning.
        reference_logprobs: [B, R] of each token under the reference policy.
        values: [B, R] what the value model expects before each token.
        importance: [B, R] the trainer's probability of each token over the sampler's.
    """

    scores: Tensor
    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    importance: Tensor


@dataclass(frozen=True)
class Experience:
    """Episodes to learn from; tensors [B, R], padding where the batch's ``completion_mask`` is False.

    Attributes:
        batch: the episodes.
        logprobs: under the policy that sampled them.
        values: what the value model expected.
        advantages: how much better a token was than expected, times its importance.
        returns: what the value model learns.
    """

    batch: Batch
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.batch)

    def select(self, rows: Tensor) -> "Experience":
        """The episodes ``rows`` [b], without columns that are padding in all of them."""
        batch = self.batch.select(rows)
        width = batch.completion_mask.shape[1]
        of_tokens = (self.logprobs, self.values, self.advantages, self.returns)
        return Experience(batch, *(x[rows, :width] for x in of_tokens))


def parts(learner: Learner, experience: Experience, settings: PpoSettings) -> Iterator[tuple[Experience, float]]:
    """This process's share of all episodes in groups of similar length, on its device, and what each one's mean weighs.

    The mean over all tokens is the mean over processes of the sum of weight times the group's mean over tokens.
    """
    batch, ranks, where = experience.batch, learner.ranks, learner.device.where
    tokens = int(batch.completion_mask.sum())
    for group in _passes(learner, batch, settings):
        own = experience.select(torch.tensor(ranks.share(group)[0]))
        weight = ranks.count * int(own.batch.completion_mask.sum()) / tokens
        of_tokens = (own.logprobs, own.values, own.advantages, own.returns)
        yield Experience(learner.device.place(own.batch), *(x.to(where) for x in of_tokens)), weight


@torch.no_grad()
def assess(learner: Learner, episodes: Episodes, settings: PpoSettings) -> Assessment:
    """Run reward model, reference and value model over the episodes, in groups of similar length.

    Where the sampler is not exact (``learner.sampler_gap``), the policy too, for log-probabilities of its own.
    """
    batch, exact, ranks = episodes.batch, learner.sampler_gap <= EXACT_GAP, learner.ranks
    groups, longest = _passes(learner, batch, settings), batch.completion_mask.shape[1]
    found: list[list[Tensor]] = []
    for group in groups:
        part = learner.device.place(batch.select(torch.tensor(ranks.share(group)[0])))
        of_tokens = [learner.value_model.values(part), _logprobs(learner.reference, part, settings.temperature)]
        if not exact:
            of_tokens.append(_logprobs(learner.policy, part, settings.temperature))
        scores = learner.reward_model.scores(part)
        found.append([x.cpu() for x in (scores, *(pad(x, (0, longest - x.shape[1])) for x in of_tokens))])
    places = torch.tensor([row for group in groups for row in group]).argsort()
    scores, old_values, reference_logprobs, *own = (
        ranks.gather_rows(torch.cat(rows))[places] for rows in zip(*found, strict=True)
    )
    logprobs = episodes.logprobs if exact else own[0]
    importance = torch.where(batch.completion_mask, logprobs - episodes.logprobs, 0.0).exp()
    return Assessment(scores, logprobs, reference_logprobs, old_values, importance)


@torch.no_grad()
def calibrate(
    learner: Learner,
    sampler: Sampler,
    prompts: Sequence[tuple[int, ...]],
    settings: PpoSettings,
    generator: torch.Generator,
) -> None:
    """Learn from the reference policy's completions what scores are like, and how well sampler and trainer agree.

    Scales scores to SD 1, where asked; fixes the score of what is unfinished; measures ``learner.sampler_gap``.

    Raises ModelUnusable where the reward model says the same of every completion.
    """
    episodes = sampler.sample(learner.reference, prompts, generator)
    found = assess(learner, episodes, settings)
    learner.sampler_gap = largest_gap(found.reference_logprobs, episodes)
    scores = pessimistic(found.scores, settings.score_pessimism)
    mean, deviation = float(scores.mean()), float(scores.std())
    if not deviation > 0:
        raise ModelUnusable(f"the reward model's scores of {len(prompts)} completions have SD {deviation}")
    scale = deviation if settings.normalize_score else 1.0
    learner.missing_eos_score = (mean - settings.missing_eos_penalty * deviation) / scale
    learner.scale_scores(scale)


def reward(assessment: Assessment, episodes: Episodes, learner: Learner, settings: PpoSettings) -> Tensor:
    """The reward of every token, [B, R]: the KL penalty, and on the last one the score.

    What did not finish scores the same low number, whatever the reward model says of it.
    """
    scores = pessimistic(assessment.scores, settings.score_pessimism)
    seen = torch.where(episodes.finished, scores, learner.missing_eos_score)
    mask = episodes.batch.completion_mask
    return kl_rewards(seen, assessment.logprobs, assessment.reference_logprobs, mask, learner.kl_coef)


def experience_of(episodes: Episodes, assessment: Assessment, rewards: Tensor, settings: PpoSettings) -> Experience:
    """Advantages and returns of rewarded episodes (GAE), whitened where asked.

    An advantage is multiplied by the token's truncated importance, min(π/π_sampler, limit): that weighs the token's
    clipped loss, which is linear in the advantage (Yao et al. 2025, truncated importance sampling).
    """
    batch, mask = episodes.batch, episodes.batch.completion_mask
    advantages, returns = advantages_and_returns(rewards, assessment.values, mask, settings.gamma, settings.gae_lambda)
    if settings.whiten_advantages:
        advantages = whiten(advantages, mask)
    advantages = advantages * assessment.importance.clamp(max=settings.importance_limit)
    return Experience(batch, assessment.logprobs, assessment.values, advantages, returns)


def pessimistic(scores: Tensor, deviations: float) -> Tensor:
    """Mean over heads less ``deviations`` times their SD (divisor n): [B, n] to [B].

    Uncertainty-weighted optimisation (Coste et al. 2023, arXiv 2310.02743, §3), with the SD for the variance, so that
    the penalty is in units of the score.
    """
    return scores.mean(1) - deviations * scores.std(1, correction=0)


def largest_gap(logprobs: Tensor, episodes: Episodes) -> float:
    """The most by which log-probabilities [B, R] differ from those the sampler gave a completion's tokens, nats."""
    gap = torch.where(episodes.batch.completion_mask, logprobs - episodes.logprobs, 0.0)
    return float(gap.abs().max())


def _logprobs(policy: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
    ids = batch.completion_ids[batch.completion_mask]
    return batch.of_tokens(token_logprobs(token_logits(policy, batch, temperature), ids))


def _passes(learner: Learner, batch: Batch, settings: PpoSettings) -> list[list[int]]:
    lengths, device = batch.attention_mask.sum(1).tolist(), learner.device.where.type
    return passes(lengths, settings.episodes_per_forward, device=device, processes=learner.ranks.count)
