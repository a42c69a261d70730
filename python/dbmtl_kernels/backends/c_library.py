"""The kernels of csrc/cpu and csrc/cuda, called through the C ABI of csrc/include/dbmtl.h with ctypes."""

from __future__ import annotations

import sys
import warnings
from array import array
from contextlib import nullcontext
from ctypes import CDLL, POINTER, Structure, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from . import memory
from .arguments import DTYPES, BalanceRows, Coefficients, Gradients
from .memory import capturing, stream_of, upload, zeros_of

ABI_VERSION = 7
MAX_OUTS = 4
NOTED = -1  # a status: done, with something to say, once
SCALES = {"max": 0, "mean": 1, "median": 2, "min": 3, "constant": 4}
CAPTURED_BYTES = 2 << 20  # of workspaces for the K calls of one task each that a CUDA graph has, beside the largest
HUGE_BYTES = 8 << 20  # fresh memory of this size is worth a system call for huge pages


def _struct(name: str, **fields: Any) -> Any:
    return type(name, (Structure,), {"_fields_": list(fields.items())})


# As in dbmtl.h, where each is explained.
Array = _struct("Array", data=c_void_p, dtype=c_int64)
Rows = _struct("Rows", data=c_void_p, dtype=c_int64, stride=c_int64, num_tasks=c_int64, num_params=c_int64)
Weighting = _struct("Weighting", eps=c_double, constant=c_double, scale=c_int64)
Where = _struct("Where", num_threads=c_int64, workspace=c_void_p, stream=c_void_p)
Out = _struct("Out", data=c_void_p, dtype=c_int64, start=c_int64, numel=c_int64)
BalanceArgs = _struct(
    "BalanceArgs", grads=Rows, ema=Rows, out=Array, norms=c_void_p, beta=c_double, weighting=Weighting, where=Where
)
AccumulateArgs = _struct(
    "AccumulateArgs", row=Array, sumsq=c_void_p, coefficients=c_void_p, loss_scale=Array, num_segments=c_int64,
    segments=c_void_p, grads=POINTER(c_void_p), grad_dtypes=c_char_p, where=Where,
)  # fmt: skip
CombineArgs = _struct("CombineArgs", rows=Rows, weights=Array, out=Array, accumulate=c_int64, where=Where)
BalanceRowsArgs = _struct(
    "BalanceRowsArgs", rows=Rows, sumsq=c_void_p, norms=c_void_p, weights=c_void_p, nonfinite=c_void_p,
    nonfinite_steps=c_void_p, active=c_void_p, loss_scale=Array, propagate_above=c_double, outs=Out * MAX_OUTS,
    num_outs=c_int64, fresh=c_int64, accumulate=c_int64, weighting=Weighting, where=Where,
)  # fmt: skip
GramianArgs = _struct("GramianArgs", rows=Rows, gramian=Array, where=Where)


def _codes(kind: Any) -> str:
    """The fields of a structure, as `struct` names their types; pointers are addresses, 0 for null."""
    if hasattr(kind, "_length_"):
        return _codes(kind._type_) * int(kind._length_)
    if issubclass(kind, Structure):
        return "".join(_codes(field) for _, field in kind._fields_)
    return {c_int64: "q", c_double: "d"}.get(kind, "P")


# What each function takes, packed in one go: making a ctypes structure of structures takes 2 us more.
ARGUMENTS = {
    "dbmtl_balance": Struct(_codes(BalanceArgs)),
    "dbmtl_accumulate": Struct(_codes(AccumulateArgs)),
    "dbmtl_combine": Struct(_codes(CombineArgs)),
    "dbmtl_balance_rows": Struct(_codes(BalanceRowsArgs)),
    "dbmtl_gramian": Struct(_codes(GramianArgs)),
}
# Result, then arguments.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(ARGUMENTS, (c_int32, c_void_p)),
    "dbmtl_abi_version": (c_int32,),
    "dbmtl_available": (c_int32,),
    "dbmtl_last_error": (c_char_p,),
    "dbmtl_workspace_bytes": (c_int64, c_int64),
}
CPU_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "dbmtl_isa": (c_char_p,),
    "dbmtl_set_isa": (c_int32, c_char_p),
    "dbmtl_advise_huge_pages": (None, c_void_p, c_int64),
}


NONE = 0, 0  # no `Array`


def _array(tensor: Tensor) -> tuple[int, int]:
    """The fields of an `Array`."""
    return tensor.data_ptr(), DTYPES[tensor.dtype]


def _rows(rows: Tensor) -> tuple[int, ...]:
    """The fields of `Rows`."""
    num_tasks, num_params = rows.shape
    return rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), num_tasks, num_params


def _readable(loss_scale: Tensor, device: torch.device) -> Tensor:
    """The loss scale where the kernel can read it."""
    known = loss_scale.device == device and loss_scale.dtype in DTYPES
    return loss_scale if known else loss_scale.to(device, torch.float64)


def _unable(library: CDLL) -> str | None:
    """Why it cannot run on the current device."""
    return None if library.dbmtl_available() == 0 else str(library.dbmtl_last_error().decode())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class CLibrary:
    """A backend in a shared library, loaded when it is first asked for.

    Args:
        name: of the backend.
        file: name of the library.
        gpu: whether it launches kernels on a stream, or runs threads.
        remedy: how to get the library.

    Attributes:
        path: where the library is, or would be. Set it, then `forget`, to use another one.
        serves: the type of device. Tests let the emulated GPU kernels serve "cpu".
    """

    def __init__(self, name: str, file: str, gpu: bool, remedy: str) -> None:
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        self.path = Path(__file__).parent.parent / "lib" / f"{file}{suffix}"
        self.serves = "cuda" if gpu else "cpu"
        self._name, self._gpu, self._remedy = name, gpu, remedy
        self.forget()

    def forget(self) -> None:
        """Load the library anew when it is next asked for."""
        self._loaded: CDLL | str | None = None
        self._workspaces: dict[tuple[torch.device, int], Tensor] = {}

    # --- can it serve -----------------------------------------------------------------------------------------------

    def missing(self, device: torch.device) -> str | None:
        """Why this backend cannot serve tensors on ``device``; None if it can."""
        if device.type != self.serves:
            return f"it serves {self.serves.upper()} tensors only"
        loaded = self._load()
        if isinstance(loaded, str):
            return loaded
        # What a library has code for differs from GPU to GPU, and it speaks of the current one.
        several = device.type == "cuda" and device.index is not None and torch.cuda.is_available()
        elsewhere = several and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            return _unable(loaded)

    def most_tasks(self, gramian: bool) -> int | None:
        """How many rows a call, or `gramian`, may have: kMaxTasks and kMaxRows of csrc/cuda."""
        if not self._gpu:
            return None
        return 64 if gramian else 256

    def gathers_early(self, device: torch.device) -> bool:
        """On a CPU a gradient is still in cache while the backward pass runs; a GPU gathers a row in one launch."""
        return not self._gpu

    def isa(self) -> str:
        """The instruction set in use, of the CPU library: "avx512", "avx2" or "baseline"."""
        return str(self.library().dbmtl_isa().decode())

    def set_isa(self, name: str | None) -> None:
        """Use another instruction set; None goes back to the best one. Same bits, other speed.

        Raises:
            ValueError: this machine does not have it.
        """
        self.check(self.library().dbmtl_set_isa(None if name is None else name.encode()))

    def advise_huge_pages(self, buffer: Tensor) -> None:
        """Ask for huge pages under a fresh CPU buffer, if it is large and the library is there."""
        if buffer.nbytes >= HUGE_BYTES and buffer.device.type == "cpu":
            loaded = self._load()
            if not isinstance(loaded, str):
                loaded.dbmtl_advise_huge_pages(buffer.data_ptr(), buffer.nbytes)

    # --- the library ------------------------------------------------------------------------------------------------

    def library(self) -> CDLL:
        """The library, with its signatures.

        Raises:
            RuntimeError: there is none, or it cannot run here.
        """
        loaded = self._load()
        if isinstance(loaded, str):
            raise RuntimeError(loaded)
        if (reason := _unable(loaded)) is not None:
            raise RuntimeError(reason)
        return loaded

    def check(self, status: int) -> None:
        """Raise what a status stands for; 0 is none, and NOTED a warning."""
        if status == NOTED:
            warnings.warn(
                f"dbmtl ({self._name}): {self._known().dbmtl_last_error().decode()}", RuntimeWarning, stacklevel=4
            )
        elif status != 0:
            kind = {1: ValueError, 2: TypeError, 3: MemoryError}.get(status, RuntimeError)
            raise kind(f"dbmtl ({self._name}): {self._known().dbmtl_last_error().decode()}")

    def _load(self) -> CDLL | str:
        if self._loaded is None:
            self._loaded = self._open()
        return self._loaded

    def _open(self) -> CDLL | str:
        """The library, or why there is none."""
        file = self.path.name
        if not self.path.exists():
            return f"{file} was not built: {self._remedy}"
        try:
            library = CDLL(str(self.path))
            version = library.dbmtl_abi_version()
            if version != ABI_VERSION:
                return f"{file} has ABI version {version}, this package needs {ABI_VERSION}: {self._remedy}"
            for name, (result, *arguments) in (SIGNATURES if self._gpu else SIGNATURES | CPU_SIGNATURES).items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            return f"{file} could not be loaded ({error}): {self._remedy}"
        return library

    def _known(self) -> CDLL:
        """The library, of which `library` may have said that it can run."""
        return self.library() if self._loaded is None or isinstance(self._loaded, str) else self._loaded

    def _call(self, name: str, device: torch.device, num_tasks: int, *fields: float) -> None:
        """Call a function on the tensors' own device, which the library takes to be the current one.

        ``fields`` are those of its structure, without the last, `Where`.
        """
        library = self._loaded if isinstance(self._loaded, CDLL) else self._known()
        if not self._gpu:
            threads = 1 if memory.forked else torch.get_num_threads()
            status = getattr(library, name)(ARGUMENTS[name].pack(*fields, threads, 0, 0))
        else:
            elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
            with torch.cuda.device(device) if elsewhere else nullcontext():
                where = self._where(device, num_tasks)
                status = getattr(library, name)(ARGUMENTS[name].pack(*fields, *where))
        if status != 0:
            self.check(status)

    def _where(self, device: torch.device, num_tasks: int) -> tuple[int, int, int]:
        """The current stream and its workspace. A captured call gets one of its own, which a step before made."""
        stream, needed = stream_of(device), self._known().dbmtl_workspace_bytes(num_tasks)
        if capturing(device):
            return 0, zeros_of(device).take(needed).data_ptr(), stream
        found = self._workspaces.get((device, stream))
        if found is None or found.numel() < needed:
            found = self._workspaces[device, stream] = torch.zeros(needed, dtype=torch.uint8, device=device)
        zeros_of(device).prepare(needed + CAPTURED_BYTES)
        return 0, found.data_ptr(), stream

    # --- the calls --------------------------------------------------------------------------------------------------

    def balance_(
        self, grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float
    ) -> tuple[Tensor, Tensor]:
        """One step on a matrix of gradients; one cooperative launch on a GPU."""
        num_tasks, num_params = ema.shape
        device = ema.device
        out = grads.new_empty(num_params)
        if not self._gpu:
            self.advise_huge_pages(out)
        norms = ema.new_empty(num_tasks, dtype=_wide(ema.dtype))
        self._call(
            "dbmtl_balance", device, num_tasks,
            *_rows(grads), *_rows(ema), *_array(out), norms.data_ptr(), beta, eps, constant, SCALES[scale],
        )  # fmt: skip
        return out, norms

    def accumulate_(
        self,
        row: Tensor | None,
        sumsq: Tensor,
        grads: Gradients,
        segments: Tensor,
        coefficients: Coefficients,
        loss_scale: Tensor | None,
    ) -> None:
        """Gather a row; a launch for each thousand gradients on a GPU (with an older driver, each hundred)."""
        device = sumsq.device
        _, addresses, dtypes = grads
        numbers: Any = coefficients  # a name, as only its address is passed on; so are those below
        if not isinstance(coefficients, Tensor) and self._gpu:
            numbers = upload(coefficients, torch.float64, device)
        elif not isinstance(coefficients, Tensor):
            numbers = array("d", coefficients)
        factor = NONE
        if loss_scale is not None:
            loss_scale = _readable(loss_scale, device)
            factor = _array(loss_scale)
        wide = DTYPES[torch.float64 if DTYPES[torch.float64] in dtypes else torch.float32]
        pointers, codes = array("Q", addresses), array("B", dtypes)
        self._call(
            "dbmtl_accumulate", device, 1, *((0, wide) if row is None else (row.data_ptr(), DTYPES[row.dtype])),
            sumsq.data_ptr(), numbers.data_ptr() if isinstance(numbers, Tensor) else numbers.buffer_info()[0], *factor,
            len(dtypes), segments.data_ptr(), pointers.buffer_info()[0], codes.buffer_info()[0],
        )  # fmt: skip

    def combine_out(self, rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
        """Add weighted rows up; one launch on a GPU."""
        weights = weights.contiguous()
        self._call(
            "dbmtl_combine", rows.device, rows.shape[0], *_rows(rows), *_array(weights), *_array(out), accumulate
        )

    def balance_rows_(self, step: BalanceRows) -> None:
        """All of the end of an engine step; one launch on a GPU."""
        rows, factor = step.rows, NONE
        if step.loss_scale is not None:
            loss_scale = _readable(step.loss_scale, rows.device)  # a name, as only its address is passed on
            factor = _array(loss_scale)
        outs: list[int] = []
        for out, start in zip(step.outs, step.starts, strict=True):
            outs += out.data_ptr(), DTYPES[out.dtype], start, out.numel()
        outs += [0] * (4 * MAX_OUTS - len(outs))
        self._call(
            "dbmtl_balance_rows", rows.device, rows.shape[0], *_rows(rows), *map(Tensor.data_ptr, step.stats),
            0 if step.active is None else step.active.data_ptr(), *factor, step.propagate_above, *outs, len(step.outs),
            step.fresh, step.accumulate, step.eps, step.constant, SCALES[step.scale],
        )  # fmt: skip

    def gramian(self, rows: Tensor) -> Tensor:
        """The product of the rows with themselves; one launch on a GPU, at most 64 tasks."""
        num_tasks, device = rows.shape[0], rows.device
        out = torch.empty(num_tasks, num_tasks, dtype=_wide(rows.dtype), device=device)
        self._call("dbmtl_gramian", device, num_tasks, *_rows(rows), *_array(out))
        return out


# pip keeps the wheel that it built of a release, and installs that again whatever there is to build with by then.
INSTALL = "pip install --no-cache-dir --force-reinstall --no-deps SOURCE, where SOURCE is what it was installed from"
native = CLibrary("native", "libdbmtl_cpu", False, f"install a C++17 compiler (or set CXX), then {INSTALL}")
cuda = CLibrary("cuda", "libdbmtl_cuda", True, f"with nvcc >= 12.4 (or CUDACXX set), DBMTL_CUDA=1 {INSTALL}")
