"""The Triton kernels: CUDA tensors, or CPU tensors under ``TRITON_INTERPRET=1``. triton is imported when first used.

`dense` and `rows` hold the kernels, `kernels` and `squares` their parts, `launches` grids and workspaces, `tables` what
is uploaded, `tuning` block sizes, `device` what the driver is asked.
"""

from __future__ import annotations

import importlib.metadata
import os
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

OLDEST = (3, 3)  # the first with cooperative launches
CAPABILITY = (7, 0)  # what Triton compiles for
MOST_TASKS = 64


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
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"Triton needs compute capability 7.0, {device} has less"
    version = _version()
    if version is None:
        return f"triton is not installed: it needs triton >= {OLDEST[0]}.{OLDEST[1]}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is too old: it needs triton >= {OLDEST[0]}.{OLDEST[1]}"
    try:
        launches = _launches()
    except Exception as error:  # whatever a broken installation raises
        return f"triton {version} could not be imported: {error}"
    if device.type != "cpu":  # an interpreter on the host cannot follow the addresses of gradients
        return "TRITON_INTERPRET=1 is set: its interpreter serves CPU tensors only" if launches.INTERPRETED else None
    if not launches.INTERPRETED:
        return "TRITON_INTERPRET=1 must be set before the kernels are first used"
    try:  # triton 3.6's interpreter does not run with numpy 2.4
        one = torch.ones(1, dtype=torch.float32, device="cpu")
        launches.combine_out(one[None], one, torch.zeros_like(one), False)
    except Exception as error:
        return f"the interpreter of triton {version} fails with numpy {np.__version__} ({error}); numpy < 2.4 may help"
    return None


def most_tasks(gramian: bool) -> int | None:
    """As many as the compiled code was looked at for (tests/backends/test_codegen.py)."""
    return MOST_TASKS


def gathers_early(device: torch.device) -> bool:
    """A row is gathered at the end of a backward pass, in one launch."""
    return False


def __getattr__(name: str) -> Any:
    """The functions of `backends.Backend`, from `launches`, which is imported when one is first called."""
    if name in ("balance_", "accumulate_", "any_nonzero", "combine_out", "balance_rows_", "gramian"):
        found = globals()[name] = getattr(_launches(), name)
        return found
    raise AttributeError(name)
