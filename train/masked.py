"""Mean, variance and whitening over the real tokens of a padded batch.

Everywhere: ``x`` and ``mask`` have the same shape, usually [B, R] (B completions of R padded tokens), and
True in ``mask`` selects the tokens that count. A mask that selects nothing gives nan, never a quiet zero.
"""

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the selected elements, a scalar: each token weighs the same, whichever completion it is in."""
    return _selected(x, mask).sum() / mask.sum()


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divisor n) of the selected elements, a scalar."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """The selected elements scaled to variance 1 and, with ``shift_mean``, moved to mean 0; 0 elsewhere.

    Advantages are whitened with the shift, rewards, if at all, without: their mean says how good the policy is
    (Ziegler et al. 2019; Huang et al. 2024, arXiv 2403.17031, details 12 and 16).
    """
    mean = masked_mean(x, mask)
    scaled = (x - mean) * torch.rsqrt(masked_variance(x, mask) + 1e-8)
    return _selected(scaled if shift_mean else scaled + mean, mask)


def _selected(x: Tensor, mask: Tensor) -> Tensor:
    # where, not a product: what stands on the padding may be infinite, and 0 · inf is nan.
    return torch.where(mask, x, torch.zeros_like(x))
