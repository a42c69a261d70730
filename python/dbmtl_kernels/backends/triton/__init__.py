"""The Triton kernels: CUDA tensors, or CPU tensors under ``TRITON_INTERPRET=1``. triton is imported when first used.

`dense` and `rows` hold the kernels, `launches` grids and workspaces, `tables` what is uploaded, `tuning` block sizes,
`device` what the driver is asked.
"""

from __future__ import annotations

import importlib.metadata
import os
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

OLDEST = (3, 3)  # the first with cooperative launches


@cache
def _launches() -> ModuleType:
    from . import launches

    return launches


def _version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing(device: torch.device) -> str | None:
    """Why this backend cannot serve tensors on ``device``; None if it can."""
    if device.type == "cpu" and not _interpreted():
        return "it serves CUDA tensors, and CPU tensors only under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return "it serves CUDA tensors only"
    if torch.version.hip is not None:
        return "it is made for NVIDIA GPUs, this torch is for AMD ones"
    version = _version()
    if version is None:
        return f"triton is not installed: it needs triton >= {OLDEST[0]}.{OLDEST[1]}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is too old: it needs triton >= {OLDEST[0]}.{OLDEST[1]}"
    try:
        launches = _launches()
    except Exception as error:  # whatever a broken installation raises
        return f"triton {version} could not be imported: {error}"
    if device.type != "cpu":
        return None
    if not launches.INTERPRETED:
        return "TRITON_INTERPRET=1 must be set before the kernels are first used"
    try:  # triton 3.6's interpreter does not run with numpy 2.4
        launches.combine_out(torch.ones(1, 1), torch.ones(1), torch.zeros(1), False)
    except Exception as error:
        return f"the interpreter of triton {version} fails with numpy {np.__version__} ({error}); numpy < 2.4 may help"
    return None


def gathers_early(device: torch.device) -> bool:
    """A row is gathered at the end of a backward pass, in one launch."""
    return False


def balance_(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, seed: int | None
) -> tuple[Tensor, Tensor]:
    """See `functional.balance_`."""
    out: tuple[Tensor, Tensor] = _launches().balance_(grads, ema, beta, eps, scale, constant, seed)
    return out


def accumulate_(
    row: Tensor,
    sumsq: Tensor,
    grads: list[Tensor | None],
    segments: Tensor,
    decay: float,
    gain: float,
    loss_scale: Tensor | None,
    seed: int | None,
) -> None:
    """See `ops.accumulate_`."""
    _launches().accumulate_(row, sumsq, grads, segments, decay, gain, loss_scale, seed)


def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
    """See `ops.combine_out`."""
    _launches().combine_out(rows, weights, out, accumulate)


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
) -> None:
    """See `ops.balance_rows_`."""
    _launches().balance_rows_(
        rows, sumsq, broken, nonfinite_steps, norms, weights, outs, starts, active, loss_scale, eps, scale, constant,
        fresh, accumulate,
    )  # fmt: skip


def gramian(rows: Tensor) -> Tensor:
    """See `ops.gramian`."""
    out: Tensor = _launches().gramian(rows)
    return out
