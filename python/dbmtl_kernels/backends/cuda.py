"""The CUDA kernels of csrc/cuda, called through their C ABI with ctypes: CUDA tensors, the current stream."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import abi
from .arguments import BalanceRows, Coefficients

SERVES = "cuda"  # the type of device; tests run the kernels emulated on "cpu"


def library_path() -> Path:
    """Where the library is, or would be."""
    return abi.library_path("cuda")


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none or it cannot run here."""
    loaded = abi.load(
        library_path(), abi.SIGNATURES, "install again with nvcc >= 12.4 on the PATH (DBMTL_BUILD_CUDA=1)"
    )
    if not isinstance(loaded, str) and loaded.dbmtl_available() != 0:
        return str(loaded.dbmtl_last_error().decode())
    return loaded


def _library() -> ctypes.CDLL:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def missing(device: torch.device) -> str | None:
    """Why this backend cannot serve tensors on ``device``; None if it can."""
    if device.type != SERVES:
        return "it serves CUDA tensors only"
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def most_tasks(gramian: bool) -> int | None:
    """As csrc/cuda has it: kMaxTasks, and kMaxRows of the Gramian."""
    return 64 if gramian else 256


def gathers_early(device: torch.device) -> bool:
    """A row is gathered at the end of a backward pass, in one launch."""
    return False


def _check(status: int) -> None:
    if status != 0:
        abi.check(_library(), status, "cuda")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """The library launches on the current device: make it the tensors' own."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _where(device: torch.device, num_tasks: int) -> tuple[int, int, int]:
    """No threads; the workspace of the current stream, and that stream. A captured call gets a workspace of its own."""
    if device.type != "cuda":
        stream, captured = 0, False
    else:
        stream, captured = torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
    needed = _library().dbmtl_workspace_bytes(num_tasks)
    found = None if captured else _workspaces.get((device, stream))
    if found is None or found.numel() < needed:
        found = torch.zeros(needed, dtype=torch.uint8, device=device)
        if not captured:
            _workspaces[device, stream] = found
    return 0, found.data_ptr(), stream


def balance_(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float
) -> tuple[Tensor, Tensor]:
    """See `functional.balance_`: one cooperative launch."""
    num_tasks, num_params = ema.shape
    device = ema.device
    out = torch.empty(num_params, dtype=grads.dtype, device=device)
    norms = torch.empty(num_tasks, dtype=torch.float64 if ema.dtype == torch.float64 else torch.float32, device=device)
    with _on(device):
        _check(
            _library().dbmtl_balance(
                *abi.rows_arguments(grads)[:3], *abi.rows_arguments(ema)[:3], out.data_ptr(), abi.DTYPES[out.dtype],
                norms.data_ptr(), num_tasks, num_params, beta, eps, abi.SCALES[scale], constant,
                0, 0, *_where(device, num_tasks),
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
    """See `ops.accumulate_`: one launch for each thousand parameters (with an older driver, each hundred)."""
    device = row.device
    held = coefficients if isinstance(coefficients, Tensor) else torch.tensor(coefficients, dtype=torch.float64)
    held = torch.cat([held, held[:1]]).to(row.device)
    total = sumsq if sumsq.dtype == torch.float64 else torch.empty(1, dtype=torch.float64, device=device)
    factor = _known(loss_scale, device)  # a name, as only its address is passed on
    with _on(device):
        _check(
            _library().dbmtl_accumulate(
                row.data_ptr(), abi.DTYPES[row.dtype], len(grads), segments.data_ptr(),
                *abi.gradient_arguments(grads), 1.0, 1.0, *abi.scale_arguments(factor), total.data_ptr(),
                0, 0, held.data_ptr(), *_where(device, 1),
            )
        )  # fmt: skip
    if total is not sumsq:
        sumsq.copy_(total)


def _known(loss_scale: Tensor | None, device: torch.device) -> Tensor | None:
    if loss_scale is None or (loss_scale.device == device and loss_scale.dtype in abi.DTYPES):
        return loss_scale
    return loss_scale.to(device, torch.float64)


def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
    """See `ops.combine_out`: one launch."""
    weights = weights.contiguous()
    with _on(rows.device):
        _check(
            _library().dbmtl_combine(
                *abi.rows_arguments(rows), rows.shape[1], weights.data_ptr(), abi.DTYPES[weights.dtype],
                out.data_ptr(), abi.DTYPES[out.dtype], int(accumulate), *_where(rows.device, rows.shape[0]),
            )
        )  # fmt: skip


def balance_rows_(step: BalanceRows) -> None:
    """See `ops.balance_rows_`: one launch for all of it."""
    device = step.rows.device
    factor = _known(step.loss_scale, device)
    with _on(device):
        arguments = abi.step_arguments(step, factor)
        _check(_library().dbmtl_balance_rows(*arguments, *_where(device, step.rows.shape[0])))


def gramian(rows: Tensor) -> Tensor:
    """See `ops.gramian`: one launch, at most 64 tasks."""
    num_tasks, device = rows.shape[0], rows.device
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.empty(num_tasks, num_tasks, dtype=dtype, device=device)
    with _on(device):
        _check(
            _library().dbmtl_gramian(
                *abi.rows_arguments(rows), rows.shape[1], out.data_ptr(), abi.DTYPES[dtype],
                *_where(device, num_tasks),
            )
        )  # fmt: skip
    return out
