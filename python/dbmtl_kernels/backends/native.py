"""The CPU kernels of csrc/cpu, called through their C ABI with ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import abi
from .arguments import BalanceRows, Coefficients

# Fresh memory of this size and more is worth a system call for huge pages.
HUGE_BYTES = 8 << 20


def library_path() -> Path:
    """Where the library is, or would be."""
    return abi.library_path("cpu")


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    remedy = "install again with a C++17 compiler on the PATH (or CXX set)"
    return abi.load(library_path(), {**abi.SIGNATURES, **abi.CPU_SIGNATURES}, remedy)


def _library() -> ctypes.CDLL:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def missing(device: torch.device) -> str | None:
    """Why this backend cannot serve tensors on ``device``; None if it can."""
    if device.type != "cpu":
        return "it serves CPU tensors only"
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def most_tasks(gramian: bool) -> int | None:
    """Any number."""
    return None


def gathers_early(device: torch.device) -> bool:
    """A gradient is still in cache while the backward pass runs."""
    return True


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline"."""
    return str(_library().dbmtl_isa().decode())


def set_isa(name: str | None) -> None:
    """Use another instruction set; None goes back to the best one. Same bits, other speed.

    Raises:
        ValueError: this machine does not have it.
    """
    _check(_library().dbmtl_set_isa(None if name is None else name.encode()))


def _check(status: int) -> None:
    if status != 0:
        abi.check(_library(), status, "native")


def _where() -> tuple[int, None, None]:
    """Threads; no workspace and no stream."""
    return torch.get_num_threads(), None, None


def advise_huge_pages(buffer: Tensor) -> None:
    """Ask for huge pages under a fresh CPU buffer, if it is large and the library is there."""
    num_bytes = buffer.numel() * buffer.element_size()
    loaded = _load()
    if num_bytes >= HUGE_BYTES and buffer.device.type == "cpu" and not isinstance(loaded, str):
        loaded.dbmtl_advise_huge_pages(buffer.data_ptr(), num_bytes)


def balance_(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float
) -> tuple[Tensor, Tensor]:
    """See `functional.balance_`."""
    num_tasks, num_params = ema.shape
    out = torch.empty(num_params, dtype=grads.dtype)
    advise_huge_pages(out)
    norms = torch.empty(num_tasks, dtype=torch.float64 if ema.dtype == torch.float64 else torch.float32)
    _check(
        _library().dbmtl_balance(
            *abi.rows_arguments(grads)[:3], *abi.rows_arguments(ema)[:3], out.data_ptr(), abi.DTYPES[out.dtype],
            norms.data_ptr(), num_tasks, num_params, beta, eps, abi.SCALES[scale], constant,
            0, 0, *_where(),
        )
    )  # fmt: skip
    return out, norms


def accumulate_(
    row: Tensor,
    sumsq: Tensor,
    grads: list[Tensor | None],
    segments: Tensor,
    coefficients: Coefficients,
    loss_scale: Tensor | None,
) -> None:
    """See `ops.accumulate_`."""
    held = coefficients if isinstance(coefficients, Tensor) else torch.tensor(coefficients, dtype=torch.float64)
    held = torch.cat([held, held[:1]]).to(row.device)
    total = sumsq if sumsq.dtype == torch.float64 else torch.empty(1, dtype=torch.float64)
    _check(
        _library().dbmtl_accumulate(
            row.data_ptr(), abi.DTYPES[row.dtype], len(grads), segments.data_ptr(), *abi.gradient_arguments(grads),
            1.0, 1.0, *abi.scale_arguments(_floating(loss_scale)), total.data_ptr(), 0, 0,
            held.data_ptr(), *_where(),
        )
    )  # fmt: skip
    if total is not sumsq:
        sumsq.copy_(total)


def _floating(loss_scale: Tensor | None) -> Tensor | None:
    known = loss_scale is None or (loss_scale.device.type == "cpu" and loss_scale.dtype in abi.DTYPES)
    return loss_scale if known or loss_scale is None else loss_scale.to("cpu", torch.float64)


def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
    """See `ops.combine_out`."""
    weights = weights.contiguous()
    _check(
        _library().dbmtl_combine(
            *abi.rows_arguments(rows), rows.shape[1], weights.data_ptr(), abi.DTYPES[weights.dtype], out.data_ptr(),
            abi.DTYPES[out.dtype], int(accumulate), *_where(),
        )
    )  # fmt: skip


def balance_rows_(step: BalanceRows) -> None:
    """See `ops.balance_rows_`."""
    factor = _floating(step.loss_scale)  # a name, as only its address is passed on
    _check(_library().dbmtl_balance_rows(*abi.step_arguments(step, factor), *_where()))


def gramian(rows: Tensor) -> Tensor:
    """See `ops.gramian`."""
    num_tasks = rows.shape[0]
    out = torch.empty(num_tasks, num_tasks, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32)
    _check(
        _library().dbmtl_gramian(
            *abi.rows_arguments(rows), rows.shape[1], out.data_ptr(), abi.DTYPES[out.dtype], *_where()
        )
    )
    return out
