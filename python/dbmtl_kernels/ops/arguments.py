"""What the numbers and tensors given to an op must be. Raised before anything is written, with the offending value."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import SupportsIndex

import torch
from torch import Tensor

from ..backends.arguments import DTYPES, BalanceRows, Coefficients, Gradients

SCALES = ("max", "mean", "median", "min")
GRAD_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# --- numbers: each check returns what it was given, as int or float -------------------------------------------


def check_beta(beta: float) -> float:
    """Raise ValueError unless the forgetting rate is in [0, 1)."""
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    return beta


def check_beta_sigma(beta_sigma: float) -> float:
    """Raise ValueError unless the decay exponent is in [0, 10]: step ** 10 fits into float64 for any count of steps."""
    if not 0.0 <= beta_sigma <= 10.0:
        raise ValueError(f"beta_sigma must be in [0, 10], got {beta_sigma}")
    return beta_sigma


def check_eps(eps: float) -> float:
    """Raise ValueError unless eps is positive and finite."""
    if not 0.0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    return eps


def check_choice(name: str, value: str | None, among: Iterable[str | None]) -> str | None:
    """Raise ValueError unless ``value`` is one of these."""
    if value not in among:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, among))}, got {value!r}")
    return value


def check_scale(scale: str | float) -> str | float:
    """Raise ValueError unless ``scale`` is one of `SCALES` or a finite number >= 0; TypeError if it is neither kind."""
    if isinstance(scale, str):
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))} or a number, got {scale!r}")
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a string or a number, got {type(scale).__name__}")
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and not negative, got {scale}")
    return float(scale)


def check_finite(name: str, value: float) -> float:
    """Raise TypeError or ValueError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_num_tasks(num_tasks: SupportsIndex) -> int:
    """Raise TypeError or ValueError unless K is an integer (NumPy's too) >= 1."""
    return check_count("num_tasks", num_tasks)


def check_count(name: str, value: SupportsIndex) -> int:
    """Raise TypeError or ValueError unless ``value`` is an integer >= 1."""
    count = _int(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_task(index: SupportsIndex, num_tasks: int) -> int:
    """Raise TypeError or ValueError unless the index is an integer in [0, num_tasks)."""
    task = _int("the task index", index)
    if not 0 <= task < num_tasks:
        raise ValueError(f"task index {task} is out of range for {num_tasks} tasks")
    return task


def check_tasks(tasks: Sequence[SupportsIndex] | None, count: int, num_tasks: int) -> list[int]:
    """The tasks that ``count`` losses are of, None being all; raise ValueError unless each is there once."""
    if tasks is None:
        if count != num_tasks:
            raise ValueError(
                f"expected {num_tasks} losses (num_tasks), got {count}; None stands for an absent task, or name those "
                "present with tasks=[...]"
            )
        return list(range(num_tasks))
    indices = [check_task(t, num_tasks) for t in tasks]
    if len(indices) != count:
        raise ValueError(f"expected {len(indices)} losses (tasks={indices}), got {count}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"tasks={indices} names a task twice")
    return indices


def _int(name: str, value: SupportsIndex) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return operator.index(value)


# --- tensors --------------------------------------------------------------------------------------------------


def check_dtype(name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless ``dtype`` is one of those allowed."""
    if dtype not in allowed:
        raise TypeError(f"{name} must be one of {', '.join(map(str, allowed))}, got {dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise RuntimeError unless both are on one device."""
    if tensor.device != other.device:
        raise RuntimeError(f"{name} is on {tensor.device} but {other_name} is on {other.device}")


def check_rows(rows: Tensor) -> None:
    """Raise unless ``rows`` is (K, P) of a state dtype, each row contiguous."""
    if rows.dim() != 2:
        raise ValueError(f"rows must have shape (K, P), got {tuple(rows.shape)}")
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise ValueError(f"each row of rows must be contiguous, got strides {rows.stride()}")
    if rows.dtype not in STATE_DTYPES:
        check_dtype("the dtype of rows", rows.dtype, STATE_DTYPES)


def check_balance(grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float) -> None:
    """The arguments of `ops.balance_`."""
    if grads.dim() != 2 or grads.shape[0] < 1:
        raise ValueError(f"grads must have shape (K, P) with K >= 1, got {tuple(grads.shape)}")
    if grads.shape != ema.shape:
        raise ValueError(f"grads and ema differ in shape: {tuple(grads.shape)} and {tuple(ema.shape)}")
    if grads.dtype not in GRAD_DTYPES:
        check_dtype("the dtype of grads", grads.dtype, GRAD_DTYPES)
    if ema.dtype not in STATE_DTYPES:
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
    check_eps(eps)
    _check_named_scale(scale, constant)


def check_accumulate(
    row: Tensor | None,
    sumsq: Tensor,
    grads: list[Tensor | None],
    segments: Tensor,
    coefficients: Coefficients,
    loss_scale: Tensor | None,
) -> Gradients:
    """The arguments of `ops.accumulate_`; the gradients as backends need them."""
    where, other = ("sumsq", sumsq) if row is None else ("row", row)
    if row is not None:
        if row.dtype not in STATE_DTYPES:
            check_dtype("the dtype of row", row.dtype, STATE_DTYPES)
        if row.dim() != 1 or not row.is_contiguous():
            raise ValueError(f"row must be 1-D and contiguous, got shape {tuple(row.shape)}, strides {row.stride()}")
        if sumsq.device != row.device:
            check_device("sumsq", sumsq, "row", row)
    if sumsq.numel() != 1:
        raise ValueError(f"sumsq must be one number, got shape {tuple(sumsq.shape)}")
    device, end = other.device, math.inf if row is None else row.numel()
    wide = torch.float32 if device.type == "mps" else torch.float64
    if sumsq.dtype is not wide:
        check_dtype("the dtype of sumsq", sumsq.dtype, (wide,))
    if isinstance(coefficients, Tensor):
        check_dtype("the dtype of coefficients", coefficients.dtype, (wide,))
        if coefficients.shape != (2,) or not coefficients.is_contiguous():
            raise ValueError(
                f"coefficients must be contiguous of shape (2,), got shape {tuple(coefficients.shape)}, "
                f"strides {coefficients.stride()}"
            )
        check_device("coefficients", coefficients, where, other)
    if loss_scale is not None:
        _check_loss_scale(loss_scale)
    if segments.dtype != torch.int64 or segments.shape != (len(grads), 2) or segments.device.type != "cpu":
        raise ValueError(
            f"segments must be a CPU int64 tensor of shape ({len(grads)}, 2), got {segments.dtype} of shape "
            f"{tuple(segments.shape)} on {segments.device}"
        )
    numels = _numels(segments.numpy().tobytes(), end)
    tensors: list[Tensor | None] = grads
    addresses: list[int] = []
    codes: list[int] = []
    pointers, code_of, strided = device.type in ("cpu", "cuda"), DTYPES.get, torch.strided
    for grad, numel in zip(grads, numels, strict=True):  # some hundred a task: once, and nothing that need not be
        if grad is None:
            addresses.append(0)
            codes.append(_MISSING)
            continue
        code = code_of(grad.dtype, _MISSING)
        if code == _MISSING or grad.layout is not strided or grad.device != device or grad.numel() != numel:
            _refuse_gradient(len(codes), grad, numel, where, other)
        if not grad.is_contiguous() or grad.is_neg():
            tensors = list(grads) if tensors is grads else tensors
            tensors[len(codes)] = grad = grad.contiguous().resolve_neg()
        address = grad.data_ptr() if pointers else 0
        if address == 0 and pointers and numel and not grad._is_zerotensor():  # to a kernel that stands for zeros
            raise TypeError(f"grads[{len(codes)}] has no memory of its own: {type(grad).__name__}")
        addresses.append(address)
        codes.append(code)
    some = min(codes, default=0) % _MISSING
    return Gradients(tensors, addresses, bytes(codes).replace(bytes([_MISSING]), bytes([some])))


_MISSING = 255


def _refuse_gradient(index: int, grad: Tensor, numel: int, where: str, other: Tensor) -> None:
    check_dtype(f"the dtype of grads[{index}]", grad.dtype, GRAD_DTYPES)
    if grad.layout is not torch.strided:
        raise TypeError(f"grads[{index}] must be a dense tensor, got layout {grad.layout}")
    check_device(f"grads[{index}]", grad, where, other)
    raise ValueError(f"grads[{index}] has {grad.numel()} elements, its segment has {numel}")


@lru_cache(512)
def _numels(segments: bytes, end: float) -> list[int]:
    """Of each segment, if all lie within a row of ``end`` elements, none over another; inf is of no row."""
    pairs = memoryview(segments).cast("q").tolist()
    for index, (offset, numel) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        if offset < 0 or numel < 0 or offset + numel > end:
            raise ValueError(f"segment {index} covers [{offset}, {offset + numel}) of a row of {end} elements")
    spans = sorted((offset, offset + numel) for offset, numel in zip(pairs[::2], pairs[1::2], strict=True) if numel)
    for one, other in pairwise(spans):
        if other[0] < one[1] and end < math.inf:
            raise ValueError(f"segments overlap: [{one[0]}, {one[1]}) and [{other[0]}, {other[1]})")
    return pairs[1::2]


def check_balance_rows(step: BalanceRows) -> None:
    """The arguments of `ops.balance_rows_`."""
    rows = step.rows
    check_rows(rows)
    num_tasks, row_numel = rows.shape
    if num_tasks < 1:
        raise ValueError(f"rows must have shape (K, P) with K >= 1, got {tuple(rows.shape)}")
    if num_tasks > 1 and rows.stride(0) < row_numel:
        raise ValueError(f"rows are updated in place and must not overlap, got strides {rows.stride()}")
    device = rows.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    dtypes = (wide, wide, wide, torch.bool, torch.int64)
    vectors: list[tuple[str, Tensor, torch.dtype]] = list(zip(step.stats._fields, step.stats, dtypes, strict=True))
    if step.active is not None:
        vectors.append(("active", step.active, torch.bool))
    for name, tensor, dtype in vectors:
        if tensor.shape != (num_tasks,) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous of shape ({num_tasks},), got {tuple(tensor.shape)}")
        if tensor.dtype is not dtype:
            check_dtype(f"the dtype of {name}", tensor.dtype, (dtype,))
        if tensor.device != device:
            check_device(name, tensor, "rows", rows)
    if step.loss_scale is not None:
        _check_loss_scale(step.loss_scale)
    above = step.propagate_above
    if isinstance(above, bool) or not isinstance(above, (int, float)):
        raise TypeError(f"propagate_above must be a number, got {above!r}")
    if math.isnan(above):
        raise ValueError(f"propagate_above must not be NaN, got {above}")
    check_eps(step.eps)
    _check_named_scale(step.scale, step.constant)
    if len(step.outs) != len(step.starts) or not 1 <= len(step.outs) <= len(GRAD_DTYPES):
        raise ValueError(
            f"outs and starts must be 1 to {len(GRAD_DTYPES)} each, got {len(step.outs)} and {len(step.starts)}"
        )
    for index, (out, start) in enumerate(zip(step.outs, step.starts, strict=True)):
        if out.dtype not in GRAD_DTYPES:
            check_dtype(f"the dtype of outs[{index}]", out.dtype, GRAD_DTYPES)
        if out.dim() != 1 or not out.is_contiguous():
            raise ValueError(f"outs[{index}] must be 1-D and contiguous, got shape {tuple(out.shape)}")
        if start < 0 or start + out.numel() > row_numel:
            raise ValueError(f"outs[{index}] is of columns [{start}, {start + out.numel()}) of rows of {row_numel}")
        if out.device != device:
            check_device(f"outs[{index}]", out, "rows", rows)


def check_combine(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """The arguments of `ops.combine_out`."""
    check_rows(rows)
    check_dtype("the dtype of out", out.dtype, GRAD_DTYPES)
    if weights.shape != (rows.shape[0],):
        raise ValueError(f"weights must have shape ({rows.shape[0]},), got {tuple(weights.shape)}")
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights must be floating point, got {weights.dtype}")
    check_device("weights", weights, "rows", rows)
    if out.shape != (rows.shape[1],) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous of shape ({rows.shape[1]},), got {tuple(out.shape)}")
    check_device("out", out, "rows", rows)


def _check_loss_scale(loss_scale: Tensor) -> None:
    if loss_scale.numel() != 1:
        raise ValueError(f"loss_scale must be one number, got shape {tuple(loss_scale.shape)}")


def _check_named_scale(scale: str, constant: float) -> None:
    if scale not in SCALES and scale != "constant":
        raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))} or 'constant', got {scale!r}")
    if not math.isfinite(constant):
        raise ValueError(f"constant must be finite, got {constant}")
