"""More than one process: ``torchrun --nproc-per-node N -m train …`` divides a stage's work and its models' weights.

Every process reads the same data and walks through the same steps. Of each minibatch it computes its share; FSDP2
(``torch.distributed.fsdp.fully_shard``; Zhao et al. 2023, arXiv 2304.11277) keeps 1/N of all weights, gradients and
optimizer states in each process and averages gradients over them. So that N processes learn what one would, each
weighs its mean loss by the size of its share:

    mean over all = (1/N) Σ_ranks  (N · own / all) · mean over own

The first process alone writes files and reports.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from train.running.devices import blocks

Item = TypeVar("Item")
_Model = TypeVar("_Model", bound=nn.Module)


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started; alone, where it did not start this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """The processes that run a stage together.

    Attributes:
        rank: this one's number, from 0.
        count: how many there are: N.
    """

    rank: int
    count: int

    @classmethod
    def current(cls) -> Self:
        """As torchrun set them up; one process where it did not."""
        if not distributed.is_initialized():
            return cls(0, 1)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def from_first(self, make: Callable[[], Item]) -> Item:
        """What ``make`` gives the first process, for all: what is read must be the same in each."""
        if self.count == 1:
            return make()
        made: list[Item | None] = [make() if self.first else None]
        distributed.broadcast_object_list(made)
        return cast(Item, made[0])

    def share(self, items: Sequence[Item], sizes: Sequence[float] | None = None) -> tuple[list[Item], float]:
        """What of a minibatch is this process's, and what its mean loss over that is multiplied by.

        Args:
            items: the whole minibatch, the same in every process.
            sizes: of each item, how much the mean loss is over, its tokens for instance; None: all the same.

        Returns:
            Every N-th of ``items`` from ``rank`` on, and N · own size / all sizes. Where there are fewer items than
            processes, one that would have none gets the first, with weight 0: all processes must compute together.
        """
        sizes = [1.0] * len(items) if sizes is None else sizes
        own = list(items[self.rank :: self.count])
        return own or list(items[:1]), sum(sizes[self.rank :: self.count]) * self.count / sum(sizes)

    def mean(self, number: float) -> float:
        """The average of a number over the processes."""
        if self.count == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        distributed.all_reduce(total)
        return float(total) / self.count

    def gather(self, shares: Sequence[Item]) -> list[Item]:
        """From each process's results for every N-th item, those for all items, in the items' order."""
        if self.count == 1:
            return list(shares)
        everybodys: list[list[Item]] = [[] for _ in range(self.count)]
        distributed.all_gather_object(everybodys, list(shares))
        return [everybodys[i % self.count][i // self.count] for i in range(sum(map(len, everybodys)))]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """``gather`` of the rows of a tensor on the CPU."""
        return torch.stack(self.gather(list(rows))) if self.count > 1 else rows

    def greatest(self, number: float) -> float:
        """The greatest of the processes' numbers."""
        return max(self.gather([number]))

    def shard(self, model: _Model) -> _Model:
        """Keep this process's part of ``model``, block by block; whole weights exist while a block computes.

        Of a transformer with a head on it, each is a whole of its own, because the transformer may be run alone.

        Args:
            model: before ``Device.prepare``, so that no GPU need hold the whole of it; every process has the same.

        Returns:
            ``model``.
        """
        if self.count > 1:
            wholes = [model] if isinstance(model, PreTrainedModel) else model.children()
            for part in (*blocks(model), *wholes):
                # After every pass: between passes, weights are changed where they are kept.
                fully_shard(part, reshard_after_forward=True)
        return model

    @contextmanager
    def together(self, model: nn.Module, touch: Callable[[], Tensor] | None = None) -> Iterator[None]:
        """Inside, each process keeps all weights of ``model``, and may run it as often as it has work.

        A sharded model's every pass takes all processes, but to sample and to score takes each a number of its own.

        Args:
            model: after ``shard``; one that was not sharded stays as it is.
            touch: runs the model once on anything, so that gradients that were computed inside are averaged at the
                end; None: nothing is learnt inside.
        """
        parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.unshard()
            _stay_whole(part, True)
        try:
            yield
            if parts and touch is not None:
                for part in parts:
                    part.set_requires_gradient_sync(True, recurse=False)
                torch.autograd.backward(0.0 * touch().sum())
        finally:
            for part in parts:
                part.reshard()
                _stay_whole(part, False)


def _stay_whole(part: FSDPModule, stay: bool) -> None:
    part.set_requires_gradient_sync(not stay, recurse=False)
    part.set_reshard_after_forward(not stay, recurse=False)
    part.set_reshard_after_backward(not stay, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """A tensor whose parts are in several processes, put together in each; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
