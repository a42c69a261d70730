"""The C ABI of csrc/include/dbmtl.h, as ctypes sees it: codes, signatures, loading, errors."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import BalanceRows

ABI_VERSION = 4
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SCALES = {"max": 0, "mean": 1, "median": 2, "min": 3, "constant": 4}

_i32, _i64, _u64, _f64, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_double, ctypes.c_void_p
_MATRIX = [_ptr, _i32, _i64, _i64]  # rows, dtype, row stride, K
_WEIGHING = [_f64, _i32, _f64]  # eps, scale, constant
_WHERE = [_i32, _ptr, _ptr]  # num_threads, workspace, stream
# fmt: off
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "dbmtl_abi_version": (_i32, []),
    "dbmtl_available": (_i32, []),
    "dbmtl_last_error": (ctypes.c_char_p, []),
    "dbmtl_workspace_bytes": (_i64, [_i64]),
    "dbmtl_balance": (
        _i32,
        [_ptr, _i32, _i64, _ptr, _i32, _i64, _ptr, _i32, _ptr, _i64, _i64, _f64, *_WEIGHING, _i32, _u64, *_WHERE],
    ),
    "dbmtl_accumulate": (
        _i32, [_ptr, _i32, _i64, _ptr, _ptr, _ptr, _f64, _f64, _ptr, _i32, _ptr, _i32, _u64, _ptr, *_WHERE]
    ),
    "dbmtl_combine": (_i32, [*_MATRIX, _i64, _ptr, _i32, _ptr, _i32, _i32, *_WHERE]),
    "dbmtl_balance_rows": (
        _i32,
        [*_MATRIX, *[_ptr] * 5, _i32, *[_ptr] * 4, _ptr, _ptr, _i32, *_WEIGHING, _i32, _i32, *_WHERE],
    ),
    "dbmtl_gramian": (_i32, [*_MATRIX, _i64, _ptr, _i32, *_WHERE]),
}
# fmt: on
CPU_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "dbmtl_isa": (ctypes.c_char_p, []),
    "dbmtl_set_isa": (_i32, [ctypes.c_char_p]),
    "dbmtl_advise_huge_pages": (None, [_ptr, _i64]),
}


def library_path(name: str) -> Path:
    """Where the library called ``name`` is, or would be."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return Path(__file__).parent.parent / "lib" / f"libdbmtl_{name}{suffix}"


def load(path: Path, signatures: dict[str, tuple[type | None, list[type]]], remedy: str) -> ctypes.CDLL | str:
    """The library at ``path``, or why there is none; ``remedy`` says how to get one."""
    if not path.exists():
        return f"{path.name} was not built: {remedy}"
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"{path.name} could not be loaded: {error}"
    version = library.dbmtl_abi_version()
    if version != ABI_VERSION:
        return f"{path.name} has ABI version {version}, this package needs {ABI_VERSION}: install again"
    return library


def check(library: ctypes.CDLL, status: int, backend: str) -> None:
    """Raise what a status stands for; 0 is none."""
    if status != 0:
        kind = {1: ValueError, 2: TypeError, 3: MemoryError}.get(status, RuntimeError)
        raise kind(f"dbmtl ({backend}): {library.dbmtl_last_error().decode()}")


def rows_arguments(rows: Tensor) -> tuple[int, int, int, int]:
    """Pointer, dtype, row stride and K of a matrix."""
    return rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), rows.shape[0]


def seed_arguments(seed: int | None) -> tuple[int, int]:
    """Whether to round stochastically, and with which seed."""
    return int(seed is not None), (seed or 0) & (2**64 - 1)


def pointer(tensor: Tensor | None) -> int | None:
    """Where it is; null for none."""
    return None if tensor is None else tensor.data_ptr()


def scale_arguments(loss_scale: Tensor | None) -> tuple[int | None, int]:
    """Pointer and dtype of a loss scale."""
    return (None, 0) if loss_scale is None else (loss_scale.data_ptr(), DTYPES[loss_scale.dtype])


def gradient_arguments(grads: list[Tensor | None]) -> tuple[Any, bytes]:
    """Pointers and dtypes of a list of gradients."""
    addresses = (_ptr * len(grads))(*[None if g is None else g.data_ptr() for g in grads])
    codes, f32 = DTYPES, torch.float32
    return addresses, bytes([0 if g is None or g.dtype is f32 else codes[g.dtype] for g in grads])


def step_arguments(step: BalanceRows, loss_scale: Tensor | None) -> list[Any]:
    """Everything of a step but where it runs."""
    n = len(step.outs)
    books = (step.stats.sumsq, step.stats.nonfinite, step.stats.nonfinite_steps, step.stats.norms, step.stats.weights)
    return [
        *rows_arguments(step.rows),
        *[x.data_ptr() for x in books],
        n,
        (_ptr * n)(*[out.data_ptr() for out in step.outs]),
        (_i32 * n)(*[DTYPES[out.dtype] for out in step.outs]),
        (_i64 * n)(*step.starts),
        (_i64 * n)(*[out.numel() for out in step.outs]),
        pointer(step.active),
        *scale_arguments(loss_scale),
        step.eps,
        SCALES[step.scale],
        step.constant,
        int(step.fresh),
        int(step.accumulate),
    ]
