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

from . import backends, validation
from .backends.engine_step import EngineStep

_LIBRARY = torch.library.Library("dbmtl_kernels", "DEF")

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


# --- balance_ -------------------------------------------------------------------------------------------------


def _balance_fake(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, seed: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    validation.check_balance(grads, ema, beta, eps, scale, constant, seed)
    norm_dtype = torch.float64 if ema.dtype == torch.float64 else torch.float32
    return grads.new_empty(grads.shape[1]), ema.new_empty(ema.shape[0], dtype=norm_dtype)


@_define(
    "balance_(Tensor grads, Tensor(a!) ema, float beta, float eps, str scale, float constant, int? seed, "
    "str backend) -> (Tensor, Tensor)",
    _balance_fake,
)
def balance_(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, seed: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    """See `functional.balance_`; scale "constant" takes alpha from ``constant``."""
    validation.check_balance(grads, ema, beta, eps, scale, constant, seed)
    serve = backends.resolve(backend, ema.device, ema.shape[0])
    result = serve.balance_(_readable(grads), ema, beta, eps, scale, constant, seed)
    _written(ema)
    return result


# --- accumulate_ ----------------------------------------------------------------------------------------------


def _accumulate_fake(
    row: Tensor,
    sumsq: Tensor,
    grads: list[Tensor | None],
    segments: Tensor,
    decay: float,
    gain: float,
    loss_scale: Tensor | None,
    seed: int | None,
    backend: str,
    coefficients: Tensor | None = None,
) -> None:
    validation.check_accumulate(row, sumsq, grads, segments, loss_scale, seed, coefficients)


@_define(
    "accumulate_(Tensor(a!) row, Tensor(b!) sumsq, Tensor?[] grads, Tensor segments, float decay, float gain, "
    "Tensor? loss_scale, int? seed, str backend, Tensor? coefficients=None) -> ()",
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
    seed: int | None,
    backend: str,
    coefficients: Tensor | None = None,
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
        seed: of the stochastic rounding of a bfloat16 row (`rounding`); None rounds to nearest.
        backend: "auto" or a name.
        coefficients: (3,) float64 on the row's device, or None: decay, gain, and the seed's 64 bits
            (``torch.tensor([seed]).view(torch.float64)``). They replace those given, and are read by the kernel when it
            runs, so that a replayed CUDA graph sees new ones; ``seed`` then only says whether to round stochastically.

    Raises:
        ValueError, TypeError, RuntimeError: shapes, dtypes and devices, before anything is written.
    """
    validation.check_accumulate(row, sumsq, grads, segments, loss_scale, seed, coefficients)
    validation.check_segments(row, grads, segments)
    serve = backends.resolve(backend, row.device)
    dense = [None if g is None else g.contiguous().resolve_neg() for g in grads]
    serve.accumulate_(row, sumsq, dense, segments.contiguous(), decay, gain, loss_scale, seed, coefficients)
    _written(row, sumsq)


# --- balance_rows_ --------------------------------------------------------------------------------------------


def _balance_rows_fake(
    rows: Tensor,
    sumsq: Tensor,
    broken: Tensor,
    nonfinite_steps: Tensor,
    norms: Tensor,
    weights: Tensor,
    outs: list[Tensor],
    starts: list[int],
    active: Tensor | None,
    loss_scale: Tensor | None,
    eps: float,
    scale: str,
    constant: float,
    fresh: bool,
    accumulate: bool,
    backend: str,
) -> None:
    books = {"sumsq": sumsq, "nonfinite_steps": nonfinite_steps, "norms": norms, "weights": weights, "broken": broken}
    validation.check_balance_rows(rows, books, outs, starts, active, loss_scale, eps, scale)


@_define(
    "balance_rows_(Tensor(a!) rows, Tensor(b!) sumsq, Tensor(c!) broken, Tensor(d!) nonfinite_steps, "
    "Tensor(e!) norms, Tensor(f!) weights, Tensor(g!)[] outs, int[] starts, Tensor? active, Tensor? loss_scale, "
    "float eps, str scale, float constant, bool fresh, bool accumulate, str backend) -> ()",
    _balance_rows_fake,
)
def balance_rows_(
    rows: Tensor,
    sumsq: Tensor,
    broken: Tensor,
    nonfinite_steps: Tensor,
    norms: Tensor,
    weights: Tensor,
    outs: list[Tensor],
    starts: list[int],
    active: Tensor | None,
    loss_scale: Tensor | None,
    eps: float,
    scale: str,
    constant: float,
    fresh: bool,
    accumulate: bool,
    backend: str,
) -> None:
    """The end of an engine step, in one launch on a GPU: sums of squares to weights to the balanced gradient.

    A task whose sum of squares is not finite is broken for the whole step: weight 0, its row and its sum are set to
    zero, counted once. ``weights = alpha / (sqrt(sumsq) + eps)``, then
    ``outs[i] <- (outs[i] if accumulate else 0) + loss_scale * sum_t weights[t] * rows[t, starts[i] :]``.

    Args:
        rows: (K, P) float32, bfloat16 or float64; those of broken tasks are set to zero in the columns of ``outs``.
        sumsq: (K,) float32 or float64, sums of squares of the rows; set to zero where broken.
        broken: (K,) bool, the tasks found broken earlier in this step; updated.
        nonfinite_steps: (K,) int64; counts a task that breaks.
        norms: (K,) float, overwritten with the norms (not finite where broken now).
        weights: (K,) float, overwritten with the weights, without the loss scale.
        outs: 1 to 4 flat tensors of any float dtypes; overwritten, or added to.
        starts: the first column of each.
        active: (K,) bool, the tasks that have a say; None for all.
        loss_scale: one number that ``outs`` shall carry. If it is above 1, ``outs`` is NaN where a task is broken, for
            a GradScaler to see.
        eps: added to the norms.
        scale: alpha, see `weighting.max_norm_weights`; "constant" takes it from ``constant``.
        constant: alpha.
        fresh: the first call of a step: what is in ``broken`` is of an earlier one.
        accumulate: add to ``outs``.
        backend: "auto" or a name.
    """
    _balance_rows_fake(
        rows, sumsq, broken, nonfinite_steps, norms, weights, outs, starts, active, loss_scale, eps, scale, constant,
        fresh, accumulate, backend,
    )  # fmt: skip
    step = EngineStep(
        rows, sumsq, broken, nonfinite_steps, norms, weights, outs, starts, active, loss_scale, eps, scale, constant,
        fresh, accumulate,
    )  # fmt: skip
    backends.resolve(backend, rows.device, rows.shape[0]).balance_rows_(step)
    _written(rows, sumsq, broken, nonfinite_steps, norms, weights, *outs)


# --- combine --------------------------------------------------------------------------------------------------


def _combine_out_fake(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool, backend: str) -> None:
    validation.check_out(rows, weights, out)


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
    validation.check_out(rows, weights, out)
    backends.resolve(backend, rows.device, rows.shape[0]).combine_out(_readable(rows), weights, out, accumulate)
    _written(out)


def _combine_fake(rows: Tensor, weights: Tensor, dtype: torch.dtype | None, backend: str) -> Tensor:
    validation.check_combine(rows, weights, dtype or rows.dtype)
    return rows.new_empty(rows.shape[1], dtype=dtype or rows.dtype)


@_define("combine(Tensor rows, Tensor weights, ScalarType? dtype, str backend) -> Tensor", _combine_fake)
def combine(rows: Tensor, weights: Tensor, dtype: torch.dtype | None, backend: str) -> Tensor:
    """K rows and K weights to one balanced row: (P,) in ``dtype`` (by default that of rows); see `combine_out`."""
    validation.check_combine(rows, weights, dtype or rows.dtype)
    serve = backends.resolve(backend, rows.device, rows.shape[0])
    out = torch.empty(rows.shape[1], dtype=dtype or rows.dtype, device=rows.device)
    serve.combine_out(_readable(rows), weights, out, False)
    return out


# --- gramian --------------------------------------------------------------------------------------------------


def _gramian_fake(rows: Tensor, backend: str) -> Tensor:
    validation.check_rows("rows", rows)
    validation.check_dtype("the dtype of rows", rows.dtype, validation.STATE_DTYPES)
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows.new_empty(rows.shape[0], rows.shape[0], dtype=dtype)


@_define("gramian(Tensor rows, str backend) -> Tensor", _gramian_fake)
def gramian(rows: Tensor, backend: str) -> Tensor:
    """``rows @ rows.T``: (K, K) in float32 (float64 of float64) from (K, P), each row contiguous."""
    validation.check_rows("rows", rows)
    validation.check_dtype("the dtype of rows", rows.dtype, validation.STATE_DTYPES)
    return backends.resolve(backend, rows.device, rows.shape[0], gramian=True).gramian(_readable(rows))
