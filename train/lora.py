"""Low-rank adapters: train a small addition to each weight matrix and leave the matrix alone (Hu et al. 2021).

    W x  becomes  W x + (α/r) B A x,    A [r, in] random, B [out, r] zero at first, arXiv 2106.09685, §4.1

What is published has no adapters: ``plain_weights`` adds them up. A frozen trunk serves two models, the trained one
with its adapters and the one it started from without (``Unadapted``).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train.errors import ModelUnusable
from train.running.devices import CPU
from train.settings import LoraSettings

NO_ADAPTERS = LoraSettings()
"""Train all weights."""

_ADAPTER = "default"


def adapt(model: PreTrainedModel, settings: LoraSettings, *, seed: int) -> PreTrainedModel:
    """Freeze ``model`` and put adapters into it, which say nothing yet; with rank 0 leave it as it is.

    Args:
        model: a policy, or a trunk without unembedding.
        settings: rank, scale, and which layers.
        seed: of the adapters' random half.

    Returns:
        ``model``.

    Raises:
        ModelUnusable: where the layers that are named do not exist or are not linear.
    """
    if not settings.rank:
        return model
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules) or "all-linear",
        # GPT-2 keeps its linear layers as [in, out].
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
    )
    with CPU.seeded(seed):
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ModelUnusable(f"train.lora.target_modules {settings.target_modules}: {error}") from error
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (not isinstance(layer, Linear) or layer is model.get_output_embeddings()):
            raise ModelUnusable(
                f"train.lora.target_modules {settings.target_modules}: only linear layers besides the unembedding can "
                f"be adapted, not {name.rpartition('.')[2]}"
            )
    return model


def learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and value of each weight of ``model`` that learns: all of them, or adapters and scalar heads."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


class Unadapted:
    """A model as it was before it was adapted, on the same weights: called as the model is, without its adapters.

    Attributes:
        adapted: the model.
        config: its.
    """

    def __init__(self, adapted: PreTrainedModel) -> None:
        self.adapted = adapted
        self.config = adapted.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.adapted.device)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's weights, its adapters' too."""
        yield from self.adapted.parameters()

    def __call__(self, *inputs: object, **options: object) -> object:
        """What the model returns, with its adapters off."""
        with _adapters_off(self.adapted):
            return self.adapted(*inputs, **options)


@torch.no_grad()
def plain_weights(model: nn.Module | Unadapted) -> dict[str, Tensor]:
    """The weights that a model without adapters needs to compute the same, by the names it has for them.

    What is tied is given once.
    """
    if isinstance(model, Unadapted):
        with _adapters_off(model.adapted):
            return plain_weights(model.adapted)
    once = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if ".lora_" in name or name not in once:
            continue
        owner = owner.removesuffix(".base_layer")
        if owner in adapted and kind == "weight":
            weight = weight + adapted[owner].get_delta_weight(_ADAPTER)
        weights[f"{owner}.{kind}" if owner else kind] = weight
    return weights


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    # By their scale: peft's own switch would also tell autograd, and FSDP with it, that they never learn.
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.set_scale(_ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(_ADAPTER, 1.0)
