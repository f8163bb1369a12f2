"""How often one version's completions are better than another's: by labelers, by the reward model, by gold.

Only what people say decides. The reward model's opinion is reported because the two drift apart as a policy learns to
please it (Gao et al. 2022, arXiv 2210.10760); gold is known in the tiny world alone. A tie is half a win. The 95 %
intervals are over prompts, whose completions are resampled together, and over seeds where several runs are given.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from feedback.preference import compare
from feedback.records import Comparison
from train.errors import DatasetUnusable
from train.intervals import figures, mean_over_clusters, mean_over_seeds
from train.measures.completed import Completed

LABELERS, REWARD_MODEL, GOLD = "win_rate_labelers", "win_rate_reward_model", "win_rate_gold"

_JUDGES: dict[str, Callable[[Completed], float | None]] = {
    REWARD_MODEL: lambda one: one.score,
    GOLD: lambda one: one.gold,
}


def by_labelers(comparisons: Iterable[Comparison], version: int, other: int) -> dict[str, float]:
    """From blind comparisons of two policy versions, those in force (``feedback.controls.in_force(...).ordinary``).

    Returns:
        ``win_rate_labelers`` of ``version`` over ``other`` with ``_low`` and ``_high`` over prompts, and
        ``_comparisons``, ``_ties`` (share) and ``_prompts``; nothing where nobody compared the two.
    """
    found = compare(comparisons, version, other)
    if found.win_rate_by_prompt is None:
        return {}
    judged = found.wins + found.losses + found.ties
    counts = {"comparisons": float(judged), "ties": found.ties / judged, "prompts": found.win_rate_by_prompt.n}
    return figures(LABELERS, found.win_rate_by_prompt) | {f"{LABELERS}_{name}": n for name, n in counts.items()}


def by_completions(ours: Sequence[Sequence[Completed]], theirs: Sequence[Sequence[Completed]]) -> dict[str, float]:
    """From completions of the same prompts that two versions were measured by (``train.measures.completed``).

    Args:
        ours: one list per run (a training or sampling seed); of one prompt, all pairs across the versions count.
        theirs: the other version's, run by run.

    Returns:
        ``win_rate_reward_model`` and ``win_rate_gold``, each where the completions have one, with ``_low`` and
        ``_high`` over prompts; and with more than one run ``_seeds_low`` and ``_seeds_high``.

    Raises:
        DatasetUnusable: where there is no run, or two runs to be compared share no prompt.
    """
    if not ours or len(ours) != len(theirs):
        raise DatasetUnusable(f"{len(ours)} runs of one version cannot be compared with {len(theirs)} of another")
    found: dict[str, float] = {}
    for name, judge in _JUDGES.items():
        runs = [_wins(mine, other, judge) for mine, other in zip(ours, theirs, strict=True)]
        if not all(runs):
            continue
        wins = [(win, prompt) for run in runs for prompt, win in run.items()]
        found |= figures(name, mean_over_clusters([win for win, _ in wins], [prompt for _, prompt in wins]))
        if seeds := mean_over_seeds([fmean(run.values()) for run in runs]):
            found |= {f"{name}_seeds_low": seeds.low, f"{name}_seeds_high": seeds.high}
    return found


def _wins(
    ours: Sequence[Completed], theirs: Sequence[Completed], judge: Callable[[Completed], float | None]
) -> dict[tuple[int, ...], float]:
    """For each prompt both completed: the share of all pairs that ours wins."""
    mine, other = _worth(ours, judge), _worth(theirs, judge)
    shared = [prompt for prompt in mine if prompt in other]
    if ours and theirs and not {one.prompt_ids for one in ours} & {one.prompt_ids for one in theirs}:
        raise DatasetUnusable("the two versions completed no prompt in common: measure them with the same seed")
    return {prompt: fmean((a > b) + 0.5 * (a == b) for a in mine[prompt] for b in other[prompt]) for prompt in shared}


def _worth(
    completed: Sequence[Completed], judge: Callable[[Completed], float | None]
) -> dict[tuple[int, ...], list[float]]:
    found: defaultdict[tuple[int, ...], list[float]] = defaultdict(list)
    for one in completed:
        if (worth := judge(one)) is not None:
            found[one.prompt_ids].append(worth)
    return found
