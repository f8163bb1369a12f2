"""What is known of a policy's prompts besides what people say of completions: probes, and in the tiny world gold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from train.measures import probes
from train.measures.probes import Probe
from train.sampling import Episodes
from train.settings import TrainSettings
from train.text import TINY_WORLD
from train.tinyworld import probes as tiny

Gold = Callable[[Sequence[int], Sequence[int]], float | None]
"""What a completion (token ids of the prompt, then its own) is truly worth; None where nobody knows."""


@dataclass(frozen=True)
class World:
    """What a policy can be measured by.

    Attributes:
        probes: prompts with a known good or bad answer.
        gold: the hidden utility, where there is one. It judges; nothing ever learns from it.
    """

    probes: tuple[Probe, ...] = ()
    gold: Gold | None = None

    def of_iteration(self, iteration: int, episodes: Episodes) -> dict[str, float]:
        """``gold``, the mean of an iteration's episodes, where it is known: ``on_iteration`` of ``ppo.run``."""
        if self.gold is None:
            return {}
        worth = map(self.gold, episodes.prompts, episodes.completions)
        known = [one for one in worth if one is not None]
        return {"gold": fmean(known)} if known else {}


UNKNOWN = World()
"""Nothing is known of the prompts."""


def world_of(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> World:
    """The world that ``settings.evaluate.probes`` names, for the policy of ``tokenizer``.

    Raises DatasetUnusable where it names a file that holds no probes.
    """
    source = settings.evaluate.probes
    if source is None:
        return UNKNOWN
    if source == TINY_WORLD:
        return World(tiny.probes(tokenizer), tiny.Gold(tokenizer))
    return World(probes.read(Path(source), tokenizer))
