"""The one door to every kernel: schema, fake and validation of each op, then dispatch to a backend.

Ops are registered under ``torch.ops.dbmtl_kernels`` with `torch.library.Library` (about 2 us a call, where
``custom_op`` costs 11). None of them is differentiable. Whatever is wrong is raised before anything is written.

The functions here are the ops' implementations. The engine calls them as they are, as it runs inside a backward
pass where nothing is traced; `functional` goes through ``torch.ops``, so that ``torch.compile`` sees one node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import backends
from .checks import SCALES, check_beta, check_eps

_LIBRARY = torch.library.Library("dbmtl_kernels", "DEF")

GRAD_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_Implementation = TypeVar("_Implementation", bound=Callable[..., Any])


def _define(schema: str, fake: Callable[..., Any]) -> Callable[[_Implementation], _Implementation]:
    """Register the decorated function as the op that ``schema`` describes."""
    name = schema.split("(", 1)[0]

    def register(implementation: _Implementation) -> _Implementation:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dbmtl_kernels::{name}", fake, lib=_LIBRARY)
        return implementation

    return register


def _one_of(name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype not in allowed:
        raise TypeError(f"{name} must be one of {', '.join(map(str, allowed))}, got {dtype}")


def _same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise RuntimeError(f"{name} is on {tensor.device} but {other_name} is on {other.device}")


def _readable(rows: Tensor) -> Tensor:
    """``rows``, or a copy where rows overlap or are not contiguous, as expanded and transposed ones do."""
    num_tasks, num_params = rows.shape
    ok = (num_params <= 1 or rows.stride(1) == 1) and (num_tasks <= 1 or rows.stride(0) >= num_params)
    return rows if ok else rows.contiguous()


def _written(*tensors: Tensor) -> None:
    """Tell autograd that these were changed: a graph that saved one must not use it unawares."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _rows_contiguous(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"{name} must have shape (K, P), got {tuple(matrix.shape)}")
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError(f"each row of {name} must be contiguous, got strides {matrix.stride()}")


# --- balance_ -------------------------------------------------------------------------------------------------


def _check_balance(grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str) -> None:
    if grads.dim() != 2 or grads.shape[0] < 1:
        raise ValueError(f"grads must have shape (K, P) with K >= 1, got {tuple(grads.shape)}")
    if grads.shape != ema.shape:
        raise ValueError(f"grads and ema differ in shape: {tuple(grads.shape)} and {tuple(ema.shape)}")
    _one_of("the dtype of grads", grads.dtype, GRAD_DTYPES)
    _one_of("the dtype of ema", ema.dtype, STATE_DTYPES)
    if (grads.dtype == torch.float64) != (ema.dtype == torch.float64):
        raise TypeError(
            f"float64 goes with float64 only: grads is {grads.dtype} and ema is {ema.dtype}; convert one of them"
        )
    _same_device("grads", grads, "ema", ema)
    if not ema.is_contiguous():
        raise ValueError(
            f"ema is updated in place and must be contiguous, got strides {ema.stride()} for shape {tuple(ema.shape)}"
        )
    check_beta(beta)
    check_eps(eps)
    if scale not in (*SCALES, "constant"):
        raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))} or 'constant', got {scale!r}")


def _balance_fake(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, backend: str
) -> tuple[Tensor, Tensor]:
    _check_balance(grads, ema, beta, eps, scale)
    norm_dtype = torch.float64 if ema.dtype == torch.float64 else torch.float32
    return grads.new_empty(grads.shape[1]), ema.new_empty(ema.shape[0], dtype=norm_dtype)


@_define(
    "balance_(Tensor grads, Tensor(a!) ema, float beta, float eps, str scale, float constant, str backend) "
    "-> (Tensor, Tensor)",
    _balance_fake,
)
def balance_(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, backend: str
) -> tuple[Tensor, Tensor]:
    """See `functional.balance_`; scale "constant" takes alpha from ``constant``."""
    _check_balance(grads, ema, beta, eps, scale)
    serve = backends.resolve(backend, ema.device)
    result = serve.balance_(_readable(grads), ema, beta, eps, scale, constant)
    _written(ema)
    return result


# --- accumulate_ ----------------------------------------------------------------------------------------------


def _check_accumulate(
    row: Tensor, sumsq: Tensor, grads: list[Tensor | None], segments: Tensor, loss_scale: Tensor | None
) -> None:
    _one_of("the dtype of row", row.dtype, STATE_DTYPES)
    if row.dim() != 1 or not row.is_contiguous():
        raise ValueError(f"row must be 1-D and contiguous, got shape {tuple(row.shape)}, strides {row.stride()}")
    if sumsq.numel() != 1 or sumsq.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sumsq must be one float, got {tuple(sumsq.shape)} of {sumsq.dtype}")
    _same_device("sumsq", sumsq, "row", row)
    if loss_scale is not None and loss_scale.numel() != 1:
        raise ValueError(f"loss_scale must be one number, got shape {tuple(loss_scale.shape)}")
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
            _one_of(f"the dtype of grads[{index}]", grad.dtype, GRAD_DTYPES)
        if grad.layout is not strided:
            raise TypeError(f"grads[{index}] must be a dense tensor, got layout {grad.layout}")
        if grad.device != device:
            _same_device(f"grads[{index}]", grad, "row", row)


def _check_segments(row: Tensor, grads: list[Tensor | None], segments: Tensor) -> None:
    end = row.numel()
    for index, ((offset, numel), grad) in enumerate(zip(segments.tolist(), grads, strict=True)):
        if offset < 0 or numel < 0 or offset + numel > end:
            raise ValueError(f"segment {index} covers [{offset}, {offset + numel}) of a row of {end} elements")
        if grad is not None and grad.numel() != numel:
            raise ValueError(f"grads[{index}] has {grad.numel()} elements, its segment has {numel}")


def _accumulate_fake(
    row: Tensor,
    sumsq: Tensor,
    grads: list[Tensor | None],
    segments: Tensor,
    decay: float,
    gain: float,
    loss_scale: Tensor | None,
    backend: str,
) -> None:
    _check_accumulate(row, sumsq, grads, segments, loss_scale)


@_define(
    "accumulate_(Tensor(a!) row, Tensor(b!) sumsq, Tensor?[] grads, Tensor segments, float decay, float gain, "
    "Tensor? loss_scale, str backend) -> ()",
    _accumulate_fake,
)
def accumulate_(
    row: Tensor,
    sumsq: Tensor,
    grads: list[Tensor | None],
    segments: Tensor,
    decay: float,
    gain: float,
    loss_scale: Tensor | None,
    backend: str,
) -> None:
    """Gather one task's gradients into its row: EMA update and sum of squares in one pass, no flatten copy.

    ``row[offset : offset + numel] <- decay * row[...] + gain / loss_scale * grads[i]`` for each segment i, then
    ``sumsq <- sum(row[segments] ** 2)``.

    Args:
        row: (row_numel,) float32, bfloat16 or float64; updated in place, between segments left alone.
        sumsq: one float32 or float64 (float64 on a CPU); overwritten.
        grads: a tensor or None (zeros) for each segment; any float dtypes, any shapes of ``numel`` elements, read
            in logical order.
        segments: (n, 2) int64 on the CPU: offset and numel of each segment, not overlapping.
        decay: factor of what is there; with 0 the row is not read.
        gain: factor of the gradients.
        loss_scale: one number that the gradients carry and the state must not; 0 counts the gradients as zeros.
        backend: "auto" or a name.

    Raises:
        ValueError, TypeError, RuntimeError: shapes, dtypes and devices, before anything is written.
    """
    _check_accumulate(row, sumsq, grads, segments, loss_scale)
    _check_segments(row, grads, segments)
    serve = backends.resolve(backend, row.device)
    dense = [None if g is None else g.contiguous().resolve_neg() for g in grads]
    serve.accumulate_(row, sumsq, dense, segments.contiguous(), decay, gain, loss_scale)
    _written(row, sumsq)


# --- combine --------------------------------------------------------------------------------------------------


def _check_combine(rows: Tensor, weights: Tensor, dtype: torch.dtype) -> None:
    _rows_contiguous("rows", rows)
    _one_of("the dtype of rows", rows.dtype, STATE_DTYPES)
    _one_of("the dtype of the result", dtype, GRAD_DTYPES)
    if weights.shape != (rows.shape[0],):
        raise ValueError(f"weights must have shape ({rows.shape[0]},), got {tuple(weights.shape)}")
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights must be floating point, got {weights.dtype}")
    _same_device("weights", weights, "rows", rows)


def _check_out(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    _check_combine(rows, weights, out.dtype)
    if out.shape != (rows.shape[1],) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous of shape ({rows.shape[1]},), got {tuple(out.shape)}")
    _same_device("out", out, "rows", rows)


def _combine_out_fake(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool, backend: str) -> None:
    _check_out(rows, weights, out)


@_define(
    "combine_out(Tensor rows, Tensor weights, Tensor(a!) out, bool accumulate, str backend) -> ()",
    _combine_out_fake,
)
def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool, backend: str) -> None:
    """``out <- (out if accumulate else 0) + sum_t weights[t] * rows[t]``; a row of weight 0 is left out.

    Args:
        rows: (K, P) float32, bfloat16 or float64; each row contiguous, any row stride.
        weights: (K,) floats.
        out: (P,) any float dtype; overwritten, or added to.
        accumulate: add to ``out``.
        backend: "auto" or a name.
    """
    _check_out(rows, weights, out)
    backends.resolve(backend, rows.device).combine_out(_readable(rows), weights, out, accumulate)
    _written(out)


def _combine_fake(rows: Tensor, weights: Tensor, dtype: torch.dtype | None, backend: str) -> Tensor:
    _check_combine(rows, weights, dtype or rows.dtype)
    return rows.new_empty(rows.shape[1], dtype=dtype or rows.dtype)


@_define("combine(Tensor rows, Tensor weights, ScalarType? dtype, str backend) -> Tensor", _combine_fake)
def combine(rows: Tensor, weights: Tensor, dtype: torch.dtype | None, backend: str) -> Tensor:
    """K rows and K weights to one balanced row: (P,) in ``dtype`` (by default that of rows); see `combine_out`."""
    _check_combine(rows, weights, dtype or rows.dtype)
    serve = backends.resolve(backend, rows.device)
    out = torch.empty(rows.shape[1], dtype=dtype or rows.dtype, device=rows.device)
    serve.combine_out(_readable(rows), weights, out, False)
    return out


# --- gramian --------------------------------------------------------------------------------------------------


def _gramian_fake(rows: Tensor, backend: str) -> Tensor:
    _rows_contiguous("rows", rows)
    _one_of("the dtype of rows", rows.dtype, STATE_DTYPES)
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows.new_empty(rows.shape[0], rows.shape[0], dtype=dtype)


@_define("gramian(Tensor rows, str backend) -> Tensor", _gramian_fake)
def gramian(rows: Tensor, backend: str) -> Tensor:
    """``rows @ rows.T``: (K, K) in float32 (float64 of float64) from (K, P), each row contiguous."""
    _rows_contiguous("rows", rows)
    _one_of("the dtype of rows", rows.dtype, STATE_DTYPES)
    return backends.resolve(backend, rows.device).gramian(_readable(rows))
