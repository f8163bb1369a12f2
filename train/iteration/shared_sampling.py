"""Sampling divided over the processes of a run: each draws its share of the episodes, and all get all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from train.batches import collate
from train.lora import Unadapted
from train.running.distributed import Ranks
from train.sampling import Episodes, Sampler


@dataclass(frozen=True)
class SharedSampler:
    """A sampler in each of several processes; in one alone, that sampler and nothing else.

    Attributes:
        sampler: draws this process's share.
        ranks: the processes.
        pad_id: fills up what is shorter.
    """

    sampler: Sampler
    ranks: Ranks
    pad_id: int

    def sample(
        self, policy: PreTrainedModel | Unadapted, prompts: Sequence[Sequence[int]], generator: torch.Generator
    ) -> Episodes:
        """As ``Sampler.sample``. Processes draw from generators of their own, seeded from ``generator``."""
        if self.ranks.count == 1:
            return self.sampler.sample(policy, prompts, generator)
        seeds = torch.randint(2**62, (self.ranks.count,), generator=generator).tolist()
        own, _ = self.ranks.share(prompts)
        model: nn.Module = policy.adapted if isinstance(policy, Unadapted) else policy
        with self.ranks.together(model):
            drawn = self.sampler.sample(policy, own, torch.Generator().manual_seed(seeds[self.ranks.rank]))
        lengths = drawn.batch.completion_lengths.tolist()
        completions = self.ranks.gather(drawn.completions)
        batch = collate(prompts, completions, self.pad_id)
        logprobs = torch.zeros(batch.completion_mask.shape)
        rows = [row[:length].tolist() for row, length in zip(drawn.logprobs, lengths, strict=True)]
        logprobs[batch.completion_mask] = torch.tensor([x for row in self.ranks.gather(rows) for x in row])
        finished = torch.tensor(self.ranks.gather(drawn.finished.tolist()))
        return Episodes(tuple(map(tuple, prompts)), tuple(completions), batch, logprobs, finished)
