"""What the arguments of every op must be. Raised before anything is written, with the offending value."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import SCALES, check_beta, check_eps

GRAD_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_dtype(name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless ``dtype`` is one of those allowed."""
    if dtype not in allowed:
        raise TypeError(f"{name} must be one of {', '.join(map(str, allowed))}, got {dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise RuntimeError unless both are on one device."""
    if tensor.device != other.device:
        raise RuntimeError(f"{name} is on {tensor.device} but {other_name} is on {other.device}")


def check_rows(name: str, matrix: Tensor) -> None:
    """Raise ValueError unless ``matrix`` is (K, P) with contiguous rows."""
    if matrix.dim() != 2:
        raise ValueError(f"{name} must have shape (K, P), got {tuple(matrix.shape)}")
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError(f"each row of {name} must be contiguous, got strides {matrix.stride()}")


def check_seed(seed: int | None, name: str, state: torch.dtype) -> None:
    """Raise ValueError for a seed where nothing is rounded stochastically."""
    if seed is not None and state != torch.bfloat16:
        raise ValueError(f"seed={seed} is for rounding a bfloat16 {name} stochastically, this one is {state}")


def check_loss_scale(loss_scale: Tensor | None) -> None:
    """Raise ValueError unless it is None or one number."""
    if loss_scale is not None and loss_scale.numel() != 1:
        raise ValueError(f"loss_scale must be one number, got shape {tuple(loss_scale.shape)}")


def check_coefficients(coefficients: Tensor | None, row: Tensor) -> None:
    """Raise unless it is None or three float64 on the row's device: decay, gain and a seed's bits."""
    if coefficients is None:
        return
    check_dtype("the dtype of coefficients", coefficients.dtype, (torch.float64,))
    if coefficients.shape != (3,) or not coefficients.is_contiguous():
        raise ValueError(
            f"coefficients must be contiguous of shape (3,), got shape {tuple(coefficients.shape)}, "
            f"strides {coefficients.stride()}"
        )
    check_device("coefficients", coefficients, "row", row)


def check_weighting(eps: float, scale: str) -> None:
    """Raise ValueError unless eps and scale are possible."""
    check_eps(eps)
    if scale not in (*SCALES, "constant"):
        raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))} or 'constant', got {scale!r}")


def check_balance(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, seed: int | None
) -> None:
    """The arguments of `ops.balance_`."""
    if grads.dim() != 2 or grads.shape[0] < 1:
        raise ValueError(f"grads must have shape (K, P) with K >= 1, got {tuple(grads.shape)}")
    if grads.shape != ema.shape:
        raise ValueError(f"grads and ema differ in shape: {tuple(grads.shape)} and {tuple(ema.shape)}")
    check_dtype("the dtype of grads", grads.dtype, GRAD_DTYPES)
    check_dtype("the dtype of ema", ema.dtype, STATE_DTYPES)
    if (grads.dtype == torch.float64) != (ema.dtype == torch.float64):
        raise TypeError(
            f"float64 goes with float64 only: grads is {grads.dtype} and ema is {ema.dtype}; convert one of them"
        )
    check_device("grads", grads, "ema", ema)
    if not ema.is_contiguous():
        raise ValueError(
            f"ema is updated in place and must be contiguous, got strides {ema.stride()} for shape {tuple(ema.shape)}"
        )
    check_beta(beta)
    check_weighting(eps, scale)
    check_seed(seed, "ema", ema.dtype)


def check_accumulate(
    row: Tensor,
    sumsq: Tensor,
    grads: list[Tensor | None],
    segments: Tensor,
    loss_scale: Tensor | None,
    seed: int | None,
    coefficients: Tensor | None,
) -> None:
    """The arguments of `ops.accumulate_`, as far as their values do not matter."""
    check_dtype("the dtype of row", row.dtype, STATE_DTYPES)
    if row.dim() != 1 or not row.is_contiguous():
        raise ValueError(f"row must be 1-D and contiguous, got shape {tuple(row.shape)}, strides {row.stride()}")
    if sumsq.numel() != 1 or sumsq.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sumsq must be one float, got {tuple(sumsq.shape)} of {sumsq.dtype}")
    check_device("sumsq", sumsq, "row", row)
    check_loss_scale(loss_scale)
    check_seed(seed, "row", row.dtype)
    check_coefficients(coefficients, row)
    if segments.dtype != torch.int64 or segments.shape != (len(grads), 2) or segments.device.type != "cpu":
        raise ValueError(
            f"segments must be a CPU int64 tensor of shape ({len(grads)}, 2), got {segments.dtype} of shape "
            f"{tuple(segments.shape)} on {segments.device}"
        )
    device, strided = row.device, torch.strided
    for index, grad in enumerate(grads):  # hundreds of them, every step: no work but the checks
        if grad is None:
            continue
        if grad.dtype not in GRAD_DTYPES:
            check_dtype(f"the dtype of grads[{index}]", grad.dtype, GRAD_DTYPES)
        if grad.layout is not strided:
            raise TypeError(f"grads[{index}] must be a dense tensor, got layout {grad.layout}")
        if grad.device != device:
            check_device(f"grads[{index}]", grad, "row", row)


def check_segments(row: Tensor, grads: list[Tensor | None], segments: Tensor) -> None:
    """The values of ``segments``: inside the row, and of the gradients' sizes."""
    end = row.numel()
    for index, ((offset, numel), grad) in enumerate(zip(segments.tolist(), grads, strict=True)):
        if offset < 0 or numel < 0 or offset + numel > end:
            raise ValueError(f"segment {index} covers [{offset}, {offset + numel}) of a row of {end} elements")
        if grad is not None and grad.numel() != numel:
            raise ValueError(f"grads[{index}] has {grad.numel()} elements, its segment has {numel}")


def check_balance_rows(
    rows: Tensor,
    books: dict[str, Tensor],
    outs: list[Tensor],
    starts: list[int],
    active: Tensor | None,
    loss_scale: Tensor | None,
    eps: float,
    scale: str,
) -> None:
    """The arguments of `ops.balance_rows_`; ``books`` are its K-element tensors by name."""
    check_rows("rows", rows)
    check_dtype("the dtype of rows", rows.dtype, STATE_DTYPES)
    num_tasks, row_numel = rows.shape
    if num_tasks < 1:
        raise ValueError(f"rows must have shape (K, P) with K >= 1, got {tuple(rows.shape)}")
    if num_tasks > 1 and rows.stride(0) < row_numel:
        raise ValueError(f"rows are updated in place and must not overlap, got strides {rows.stride()}")
    floats = (torch.float32, torch.float64)
    allowed = {"broken": (torch.bool,), "active": (torch.bool,), "nonfinite_steps": (torch.int64,)}
    vectors = books if active is None else {**books, "active": active}
    for name, tensor in vectors.items():
        if tensor.shape != (num_tasks,) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous of shape ({num_tasks},), got {tuple(tensor.shape)}")
        check_dtype(f"the dtype of {name}", tensor.dtype, allowed.get(name, floats))
        check_device(name, tensor, "rows", rows)
    check_loss_scale(loss_scale)
    check_weighting(eps, scale)
    if len(outs) != len(starts) or not 1 <= len(outs) <= len(GRAD_DTYPES):
        raise ValueError(f"outs and starts must be 1 to {len(GRAD_DTYPES)} each, got {len(outs)} and {len(starts)}")
    for index, (out, start) in enumerate(zip(outs, starts, strict=True)):
        check_dtype(f"the dtype of outs[{index}]", out.dtype, GRAD_DTYPES)
        if out.dim() != 1 or not out.is_contiguous():
            raise ValueError(f"outs[{index}] must be 1-D and contiguous, got shape {tuple(out.shape)}")
        if start < 0 or start + out.numel() > row_numel:
            raise ValueError(f"outs[{index}] is of columns [{start}, {start + out.numel()}) of rows of {row_numel}")
        check_device(f"outs[{index}]", out, "rows", rows)


def check_combine(rows: Tensor, weights: Tensor, dtype: torch.dtype) -> None:
    """The arguments of `ops.combine`."""
    check_rows("rows", rows)
    check_dtype("the dtype of rows", rows.dtype, STATE_DTYPES)
    check_dtype("the dtype of the result", dtype, GRAD_DTYPES)
    if weights.shape != (rows.shape[0],):
        raise ValueError(f"weights must have shape ({rows.shape[0]},), got {tuple(weights.shape)}")
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights must be floating point, got {weights.dtype}")
    check_device("weights", weights, "rows", rows)


def check_out(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """The arguments of `ops.combine_out`."""
    check_combine(rows, weights, out.dtype)
    if out.shape != (rows.shape[1],) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous of shape ({rows.shape[1]},), got {tuple(out.shape)}")
    check_device("out", out, "rows", rows)
