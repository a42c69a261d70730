"""Every op in plain in-place PyTorch: the fallback on any device, and the yardstick the kernels must beat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..rounding import row_key, row_key_of, to_bfloat16
from ..weighting import max_norm_weights
from .engine_step import EngineStep


def missing(device: torch.device) -> str | None:
    """Serves every device."""
    return None


def most_tasks(gramian: bool) -> int | None:
    """Any number."""
    return None


def gathers_early(device: torch.device) -> bool:
    """On a CPU a gradient is still in cache while the backward pass runs."""
    return device.type == "cpu"


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _update(
    row: Tensor,
    grad: Tensor | None,
    decay: float | Tensor,
    gain: float | Tensor,
    key: int | Tensor | None = None,
    column: int = 0,
) -> None:
    """Row <- decay * row + gain * grad, in fp32 whatever the storage.

    With a key, a bfloat16 row that begins at ``column`` of the whole is rounded stochastically.
    """
    work = _arithmetic(row.dtype)
    if isinstance(decay, Tensor):  # looking at it would be a sync: both terms are formed, and the right sum is chosen
        decayed = row.to(work) * decay.to(work)
        gained = torch.zeros_like(decayed) if grad is None else grad.to(work) * gain
        new = torch.where(decay == 0, gained, decayed if grad is None else decayed + gained)
        row.copy_(new if key is None else to_bfloat16(new, key, column))
    elif key is not None:
        terms = [] if decay == 0.0 else [row.to(work) * decay]
        terms += [] if grad is None else [grad.to(work) * gain]
        row.copy_(to_bfloat16(sum(terms[1:], terms[0]), key, column) if terms else torch.zeros_like(row))
    elif grad is None:
        row.zero_() if decay == 0.0 else row.mul_(decay)
    elif decay == 0.0:  # nothing is left of the state: do not read it
        row.copy_(grad.to(work) * gain)
    elif row.dtype == work:
        row.mul_(decay).add_(grad.to(work) * gain)
    else:
        row.copy_(row.to(work) * decay + grad.to(work) * gain)


def _sum_of_squares(x: Tensor) -> Tensor:
    wide = torch.float64 if x.device.type == "cpu" else _arithmetic(x.dtype)
    norm: Tensor = torch.linalg.vector_norm(x, dtype=wide)
    return norm.square()


def balance_(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, seed: int | None
) -> tuple[Tensor, Tensor]:
    """See `functional.balance_`."""
    norms = torch.empty(ema.shape[0], dtype=_arithmetic(ema.dtype), device=ema.device)
    for t in range(ema.shape[0]):
        _update(ema[t], grads[t], beta, 1.0 - beta, None if seed is None else row_key(seed, t))
        norms[t] = _sum_of_squares(ema[t]).sqrt()
    weights = max_norm_weights(norms, eps, constant if scale == "constant" else scale)
    ema.masked_fill_(~torch.isfinite(norms)[:, None], 0.0)
    out = torch.empty(ema.shape[1], dtype=grads.dtype, device=ema.device)
    combine_out(ema, weights, out, accumulate=False)
    return out, norms


def accumulate_(
    row: Tensor,
    sumsq: Tensor,
    grads: list[Tensor | None],
    segments: Tensor,
    decay: float,
    gain: float,
    loss_scale: Tensor | None,
    seed: int | None,
    coefficients: Tensor | None,
) -> None:
    """See `ops.accumulate_`."""
    work = _arithmetic(row.dtype)
    decayed: float | Tensor = decay
    scaled: float | Tensor = gain
    key: int | Tensor | None = None if seed is None else row_key(seed, 0)
    if coefficients is not None:
        decayed, scaled = coefficients[0], coefficients[1]
        key = None if seed is None else row_key_of(coefficients[2].view(torch.int64), 0)
    if loss_scale is not None:
        exact = torch.float32 if row.device.type == "mps" else torch.float64
        factor = loss_scale.reshape(()).to(row.device, exact)
        scaled = torch.where(factor == 0, 0.0, scaled / factor)
    if isinstance(scaled, Tensor):
        scaled = scaled.to(work)
    total = torch.zeros_like(sumsq)
    for grad, (offset, numel) in zip(grads, segments.tolist(), strict=True):
        segment = row[offset : offset + numel]
        _update(segment, None if grad is None else grad.reshape(-1), decayed, scaled, key, offset)
        if numel:
            total += _sum_of_squares(segment)
    sumsq.copy_(total)


def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
    """See `ops.combine_out`."""
    work = _arithmetic(rows.dtype)
    used = weights != 0
    if rows.device.type == "cpu":
        rows, weights = (rows, weights) if used.all() else (rows[used], weights[used])
    else:  # no sync: what is left out must still not turn 0 * inf into NaN
        rows = torch.where(used[:, None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
    total = weights.to(work) @ rows.to(work)
    if accumulate:
        total += out
    out.copy_(total)


def balance_rows_(step: EngineStep, combine: Callable[[Tensor, Tensor, Tensor, bool], None] = combine_out) -> None:
    """See `ops.balance_rows_`. ``combine`` is the `combine_out` to use."""
    found = step.sumsq.sqrt()
    before = torch.zeros_like(step.broken) if step.fresh else step.broken.clone()
    now = ~torch.isfinite(found)
    bad = before | now
    use = ~bad if step.active is None else step.active & ~bad
    step.norms.copy_(found)
    alpha = step.constant if step.scale == "constant" else step.scale
    step.weights.copy_(max_norm_weights(found, step.eps, alpha, use))
    step.nonfinite_steps.add_(now & ~before)
    step.broken.copy_(bad)
    step.sumsq.masked_fill_(bad, 0.0)
    carried = step.weights
    if step.loss_scale is not None:
        factor = step.loss_scale.reshape(()).to(step.weights.device, step.weights.dtype)
        carried = torch.where(bad & (factor > 1), torch.nan, step.weights * factor)
    for out, start in zip(step.outs, step.starts, strict=True):
        part = step.rows[:, start : start + out.numel()]
        if step.rows.device.type != "cpu":
            part.masked_fill_(bad[:, None], 0.0)
        else:  # no need to touch the others
            for task in bad.nonzero().flatten().tolist():
                part[task].zero_()
        combine(part, carried, out, step.accumulate)


def gramian(rows: Tensor) -> Tensor:
    """See `ops.gramian`."""
    work = rows.to(_arithmetic(rows.dtype))
    return work @ work.T
