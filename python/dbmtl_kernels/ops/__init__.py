"""The one door to every kernel: checked entry points, and `balance_` as a torch op.

In: tensors and numbers from anyone. Out: tensors updated in place, by the backend that serves their device. Whatever
is wrong is raised before anything is written. Nothing here is differentiable. Knows rows and K, but no parameters, no
losses and no optimizer.

`balance_` is ``torch.ops.dbmtl_kernels.balance_``, registered with `torch.library.Library` (about 2 us a call, where
``custom_op`` costs 11), so that ``torch.compile`` sees one node; where nobody looks (`unseen`) it is called directly.
The rest runs inside a backward pass, where nothing is traced.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _dispatch_keys,
    _dispatch_tls_local_include_set,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.nn.utils import get_total_norm

from .. import backends
from ..backends.arguments import BalanceRows, Coefficients, Stats
from ..backends.memory import one_thread_if_forked, upload
from . import arguments

__all__ = [
    "BalanceRows",
    "Coefficients",
    "Stats",
    "accumulate_",
    "allocate",
    "any_nonzero",
    "balance_",
    "balance_rows_",
    "combine",
    "combine_out",
    "gathers_early",
    "gramian",
    "one_thread_if_forked",
    "unseen",
    "upload",
]


def gathers_early(backend: str, device: torch.device, num_tasks: int) -> bool:
    """Whether `accumulate_` is best called while a backward pass runs, a few gradients at a time."""
    return backends.resolve(backend, device, num_tasks).gathers_early(device)


@one_thread_if_forked()
def allocate(*shape: int, dtype: torch.dtype, device: torch.device, zero: bool = False) -> Tensor:
    """An empty (or zeroed) tensor; on a CPU with huge pages under it where that helps."""
    out = torch.empty(*shape, dtype=dtype, device=device)
    backends.native.advise_huge_pages(out)
    return out.zero_() if zero else out


def balance_(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The op behind `functional.balance_`; scale "constant" takes alpha from ``constant``."""
    arguments.check_balance(grads, ema, beta, eps, scale, constant)
    serve = backends.resolve(backend, ema.device, ema.shape[0])
    result = serve.balance_(_readable(grads), ema, beta, eps, scale, constant)
    _count_write(ema)
    return result


_balance = balance_  # what the op calls


def _balance_fake(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, backend: str
) -> tuple[Tensor, Tensor]:
    arguments.check_balance(grads, ema, beta, eps, scale, constant)
    norm_dtype = torch.float64 if ema.dtype == torch.float64 else torch.float32
    return grads.new_empty(grads.shape[1]), ema.new_empty(ema.shape[0], dtype=norm_dtype)


def _newest(name: str, _library: torch.library.Library, *args: Any) -> Any:
    """Call what is of this name in the module as it was last loaded; whoever holds this holds the library."""
    return getattr(sys.modules[__name__], name)(*args)


if not hasattr(torch.ops.dbmtl_kernels, "balance_"):  # a module that is loaded again finds it
    _library = torch.library.Library("dbmtl_kernels", "DEF")
    _library.define(
        "balance_(Tensor grads, Tensor(a!) ema, float beta, float eps, str scale, float constant, str backend) "
        "-> (Tensor, Tensor)",
        # Counters and scratch outlive a call: they must not lie in the memory of a graph that torch.compile makes.
        tags=[torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else (),
    )
    _library.impl("balance_", partial(_newest, "_balance", _library), "CompositeExplicitAutograd")
    torch.library.register_fake("dbmtl_kernels::balance_", partial(_newest, "_balance_fake", _library), lib=_library)

# What every call goes through where nobody else looks at tensor operations: no mode, tracer or transformation.
_UNSEEN = DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)
_plain: dict[str, DispatchKeySet] = {}


def unseen(grads: Tensor, ema: Tensor) -> bool:
    """Whether only kernels would see an operation on these, so that it need not go through PyTorch's dispatcher.

    Not where something traces, transforms or records (torch.compile, a mode, a fake tensor, functorch, a profiler), nor
    for a tensor whose memory does not hold its numbers (a subclass, a lazy negation).
    """
    if (
        is_compiling()
        or _len_torch_function_stack()
        or _profiler_enabled()
        or _dispatch_tls_local_include_set() != _UNSEEN
        or not type(grads) is type(ema) is Tensor
    ):
        return False
    kind = "cpu" if ema.is_cpu else ema.device.type  # the first is five times faster
    if kind == "meta":
        return False
    plain = _plain.get(kind)
    if plain is None:
        plain = _plain[kind] = _dispatch_keys(torch.empty(0, dtype=torch.float32, device=kind))
    return bool(_dispatch_keys(ema) == plain and _dispatch_keys(grads) == plain)


def accumulate_(
    row: Tensor | None,
    sumsq: Tensor,
    grads: list[Tensor | None],
    segments: Tensor,
    coefficients: Coefficients,
    loss_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Gather one task's gradients into its row: EMA update and sum of squares in one pass, no flatten copy.

    ``row[offset : offset + numel] <- decay * row[...] + gain / loss_scale * grads[i]`` for each segment i, then
    ``sumsq <- sum(row[segments] ** 2)``.

    Args:
        row: (row_numel,) float32, bfloat16 or float64; updated in place, between segments left alone. None: nothing is
            stored, and ``sumsq`` is that of ``gain / loss_scale * grads``, in float32 arithmetic (float64 if one of
            ``grads`` is of it); of the segments only the numels matter.
        sumsq: one float64 (float32 on a device that has no float64); overwritten.
        grads: a tensor or None (zeros) for each segment; any float dtypes, any shapes of ``numel`` elements, read
            in logical order.
        segments: (n, 2) int64 on the CPU: offset and numel of each segment, not overlapping.
        coefficients: decay and gain, as two numbers, or as (2,) in the dtype of ``sumsq`` on the row's device: those a
            kernel reads when it runs, so that a replayed CUDA graph sees new ones. With a decay of 0 what was in the
            row does not count, with a gain of 0 the gradients, NaN included.
        loss_scale: one number that the gradients carry and the state must not; 0 is a gain of 0.
        backend: "auto" or a name.

    Raises:
        ValueError, TypeError, RuntimeError: shapes, dtypes and devices, before anything is written.
    """
    given = arguments.check_accumulate(row, sumsq, grads, segments, coefficients, loss_scale)
    serve = backends.resolve(backend, sumsq.device)
    serve.accumulate_(row, sumsq, given, segments.contiguous(), coefficients, loss_scale)
    _count_write(*(() if row is None else (row,)), sumsq)


def any_nonzero(grads: Sequence[Tensor], backend: str = "auto") -> Tensor:
    """(1,) bool on the gradients' one device, without a sync: whether any element is not zero; NaN is not.

    None of them may be empty. On a GPU `triton` reads no more of them than it takes to know.
    """
    serve = backends.resolve(backend, grads[0].device)
    if serve is backends.get("triton") and all(grad.dtype in arguments.GRAD_DTYPES for grad in grads):
        found: Tensor = backends.triton.any_nonzero(grads)
        return found
    return (get_total_norm(grads, math.inf) != 0).reshape(1)


def balance_rows_(step: BalanceRows, backend: str = "auto") -> None:
    """The end of an engine step, in one launch on a GPU: sums of squares to weights to the balanced gradient.

    A task whose sum of squares is not finite sits out the whole step: weight 0, its row and its sum are set to zero,
    counted once. ``weights = alpha / (sqrt(sumsq) + eps)``, then
    ``outs[i] <- (outs[i] if accumulate else 0) + loss_scale * sum_t weights[t] * rows[t, starts[i] :]``.

    Args:
        step: with

            - rows: (K, P) float32, bfloat16 or float64; those of nonfinite tasks are set to zero in the columns of
              ``outs``.
            - stats: ``sumsq`` of the rows, set to zero where nonfinite; ``nonfinite``, the tasks found earlier in this
              step, updated; ``nonfinite_steps``, counts a task once a step; ``norms`` (not finite where the gradient
              was not) and ``weights`` (without the loss scale), overwritten.
            - outs: 1 to 4 flat tensors of any float dtypes; overwritten, or added to.
            - starts: the first column of each.
            - active: (K,) bool, the tasks that have a say; None for all.
            - loss_scale: one number that ``outs`` shall carry; None is 1.
            - propagate_above: ``outs`` is NaN where an active task is nonfinite and the loss scale is above this
              number: with 1.0 for a GradScaler to see, with inf never, with -1.0 always. A nonfinite task that is not
              active is never passed on.
            - eps, scale, constant: see `reference.weights`; scale "constant" takes alpha from ``constant``.
            - fresh: the first call of a step: what is in ``nonfinite`` is of an earlier one.
            - accumulate: add to ``outs``.
        backend: "auto" or a name.

    Raises:
        ValueError, TypeError, RuntimeError: shapes, dtypes and devices, before anything is written.
    """
    arguments.check_balance_rows(step)
    backends.resolve(backend, step.rows.device, step.rows.shape[0]).balance_rows_(step)
    _count_write(step.rows, *step.stats, *step.outs)


def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool = False, backend: str = "auto") -> None:
    """``out <- (out if accumulate else 0) + sum_t weights[t] * rows[t]``; a row of weight 0 is left out.

    Args:
        rows: (K, P) float32, bfloat16 or float64; each row contiguous, any row stride.
        weights: (K,) floats.
        out: (P,) any float dtype; overwritten, or added to.
        accumulate: add to ``out``.
        backend: "auto" or a name.
    """
    arguments.check_combine(rows, weights, out)
    backends.resolve(backend, rows.device, rows.shape[0]).combine_out(_readable(rows), weights, out, accumulate)
    _count_write(out)


def combine(rows: Tensor, weights: Tensor, dtype: torch.dtype | None = None, backend: str = "auto") -> Tensor:
    """K rows and K weights to one balanced row: (P,) in ``dtype`` (by default that of rows); see `combine_out`."""
    arguments.check_rows(rows)
    out = torch.empty(rows.shape[1], dtype=dtype or rows.dtype, device=rows.device)
    combine_out(rows, weights, out, False, backend)
    return out


def gramian(rows: Tensor, backend: str = "auto") -> Tensor:
    """``rows @ rows.T``: (K, K) in float32 (float64 of float64) from (K, P), each row contiguous."""
    arguments.check_rows(rows)
    return backends.resolve(backend, rows.device, rows.shape[0], gramian=True).gramian(_readable(rows))


def _readable(rows: Tensor) -> Tensor:
    """``rows``, or a copy where rows overlap or are not contiguous, as expanded and transposed ones do."""
    if rows.is_contiguous():
        return rows
    num_tasks, num_params = rows.shape
    ok = (num_params <= 1 or rows.stride(1) == 1) and (num_tasks <= 1 or rows.stride(0) >= num_params)
    return rows if ok else rows.detach().contiguous()


def _count_write(*tensors: Tensor) -> None:
    """Tell autograd that these were changed: a graph that saved one must not use it unawares."""
    for tensor in tensors:
        if not tensor.is_inference():
            increment_version(tensor)
