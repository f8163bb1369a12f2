"""What a stage computes on: a CPU in fp32, or a GPU in bf16 over fp32 weights.

A stage loads its models, hands each to ``Device.prepare`` and its batches to ``Device.place``; all else is the same on
every device. Mixed precision (Micikevicius et al. 2018, arXiv 1710.03740) stays inside the transformer: its weights
are fp32 and so is what it returns to a loss or a scalar head.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from train.batches import Batch
from train.errors import DeviceUnusable
from train.settings import DeviceSettings

Forward = Callable[..., object]
_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Device:
    """Where models live, and how they compute.

    Attributes:
        where: the device of weights and batches.
        autocast: the numbers that matrices are multiplied in; None: those of the weights, fp32.
        compiled: whether transformer blocks are compiled.
        checkpointed: whether each transformer block's activations are computed again in the backward pass.
    """

    where: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: torch.dtype | None = None
    compiled: bool = False
    checkpointed: bool = False

    @classmethod
    def choose(cls, settings: DeviceSettings) -> "Device":
        """The device that ``settings`` ask for; under torchrun, this process's own GPU.

        Raises DeviceUnusable where CUDA is asked for and there is none: nothing stands in for it unasked.
        """
        found = torch.cuda.is_available()
        if settings.device == "cuda" and not found:
            raise DeviceUnusable(
                "train.device.device is cuda, but PyTorch finds no GPU: install its CUDA build, or set it to cpu"
            )
        on_gpu = found and settings.device != "cpu"
        half = settings.precision == "bf16" or (settings.precision == "auto" and on_gpu)
        return cls(
            where=torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu"),
            autocast=torch.bfloat16 if half else None,
            compiled=settings.compile,
            checkpointed=settings.checkpointing,
        )

    def prepare(self, model: _Model) -> _Model:
        """Move ``model`` here and have the transformer in it compute as this device does. Returns ``model``.

        Each model once, after all copies of it were taken, adapters put in and, under torchrun, it was sharded.
        """
        model.to(self.where)
        for block in blocks(model):
            if self.checkpointed:
                _wrap(block, _Checkpointed(block.forward))
            if self.compiled:
                block.compile(dynamic=True)
        transformer = _transformer(model)
        if self.autocast is not None and transformer is not None:
            _wrap(transformer, _Autocast(transformer.forward, self.where.type, self.autocast))
        return model

    def place(self, batch: Batch) -> Batch:
        """``batch`` with its tensors on this device."""
        return replace(
            batch,
            input_ids=batch.input_ids.to(self.where),
            attention_mask=batch.attention_mask.to(self.where),
            position_ids=batch.position_ids.to(self.where),
            completion_mask=batch.completion_mask.to(self.where),
        )

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Inside, all random numbers of this device derive from ``seed``; afterwards the caller's go on as before."""
        with torch.random.fork_rng(devices=[self.where] if self.where.type == "cuda" else []):
            torch.manual_seed(seed)
            yield


CPU = Device()
"""One CPU, fp32: what every stage runs on unless told otherwise."""


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Inside, the transformer in ``model`` computes in full precision, whatever it was prepared for."""
    wrapped = [part for part in model.modules() if isinstance(part.__dict__.get("forward"), _Autocast)]
    forwards = [part.__dict__.pop("forward") for part in wrapped]
    for part, forward in zip(wrapped, forwards, strict=True):
        _wrap(part, forward.forward)
    try:
        yield
    finally:
        for part, forward in zip(wrapped, forwards, strict=True):
            _wrap(part, forward)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of ``model``, first to last: what transformers says must stay in one piece."""
    transformer = _transformer(model)
    names = set() if transformer is None else set(transformer._no_split_modules or ())
    return [part for part in model.modules() if type(part).__name__ in names]


def _transformer(model: nn.Module) -> PreTrainedModel | None:
    """The outermost transformer in ``model``; None in heads without one of their own."""
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)


def _wrap(module: nn.Module, forward: Forward) -> None:
    """Give this one module another forward."""
    module.__dict__["forward"] = forward


@dataclass(frozen=True)
class _Autocast:
    """A forward in mixed precision. Unlike a closure, it is copied along with its model."""

    forward: Forward
    device_type: str
    dtype: torch.dtype

    def __call__(self, *inputs: object, **options: object) -> object:
        with torch.autocast(self.device_type, self.dtype):
            return self.forward(*inputs, **options)


@dataclass(frozen=True)
class _Checkpointed:
    """A block's forward whose activations are computed again in the backward pass.

    That of transformers works in training mode only, but reward models and PPO learn in evaluation mode, without
    dropout. A pass that fills a cache of keys and values is kept as it is: run again, it would fill it twice.
    """

    forward: Forward

    def __call__(self, *inputs: object, **options: object) -> object:
        if not torch.is_grad_enabled() or options.get("past_key_values") is not None:
            return self.forward(*inputs, **options)
        return checkpoint(partial(self.forward, **options), *inputs, use_reentrant=False)
