"""From the norms of the task gradients to K weights. K-element arithmetic, on the device, without a sync."""

from __future__ import annotations

import torch
from torch import Tensor

# No weight is larger: times the zeros of a task without gradient it still gives zero.
LARGEST = torch.finfo(torch.float32).max


def max_norm_weights(norms: Tensor, eps: float, scale: str | float, active: Tensor | None = None) -> Tensor:
    """Weights ``alpha / (norms + eps)``, alpha being formed from the norms of the active tasks.

    Args:
        norms: (K,) float norms.
        eps: added to the norms.
        scale: "max" (the method of the paper), "mean", "median", "min" or a number (its alpha strategies).
        active: (K,) bool; the others get weight 0 and no say in alpha. A norm that is not finite is inactive.

    Returns:
        (K,) weights. With a single task and a named scale the weight is exactly 1: the EMA itself, unscaled.

    Source: arXiv 2308.12029, Algorithm 1 and the ablation of alpha.
    """
    use = torch.isfinite(norms) if active is None else active & torch.isfinite(norms)
    zero = norms.new_zeros(())
    if isinstance(scale, str) and norms.numel() == 1:
        return use.to(norms.dtype)
    if not isinstance(scale, str):
        alpha = norms.new_full((), scale)
    elif scale == "max":
        alpha = torch.where(use, norms, zero).amax()
    elif scale == "min":
        alpha = torch.where(use, norms, torch.inf).amin()
    elif scale == "mean":
        alpha = torch.where(use, norms, zero).sum() / use.sum().clamp(min=1)
    else:
        alpha = torch.nanquantile(torch.where(use, norms, torch.nan), 0.5)
    return torch.where(use, (alpha / (norms + eps)).clamp(max=LARGEST), zero)
