"""The equations of InstructGPT (Ouyang et al. 2022, §3.5) and PPO (Schulman et al. 2017), as pure functions.

Letters in shapes: B completions (episodes), R completion tokens (right-padded), V vocabulary, N scored
completions, n heads of a reward model, M pairs, G prompts. ``mask`` is a [B, R] boolean that is True on real
completion tokens, EOS included. Log-probabilities are natural; those of one call were all divided by the same
temperature.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from train.masked import masked_mean, masked_variance


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probability of each token: [B, R, V] logits and [B, R] ids to [B, R]."""
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each next-token distribution: [B, R, V] to [B, R]."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def ranking_loss(
    scores: Tensor, chosen: Tensor, rejected: Tensor, prompt: Tensor, weight: Tensor, margin: Tensor | None = None
) -> Tensor:
    """Pairwise ranking loss: −log σ(r_chosen − r_rejected − m), averaged over each prompt's pairs, then over prompts.

    InstructGPT §3.5, eq. 1, whose 1/C(K,2) is here one over the number of pairs left after ties. The margin m is that
    of Touvron et al. 2023 (Llama 2), §3.2.2, eq. 2. An ensemble's loss is the mean over its heads.

    Args:
        scores: [N, n] of every completion in the batch by every head.
        chosen: [M] positions in ``scores`` of each pair's better completion.
        rejected: [M] of the worse.
        prompt: [M] which prompt, 0 … G−1, a pair belongs to; every prompt has a pair.
        weight: [G, n] what each prompt counts for each head: 1 for all is the paper's loss, and where the weights of
            the whole training set average 1, so are small batches' losses on average.
        margin: [M] by how much the better completion should score higher, in nats; None: 0, the paper's loss.

    Returns:
        A scalar.
    """
    lead = scores[chosen] - scores[rejected]
    losses = -logsigmoid(lead if margin is None else lead - margin.unsqueeze(1))
    pairs = torch.zeros(len(weight)).index_add(0, prompt, torch.ones(len(prompt)))
    of_prompt = torch.zeros_like(weight).index_add(0, prompt, losses) / pairs.unsqueeze(1)
    return (weight * of_prompt).mean()


def expected_calibration_error(lead: Tensor, bins: int = 10) -> Tensor:
    """How far confidence is from accuracy, a scalar in [0, 1]: Σ_b n_b/M |accuracy_b − mean confidence_b|.

    Guo et al. 2017, arXiv 1706.04599, eq. 3. That the higher-scored of two completions is preferred is predicted with
    the confidence σ(|lead|), at least 1/2; ``bins`` of equal width divide what is above. An even score is half right.

    Args:
        lead: [M] r_chosen − r_rejected of each pair, M ≥ 1.
        bins: how many.
    """
    lead = lead.double()
    confidence, right = lead.abs().sigmoid(), (lead.sign() + 1) / 2
    number = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, number, right - confidence)
    return gap.abs().sum() / len(lead)


def preference_entropy(scores: Tensor, differs: Tensor) -> Tensor:
    """How open it is which of two completions is preferred, in nats: mean over pairs of H(σ(r_i − r_j)), [G].

    H is the entropy of a Bernoulli variable, at most ln 2. A pair of equal completions counts 0, because nobody can
    prefer one of them.

    Args:
        scores: [G, K] of K completions of each prompt.
        differs: [G, K, K] True where two of them are not the same.
    """
    gap = scores.unsqueeze(2) - scores.unsqueeze(1)
    each = -(gap.sigmoid() * logsigmoid(gap) + (-gap).sigmoid() * logsigmoid(-gap))
    return _mean_over_pairs(each, differs)


def disagreement(scores: Tensor, differs: Tensor) -> Tensor:
    """How far an ensemble's heads disagree on two completions, in nats: mean over pairs of SD_heads(r_i − r_j), [G].

    The SD is the sample's (divisor n − 1). What all heads add to a whole prompt is no disagreement: it prefers nothing.

    Args:
        scores: [G, K, n] of K completions of each prompt by n ≥ 2 heads.
        differs: [G, K, K] True where two completions are not the same; a pair of equal ones counts 0.
    """
    gap = scores.unsqueeze(2) - scores.unsqueeze(1)
    return _mean_over_pairs(gap.std(3), differs)


def _mean_over_pairs(each: Tensor, differs: Tensor) -> Tensor:
    """[G, K, K] of ordered pairs to [G]: the mean over pairs of two places, 0 for those that do not differ."""
    pairs = each.shape[1] * (each.shape[1] - 1)
    return (each * differs).sum((1, 2)) / pairs


def kl_rewards(score: Tensor, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward per token, [B, R]: −β (log π − log π_ref) on every token, plus the score on the last real one.

    InstructGPT §3.5, eq. 2; the KL is estimated by k1 = log π − log π_ref on the sampled token (unbiased).

    Args:
        score: [B] what the reward model says of the whole completion.
        logprobs: [B, R] under the policy that sampled.
        reference_logprobs: [B, R] under the reference policy.
        mask: [B, R].
        kl_coef: β per nat.
    """
    rewards = torch.where(mask, -kl_coef * (logprobs - reference_logprobs), torch.zeros_like(logprobs))
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, score.unsqueeze(1))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation: A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t; V is 0 after the end.

    Schulman et al. 2016, arXiv 1506.02438, eq. 16. All of [B, R]; 0 on the padding.

    Returns:
        Advantages, and the returns A + V that the value model learns.
    """
    values = torch.where(mask, values, torch.zeros_like(values))
    advantages = torch.zeros_like(rewards)
    following_value = following_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        error = rewards[:, t] + gamma * following_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], error + gamma * gae_lambda * following_advantage, 0.0)
        following_value, following_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss: mean over tokens of max(−A ρ, −A clamp(ρ, 1−ε, 1+ε)), ρ = π/π_old.

    Schulman et al. 2017, arXiv 1707.06347, eq. 7. Inputs are [B, R].

    Returns:
        The loss, and the share of tokens whose clipped term is the larger, which therefore teach nothing.
    """
    ratio = (logprobs - old_logprobs).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(free, clipped), mask), masked_mean((clipped > free).float(), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Clipped value loss: ½ mean max((V − G)², (V_old + clamp(V − V_old, ±ε) − G)²). Inputs are [B, R].

    As in OpenAI's baselines and Ziegler et al. 2019: a value may move by ε from its old one per iteration.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns).square(), (near - returns).square()), mask)


def k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(p ‖ q) from tokens sampled from p: e^(−d) − 1 + d, d = log p − log q. Never negative.

    Schulman 2020, "Approximating KL divergence"; lower variance than k1 = d, for reports and the early stop.
    """
    difference = logprobs - other_logprobs
    return torch.expm1(-difference) + difference


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(G − V)/Var(G), a scalar: 1 is perfect, 0 no better than a constant, below 0 worse than one."""
    return 1 - masked_variance(returns - values, mask) / masked_variance(returns, mask).clamp(min=1e-8)
