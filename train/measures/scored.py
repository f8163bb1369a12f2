"""Held-out comparisons with a reward model's scores, and what they say of it besides accuracy."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from scipy.special import expit

from train.batches import RankedPrompt
from train.intervals import figures, mean_over_clusters
from train.reward_model import informative_pairs, score_completions
from train.scalar_model import ScalarModel

BINS = 5
"""Of confidence, from 0.5 to 1."""


@dataclass(frozen=True)
class Scored:
    """One comparison and the score of each of its K completions."""

    ranked: RankedPrompt
    scores: tuple[float, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(chosen, rejected), of different completions."""
        return informative_pairs(self.ranked)


@torch.no_grad()
def score(model: ScalarModel, comparisons: Sequence[RankedPrompt], pad_id: int) -> list[Scored]:
    """``comparisons`` that prefer anything, scored."""
    usable = [one for one in comparisons if informative_pairs(one)]
    if not usable:
        return []
    answered = [(one.prompt_ids, completion) for one in usable for completion in one.completions]
    scores = iter(score_completions(model, answered, pad_id).tolist())
    return [Scored(one, tuple(next(scores) for _ in one.completions)) for one in usable]


def best_of_win_rate(scored: Sequence[Scored]) -> dict[str, float]:
    """How the labeler ranks the completion that the reward model scores highest among the K of a comparison.

    PPO will do more of what scores highest, so that is where the reward model must be right (best-of-n: Stiennon et
    al. 2020, arXiv 2009.01325, §4.3).

    Returns:
        ``best_of_win_rate``: the share of the other completions that it was preferred to, ties half, mean over the
        comparisons with ``_low`` and ``_high`` over prompts; 0.5 is what choosing at random gives. Nothing where there
        are no comparisons.
    """
    if not scored:
        return {}
    won = []
    for one in scored:
        best = one.scores.index(max(one.scores))
        balance = sum((i == best) - (j == best) for i, j in one.ranked.pairs)
        won.append(0.5 + 0.5 * balance / (len(one.scores) - 1))
    return figures("best_of_win_rate", mean_over_clusters(won, [one.ranked.prompt_ids for one in scored]))


def calibration(scored: Sequence[Scored]) -> dict[str, float]:
    """How often the reward model is right where it is so sure: a reliability diagram (Guo et al. 2017, §2).

    It prefers one completion of a pair with the probability σ(difference of scores), its confidence, at least 0.5.

    Returns:
        For each bin b of ``BINS`` that holds a pair: ``calibration_<b>_predicted``, the mean confidence, and
        ``calibration_<b>_observed``, the share of its pairs that labelers order the same way.
    """
    bins: defaultdict[int, list[tuple[float, bool]]] = defaultdict(list)
    for one in scored:
        for chosen, rejected in one.pairs:
            lead = one.scores[chosen] - one.scores[rejected]
            confidence = float(expit(abs(lead)))
            bins[min(BINS - 1, int((confidence - 0.5) * 2 * BINS))].append((confidence, lead > 0))
    found: dict[str, float] = {}
    for number, pairs in sorted(bins.items()):
        found[f"calibration_{number}_predicted"] = fmean(confidence for confidence, _ in pairs)
        found[f"calibration_{number}_observed"] = fmean(right for _, right in pairs)
    return found
