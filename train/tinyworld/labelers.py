"""Simulated labelers: noisy, biased, each in their own way, and blind to which version wrote what.

A labeler perceives a completion's worth as

    gold utility + N(0, noise) − position_bias · (place in the list, 0 … 1) + length_bias · (words − 10) / 10,

and ties what is perceived within ``tie_threshold`` of the best of its group (equal texts are always tied). The
population's noise is set so that two labelers agree on about 73 % of the pairs whose gold utility differs,
as InstructGPT's did (72.6 ± 1.5 %, §3.4).

A judgement depends on the labeler's seed and on what was shown, on nothing else: not on the order in which
comparisons arrive, so a study over HTTP repeats exactly.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from train.tinyworld.gold import utility
from train.tinyworld.tasks import parse

TYPICAL_NOISE = 0.86
"""Median noise SD of the population, in units of gold utility; calibrated on an SFT policy's own completions."""
NOISE_SPREAD = 0.3
"""SD of the logarithm of the noise between labelers: the best are about twice as reliable as the worst."""

Ranking = tuple[tuple[int, ...], ...]
"""Positions of the completions, best group first; a group is a tie (``feedback.records.Comparison.ranking``)."""


@dataclass(frozen=True)
class Labeler:
    """One simulated labeler; noise, biases and threshold in units of gold utility."""

    name: str
    seed: int
    noise: float = TYPICAL_NOISE
    tie_threshold: float = 0.15
    position_bias: float = 0.0
    length_bias: float = 0.0

    def rank(self, instruction: str, texts: Sequence[str], finished: Sequence[bool]) -> Ranking:
        """Rank completions of ``instruction``; ``finished[i]`` is whether ``texts[i]`` ended by itself.

        Raises UnknownInstruction where the instruction is not the tiny world's.
        """
        perceived = self._perceive(instruction, texts, finished)
        groups: list[list[int]] = []
        for index in sorted(range(len(texts)), key=lambda index: -perceived[index]):
            if groups and perceived[groups[-1][0]] - perceived[index] <= self.tie_threshold:
                groups[-1].append(index)
            else:
                groups.append([index])
        return tuple(tuple(sorted(group)) for group in groups)

    def _perceive(self, instruction: str, texts: Sequence[str], finished: Sequence[bool]) -> list[float]:
        task = parse(instruction)
        rng = random.Random(f"{self.seed} {instruction} {list(texts)}")
        perceived: dict[tuple[str, bool], float] = {}
        for place, (text, ended) in enumerate(zip(texts, finished, strict=True)):
            shown = (text.strip(), ended)
            if shown not in perceived:  # the same text again is the same judgement: a tie
                bias = self.length_bias * (len(text.split()) - 10) / 10 - self.position_bias * place / len(texts)
                perceived[shown] = utility(task, text, ended).total + rng.gauss(0, self.noise) + bias
        return [perceived[text.strip(), ended] for text, ended in zip(texts, finished, strict=True)]


GOLD = Labeler("gold", seed=0, noise=0.0, tie_threshold=0.0)
"""Ranks by gold utility itself: what a labeler without noise or bias would say."""


def population(count: int, seed: int) -> tuple[Labeler, ...]:
    """``count`` labelers of differing reliability and bias, the same for the same seed."""
    rng = random.Random(f"labelers {seed}")
    return tuple(
        Labeler(
            name=f"labeler-{number:02d}",
            seed=rng.getrandbits(63),
            noise=TYPICAL_NOISE * rng.lognormvariate(0, NOISE_SPREAD),
            tie_threshold=rng.uniform(0.05, 0.25),
            position_bias=rng.gauss(0.05, 0.05),
            length_bias=rng.gauss(0.03, 0.05),
        )
        for number in range(1, count + 1)
    )
