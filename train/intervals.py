"""95 % intervals of what is measured on prompts: completions of one prompt are one observation, not several."""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from statistics import fmean, stdev

import numpy as np
from scipy.stats import bootstrap, t

from feedback.preference import Z95, Estimate, wilson

_RESAMPLES = 2000
_DRAWS_AT_ONCE = 1_000_000


def mean_over_clusters(values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Mean of ``values`` with the percentile interval of a bootstrap over clusters (Efron 1979), say prompts.

    Args:
        values: N ≥ 1 of them.
        clusters: which cluster each belongs to; clusters are resampled whole.
        seed: of the bootstrap.

    Returns:
        ``n`` is the number of clusters; where that is 1 the interval says nothing: −∞ to ∞.
    """
    sums: defaultdict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value
    sizes = Counter(clusters)
    mean = fmean(values)
    if len(sums) == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    found = bootstrap(
        (np.array(list(sums.values())), np.array([sizes[cluster] for cluster in sums])),
        lambda total, size, axis: total.sum(axis) / size.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _DRAWS_AT_ONCE // len(sums)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), len(sums))


def share_over_clusters(happened: Sequence[bool], clusters: Sequence[Hashable]) -> Estimate:
    """Share of N ≥ 1 trials in which something happened, with the Wilson interval at the effective number of trials.

    Trials of one cluster count for less than independent ones by the design effect, the variance between clusters over
    the binomial one (Kish 1965, §8.2); where all trials agree, or are of one cluster, it cannot be told, and each
    cluster counts as one trial.
    Unlike a bootstrap's, the interval of a share of 0 is not empty.
    """
    share, trials = fmean(happened), len(happened)
    deviations: defaultdict[Hashable, float] = defaultdict(float)
    for one, cluster in zip(happened, clusters, strict=True):
        deviations[cluster] += one - share
    variance = sum(deviation**2 for deviation in deviations.values()) / trials**2
    binomial = share * (1 - share) / trials
    effective = trials / max(1.0, variance / binomial) if binomial and len(deviations) > 1 else len(deviations)
    return Estimate(share, *wilson(share * effective, effective, Z95), effective)


def mean_over_seeds(values: Sequence[float]) -> Estimate | None:
    """Mean of what each of S runs found, with Student's interval (1908); None for a single run."""
    if len(values) < 2:
        return None
    mean = fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def figures(name: str, estimate: Estimate) -> dict[str, float]:
    """An estimate under the names that manifests and gates use: ``name``, ``name_low``, ``name_high``, finite ones."""
    ends = {"": estimate.value, "_low": estimate.low, "_high": estimate.high}
    return {f"{name}{end}": value for end, value in ends.items() if math.isfinite(value)}
