"""The CPU kernels of csrc/cpu, called through their C ABI (csrc/include/dbmtl.h) with ctypes."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import eager

ABI_VERSION = 2
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SCALES = {"max": 0, "mean": 1, "median": 2, "min": 3, "constant": 4}
# Fresh memory of this size and more is worth a system call for huge pages.
HUGE_BYTES = 8 << 20

_i32, _i64, _u64, _f64, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_double, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "dbmtl_abi_version": (_i32, []),
    "dbmtl_isa": (ctypes.c_char_p, []),
    "dbmtl_set_isa": (_i32, [ctypes.c_char_p]),
    "dbmtl_last_error": (ctypes.c_char_p, []),
    "dbmtl_advise_huge_pages": (None, [_ptr, _i64]),
    "dbmtl_balance": (
        _i32,
        [
            _ptr,
            _i32,
            _i64,
            _ptr,
            _i32,
            _i64,
            _ptr,
            _i32,
            _ptr,
            _i64,
            _i64,
            _f64,
            _f64,
            _i32,
            _f64,
            _i32,
            _u64,
            _i32,
            _ptr,
        ],
    ),
    "dbmtl_accumulate": (_i32, [_ptr, _i32, _i64, _ptr, _ptr, _ptr, _f64, _f64, _ptr, _i32, _u64, _i32, _ptr]),
    "dbmtl_combine": (_i32, [_ptr, _i32, _i64, _i64, _i64, _ptr, _ptr, _i32, _i32, _i32, _ptr]),
    "dbmtl_gramian": (_i32, [_ptr, _i32, _i64, _i64, _i64, _ptr, _i32, _ptr]),
}


def library_path() -> Path:
    """Where the library is, or would be."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return Path(__file__).parent.parent / "lib" / f"libdbmtl_cpu{suffix}"


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    path = library_path()
    if not path.exists():
        return f"{path.name} was not built: install again with a C++17 compiler on the PATH (or CXX set)"
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"{path.name} could not be loaded: {error}"
    version = library.dbmtl_abi_version()
    if version != ABI_VERSION:
        return f"{path.name} has ABI version {version}, this package needs {ABI_VERSION}: install again"
    return library


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


def gathers_early(device: torch.device) -> bool:
    """A gradient is still in cache while the backward pass runs."""
    return True


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline"."""
    return str(_library().dbmtl_isa().decode())


def set_isa(name: str | None) -> None:
    """Use another instruction set; None goes back to the best one. Same bits, other speed.

    Raises:
        RuntimeError: this machine does not have it.
    """
    _check(_library().dbmtl_set_isa(None if name is None else name.encode()))


def _check(status: int) -> None:
    if status == 0:
        return
    message = _library().dbmtl_last_error().decode()
    kind = {1: ValueError, 2: TypeError, 3: MemoryError}.get(status, RuntimeError)
    raise kind(f"dbmtl (native): {message}")


def _rounding(seed: int | None) -> tuple[int, int]:
    """The arguments ``stochastic`` and ``seed``."""
    return (0, 0) if seed is None else (1, seed & (2**64 - 1))


def advise_huge_pages(buffer: Tensor) -> None:
    """Ask for huge pages under a fresh CPU buffer, if it is large and the library is there."""
    num_bytes = buffer.numel() * buffer.element_size()
    loaded = _load()
    if num_bytes >= HUGE_BYTES and buffer.device.type == "cpu" and not isinstance(loaded, str):
        loaded.dbmtl_advise_huge_pages(buffer.data_ptr(), num_bytes)


def balance_(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, seed: int | None
) -> tuple[Tensor, Tensor]:
    """See `functional.balance_`."""
    num_tasks, num_params = ema.shape
    out = torch.empty(num_params, dtype=grads.dtype)
    advise_huge_pages(out)
    norms = torch.empty(num_tasks, dtype=torch.float64 if ema.dtype == torch.float64 else torch.float32)
    _check(
        _library().dbmtl_balance(
            grads.data_ptr(),
            DTYPES[grads.dtype],
            grads.stride(0),
            ema.data_ptr(),
            DTYPES[ema.dtype],
            ema.stride(0),
            out.data_ptr(),
            DTYPES[out.dtype],
            norms.data_ptr(),
            num_tasks,
            num_params,
            beta,
            eps,
            SCALES[scale],
            constant,
            *_rounding(seed),
            torch.get_num_threads(),
            None,
        )
    )
    return out, norms


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
    if loss_scale is not None:
        factor = float(loss_scale)
        gain = gain / factor if factor != 0.0 else 0.0
    n = len(grads)
    addresses = (_ptr * n)(*[None if g is None else g.data_ptr() for g in grads])
    codes, f32 = DTYPES, torch.float32
    dtypes = bytes([0 if g is None or g.dtype is f32 else codes[g.dtype] for g in grads])
    _check(
        _library().dbmtl_accumulate(
            row.data_ptr(),
            DTYPES[row.dtype],
            n,
            segments.data_ptr(),
            addresses,
            dtypes,
            decay,
            gain,
            sumsq.data_ptr(),
            *_rounding(seed),
            torch.get_num_threads(),
            None,
        )
    )


def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
    """See `ops.combine_out`."""
    exact = weights.to(torch.float64).contiguous()
    _check(
        _library().dbmtl_combine(
            rows.data_ptr(),
            DTYPES[rows.dtype],
            rows.stride(0),
            rows.shape[0],
            rows.shape[1],
            exact.data_ptr(),
            out.data_ptr(),
            DTYPES[out.dtype],
            int(accumulate),
            torch.get_num_threads(),
            None,
        )
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
) -> None:
    """See `ops.balance_rows_`: K-element arithmetic in PyTorch, then the combining kernel."""
    eager.balance_rows_(
        rows, sumsq, broken, nonfinite_steps, norms, weights, outs, starts, active, loss_scale, eps, scale, constant,
        fresh, accumulate, combine_out,
    )  # fmt: skip


def gramian(rows: Tensor) -> Tensor:
    """See `ops.gramian`."""
    num_tasks = rows.shape[0]
    out = torch.empty(num_tasks, num_tasks, dtype=torch.float64)
    _check(
        _library().dbmtl_gramian(
            rows.data_ptr(),
            DTYPES[rows.dtype],
            rows.stride(0),
            num_tasks,
            rows.shape[1],
            out.data_ptr(),
            torch.get_num_threads(),
            None,
        )
    )
    return out if rows.dtype == torch.float64 else out.float()
