"""Every op in plain in-place PyTorch: the fallback on any device, and the yardstick the kernels must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .arguments import BalanceRows, Coefficients, Gradients
from .memory import one_thread_if_forked


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


def _update(row: Tensor, grad: Tensor | None, decay: float | Tensor, gain: float | Tensor) -> None:
    """Row <- decay * row + gain * grad in fp32. With a decay of 0 what was there does not count."""
    work = _arithmetic(row.dtype)
    gained = torch.zeros((), dtype=work, device=row.device) if grad is None else _gained(grad, gain, work)
    if isinstance(decay, Tensor):  # whether it is 0 would take a sync to know
        decayed = row.to(work) * decay.to(work)
        row.copy_(torch.where(decay == 0, gained, decayed if grad is None else decayed + gained))
    elif decay == 0.0:
        row.copy_(gained)
    else:
        row.copy_(row.to(work) * decay if grad is None else row.to(work) * decay + gained)


def _gained(grad: Tensor, gain: float | Tensor, work: torch.dtype) -> Tensor:
    """``gain * grad``; with a gain of 0 not even NaN counts."""
    product = grad.reshape(-1).to(work) * gain
    if isinstance(gain, Tensor):
        return torch.where(gain == 0, 0.0, product)
    return product if gain != 0.0 else torch.zeros_like(product)


def _sum_of_squares(x: Tensor) -> Tensor:
    wide = torch.float64 if x.device.type == "cpu" else _arithmetic(x.dtype)
    norm: Tensor = torch.linalg.vector_norm(x, dtype=wide)
    return norm.square()


@one_thread_if_forked()
@torch.no_grad()
def balance_(grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float) -> tuple[Tensor, Tensor]:
    """The dense op, task by task."""
    wide = torch.float64 if ema.device.type == "cpu" else _arithmetic(ema.dtype)
    norms = torch.empty(ema.shape[0], dtype=wide, device=ema.device)
    for t in range(ema.shape[0]):
        _update(ema[t], grads[t], beta, 1.0 - beta)
        norms[t] = _sum_of_squares(ema[t]).sqrt()
    told = reference.told(norms, _arithmetic(ema.dtype))
    beyond = norms.dtype != told.dtype and bool((norms > torch.finfo(told.dtype).max).any())  # on a CPU alone
    weights = reference.weights(norms if beyond else told, eps, constant if scale == "constant" else scale)
    ema.masked_fill_(~torch.isfinite(norms)[:, None], 0.0)
    out = torch.empty(ema.shape[1], dtype=grads.dtype, device=ema.device)
    combine_out(ema, weights, out, accumulate=False)
    return out, told


@one_thread_if_forked()
def accumulate_(
    row: Tensor | None,
    sumsq: Tensor,
    grads: Gradients,
    segments: Tensor,
    coefficients: Coefficients,
    loss_scale: Tensor | None,
) -> None:
    """One task's gradients into its row, segment by segment."""
    decay, gain = coefficients
    if loss_scale is not None:
        factor = loss_scale.reshape(()).to(sumsq.device, sumsq.dtype)
        gain = torch.where(factor == 0, 0.0, gain / factor)
    double = row is None and any(grad is not None and grad.dtype == torch.float64 for grad in grads.tensors)
    work = torch.float64 if double else torch.float32 if row is None else _arithmetic(row.dtype)
    if isinstance(gain, Tensor):
        gain = gain.to(work)
    total = torch.zeros_like(sumsq)
    for grad, (offset, numel) in zip(grads.tensors, segments.tolist(), strict=True):
        if row is not None:
            segment = row[offset : offset + numel]
            _update(segment, grad, decay, gain)
        elif grad is None:
            continue
        else:
            segment = _gained(grad, gain, work)
        if numel:
            total += _sum_of_squares(segment)
    sumsq.copy_(total)


@one_thread_if_forked()
def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
    """One product of a vector and a matrix."""
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


@one_thread_if_forked()
def balance_rows_(step: BalanceRows) -> None:
    """Stats, weights and the combination, K elements at a time."""
    stats, rows = step.stats, step.rows
    bad, now = reference.nonfinite(stats.sumsq, stats.nonfinite, step.fresh)
    stats.norms.copy_(stats.sumsq.sqrt())
    use = ~bad if step.active is None else step.active & ~bad
    alpha = step.constant if step.scale == "constant" else step.scale
    stats.weights.copy_(reference.weights(stats.norms, step.eps, alpha, use))
    stats.nonfinite_steps.add_(now)
    stats.nonfinite.copy_(bad)
    stats.sumsq.masked_fill_(bad, 0.0)
    weights = stats.weights
    if step.loss_scale is not None or step.propagate_above < 1:
        scale = weights.new_ones(()) if step.loss_scale is None else step.loss_scale.reshape(())
        factor = scale.to(weights.device, weights.dtype)
        active_bad = bad if step.active is None else bad & step.active
        weights = torch.where(active_bad & (factor > step.propagate_above), torch.nan, weights * factor)
    for out, start in zip(step.outs, step.starts, strict=True):
        part = rows[:, start : start + out.numel()]
        if rows.device.type != "cpu":
            part.masked_fill_(bad[:, None], 0.0)
        else:  # no need to touch the others
            for task in bad.nonzero().flatten().tolist():
                part[task].zero_()
        combine_out(part, weights, out, step.accumulate)


@one_thread_if_forked()
def gramian(rows: Tensor) -> Tensor:
    """One product of two matrices."""
    work = rows.to(_arithmetic(rows.dtype))
    return work @ work.T
