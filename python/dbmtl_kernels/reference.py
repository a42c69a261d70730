"""DB-MTL in plain PyTorch: any float dtype, any device, never tuned, without a sync.

Imports nothing from the rest of the package, so that it can judge it. Source of every formula: Lin et al.,
"Dual-Balancing for Multi-Task Learning", arXiv 2308.12029, Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulate", "balance", "combine", "gramian", "nonfinite", "weights"]

# No weight is larger: times the zeros of a task without gradient it still gives zero.
LARGEST_WEIGHT = torch.finfo(torch.float32).max


def _wide(x: Tensor) -> Tensor:
    """The arithmetic dtype: float64 stays, everything narrower is computed in float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def told(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms in another dtype, where one that is finite does not look as if it were not; a copy."""
    return torch.where(norms.isfinite(), norms.clamp(max=torch.finfo(dtype).max), norms).to(dtype)


def weights(norms: Tensor, eps: float = 1e-8, scale: str | float = "max", active: Tensor | None = None) -> Tensor:
    """Weights ``alpha / (norms + eps)`` that bring every task gradient to the length alpha.

    Args:
        norms: (K,) norms of the task gradients. A norm that is not finite gets weight 0 and no say in alpha.
        eps: added to the norms.
        scale: alpha: "max" (the method), "mean", "median" (mean of the two middle ones if K is even), "min" of the
            norms, or a number (the paper's alpha strategies).
        active: (K,) bool; the others get weight 0 and no say in alpha.

    Returns:
        (K,) in the dtype of ``norms``, none above the largest float32. One task (K = 1) is left as it is: its weight is
        exactly 1, unless ``scale`` is a number.
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
    return torch.where(use, (alpha / (norms + eps)).clamp(max=LARGEST_WEIGHT), zero)


def nonfinite(sumsq: Tensor, before: Tensor, fresh: bool, largest: float | None = None) -> tuple[Tensor, Tensor]:
    """Which tasks have a gradient that is not finite in this step. Such a task sits out the whole step.

    Args:
        sumsq: (K,) sums of squares of the task gradients.
        before: (K,) bool, the tasks found earlier; of an earlier step if ``fresh``.
        fresh: this is the first look in the step.
        largest: a sum above it counts as not finite; by default the largest of its dtype.

    Returns:
        (K,) bool: those of this step, and those of them that were found just now.
    """
    now = ~(sumsq <= (torch.finfo(sumsq.dtype).max if largest is None else largest))
    found = now if fresh else before | now
    return found, now if fresh else now & ~before


def accumulate(row: Tensor, grad: Tensor, decay: float, gain: float) -> tuple[Tensor, Tensor]:
    """``decay * row + gain * grad`` and its sum of squares: ((P,) in row's dtype, () in float64)."""
    new = (decay * _wide(row) + gain * grad.to(_wide(row).dtype)).to(row.dtype)
    return new, new.double().square().sum()


def combine(rows: Tensor, weights: Tensor) -> Tensor:
    """``sum_t weights[t] * rows[t]``: (P,) from (K, P) and (K,). A row whose weight is 0 is left out."""
    wide = torch.where(weights[:, None] != 0, _wide(rows), 0.0)
    return weights.to(wide.dtype) @ wide


def gramian(rows: Tensor) -> Tensor:
    """``rows @ rows.T``: (K, K) from (K, P), summed in float64."""
    wide = rows.double()
    return (wide @ wide.T).to(_wide(rows).dtype)


def balance(
    grads: Tensor, ema: Tensor, beta: float = 0.9, eps: float = 1e-8, scale: str | float = "max"
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of DB-MTL on a K x P matrix of task gradients, out of place.

    ``m = beta * ema + (1 - beta) * grads``; ``grad = sum_t alpha / (||m_t|| + eps) * m_t``.

    Args:
        grads: (K, P) gradients of the log-losses.
        ema: (K, P) state, zeros before the first step.
        beta: forgetting rate in [0, 1).
        eps: added to the norms.
        scale: alpha, see `weights`.

    Returns:
        ``grad`` (P,) in the dtype of grads, the new ``ema`` (K, P) in the dtype of ema, and ``norms`` (K,) in
        float32 (float64 if ema is). A task whose norm is not finite is left out and its new ema is zero.
    """
    m = (beta * _wide(ema) + (1.0 - beta) * grads.to(_wide(ema).dtype)).to(ema.dtype)
    norms = m.double().square().sum(dim=1).sqrt()
    w = weights(norms, eps, scale)
    new_ema = torch.where(torch.isfinite(norms)[:, None], m, torch.zeros_like(m))
    return combine(new_ema, w).to(grads.dtype), new_ema, told(norms, _wide(ema).dtype)
