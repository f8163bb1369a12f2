"""A version measured over several seeds, and beside another version on the same prompts."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from deploy.versions import Version
from feedback.records import Comparison
from train.measures import completed, win_rate

Figures = dict[str, float]
Measure = Callable[[Version, int, Path], Figures]
"""Measures a version by a seed and keeps its completions in a file: ``evaluate.run`` with all else settled."""


def run(
    measure: Measure, version: Version, other: Version | None, seeds: Sequence[int], comparisons: Iterable[Comparison]
) -> Figures:
    """The figures of ``version``, and how often its completions are better than ``other``'s.

    Args:
        measure: of one version and seed.
        version: the policy.
        other: what it is compared with; None leaves the win rates out.
        seeds: of the sampling, at least one; figures are means over them.
        comparisons: the labelers', those in force.

    Returns:
        What ``measure`` returns, and what ``win_rate.by_completions`` and ``win_rate.by_labelers`` do.

    Raises:
        TrainError: as ``measure``.
    """
    with tempfile.TemporaryDirectory() as folder:

        def kept(one: Version, seed: int) -> Path:
            return Path(folder) / f"{one.number}-{seed}.jsonl"

        found = [measure(version, seed, kept(version, seed)) for seed in seeds]
        figures = {
            name: fmean(each[name] for each in found) for name in found[0] if all(name in each for each in found)
        }
        if other is None or figures["nonfinite_weights"]:
            return figures
        for seed in seeds:
            measure(other, seed, kept(other, seed))
        ours, theirs = ([completed.read(kept(one, seed)) for seed in seeds] for one in (version, other))
    figures |= win_rate.by_completions(ours, theirs)
    return figures | win_rate.by_labelers(comparisons, version.number, other.number)
