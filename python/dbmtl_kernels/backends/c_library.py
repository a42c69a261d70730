"""The kernels of csrc/cpu and csrc/cuda, called through the C ABI of csrc/include/dbmtl.h with ctypes."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from ctypes import CDLL, POINTER, Structure, addressof, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import BalanceRows, Coefficients

ABI_VERSION = 5
MAX_OUTS = 4
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SCALES = {"max": 0, "mean": 1, "median": 2, "min": 3, "constant": 4}
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
    nonfinite_steps=c_void_p, active=c_void_p, loss_scale=Array, outs=Out * MAX_OUTS, num_outs=c_int64,
    fresh=c_int64, accumulate=c_int64, weighting=Weighting, where=Where,
)  # fmt: skip
GramianArgs = _struct("GramianArgs", rows=Rows, gramian=Array, where=Where)

SIGNATURES: dict[str, tuple[Any, ...]] = {  # result, then arguments
    "dbmtl_balance": (c_int32, POINTER(BalanceArgs)),
    "dbmtl_accumulate": (c_int32, POINTER(AccumulateArgs)),
    "dbmtl_combine": (c_int32, POINTER(CombineArgs)),
    "dbmtl_balance_rows": (c_int32, POINTER(BalanceRowsArgs)),
    "dbmtl_gramian": (c_int32, POINTER(GramianArgs)),
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


def _array(tensor: Tensor | None) -> Any:
    return Array() if tensor is None else Array(tensor.data_ptr(), DTYPES[tensor.dtype])


def _rows(rows: Tensor) -> Any:
    num_tasks, num_params = rows.shape
    return Rows(rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), num_tasks, num_params)


def _scale(loss_scale: Tensor | None, device: torch.device) -> Tensor | None:
    """The loss scale where the kernel can read it."""
    if loss_scale is None or (loss_scale.device == device and loss_scale.dtype in DTYPES):
        return loss_scale
    return loss_scale.to(device, torch.float64)


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
        return loaded if isinstance(loaded, str) else None

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
        return loaded

    def check(self, status: int) -> None:
        """Raise what a status stands for; 0 is none."""
        if status != 0:
            kind = {1: ValueError, 2: TypeError, 3: MemoryError}.get(status, RuntimeError)
            raise kind(f"dbmtl ({self._name}): {self.library().dbmtl_last_error().decode()}")

    def _load(self) -> CDLL | str:
        if self._loaded is None:
            self._loaded = self._open()
        return self._loaded

    def _open(self) -> CDLL | str:
        """The library, or why there is none or it cannot run here."""
        file = self.path.name
        if not self.path.exists():
            return f"{file} was not built: {self._remedy}"
        try:
            library = CDLL(str(self.path))
            version = library.dbmtl_abi_version()
            if version != ABI_VERSION:
                return f"{file} has ABI version {version}, this package needs {ABI_VERSION}: install again"
            for name, (result, *arguments) in (SIGNATURES if self._gpu else SIGNATURES | CPU_SIGNATURES).items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            return f"{file} could not be loaded: {error}"
        if library.dbmtl_available() != 0:
            return str(library.dbmtl_last_error().decode())
        return library

    def _on(self, device: torch.device) -> AbstractContextManager[Any]:
        """The library launches on the current device: make it the tensors' own."""
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return nullcontext()
        return torch.cuda.device(device)

    def _where(self, device: torch.device, num_tasks: int) -> Any:
        """Threads, or the current stream and its workspace. A captured call gets a workspace of its own."""
        if not self._gpu:
            return Where(torch.get_num_threads())
        stream, captured = 0, False
        if device.type == "cuda":
            stream, captured = torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
        needed = self.library().dbmtl_workspace_bytes(num_tasks)
        found = None if captured else self._workspaces.get((device, stream))
        if found is None or found.numel() < needed:
            found = torch.zeros(needed, dtype=torch.uint8, device=device)
            if not captured:
                self._workspaces[device, stream] = found
        return Where(0, found.data_ptr(), stream)

    def _coefficients(self, coefficients: Coefficients, device: torch.device) -> tuple[int, object]:
        """Where the kernel reads decay and gain, and what keeps them there."""
        if not isinstance(coefficients, Tensor):
            if not self._gpu:
                numbers = (c_double * 2)(*coefficients)
                return addressof(numbers), numbers
            pinned = torch.tensor(coefficients, dtype=torch.float64, pin_memory=device.type == "cuda")
            coefficients = pinned.to(device, non_blocking=True)
        return coefficients.data_ptr(), coefficients

    # --- the calls --------------------------------------------------------------------------------------------------

    def balance_(
        self, grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float
    ) -> tuple[Tensor, Tensor]:
        """One step on a matrix of gradients; one cooperative launch on a GPU."""
        num_tasks, num_params = ema.shape
        device = ema.device
        out = torch.empty(num_params, dtype=grads.dtype, device=device)
        if not self._gpu:
            self.advise_huge_pages(out)
        norms = torch.empty(num_tasks, dtype=_wide(ema.dtype), device=device)
        weighting = Weighting(eps, constant, SCALES[scale])
        with self._on(device):
            where = self._where(device, num_tasks)
            args = BalanceArgs(_rows(grads), _rows(ema), _array(out), norms.data_ptr(), beta, weighting, where)
            self.check(self.library().dbmtl_balance(args))
        return out, norms

    def accumulate_(
        self,
        row: Tensor,
        sumsq: Tensor,
        grads: list[Tensor | None],
        segments: Tensor,
        coefficients: Coefficients,
        loss_scale: Tensor | None,
    ) -> None:
        """Gather a row; a launch for each thousand gradients on a GPU (with an older driver, each hundred)."""
        addresses = (c_void_p * len(grads))(*[None if g is None else g.data_ptr() for g in grads])
        factor = _scale(loss_scale, row.device)  # a name, as only its address is passed on
        dtypes = bytes([0 if g is None else DTYPES[g.dtype] for g in grads])
        with self._on(row.device):
            numbers, _kept = self._coefficients(coefficients, row.device)
            args = AccumulateArgs(
                _array(row), sumsq.data_ptr(), numbers, _array(factor), len(grads),
                segments.data_ptr(), addresses, dtypes, self._where(row.device, 1),
            )  # fmt: skip
            self.check(self.library().dbmtl_accumulate(args))

    def combine_out(self, rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
        """Add weighted rows up; one launch on a GPU."""
        weights = weights.contiguous()
        with self._on(rows.device):
            where = self._where(rows.device, rows.shape[0])
            args = CombineArgs(_rows(rows), _array(weights), _array(out), accumulate, where)
            self.check(self.library().dbmtl_combine(args))

    def balance_rows_(self, step: BalanceRows) -> None:
        """All of the end of an engine step; one launch on a GPU."""
        rows, stats = step.rows, step.stats
        factor = _scale(step.loss_scale, rows.device)
        outs = [
            Out(out.data_ptr(), DTYPES[out.dtype], start, out.numel())
            for out, start in zip(step.outs, step.starts, strict=True)
        ]
        with self._on(rows.device):
            args = BalanceRowsArgs(
                _rows(rows), *[x.data_ptr() for x in stats], None if step.active is None else step.active.data_ptr(),
                _array(factor), (Out * MAX_OUTS)(*outs), len(outs), step.fresh, step.accumulate,
                Weighting(step.eps, step.constant, SCALES[step.scale]), self._where(rows.device, rows.shape[0]),
            )  # fmt: skip
            self.check(self.library().dbmtl_balance_rows(args))

    def gramian(self, rows: Tensor) -> Tensor:
        """Dot products of the rows, (K, K); one launch on a GPU, at most 64 tasks."""
        num_tasks, device = rows.shape[0], rows.device
        out = torch.empty(num_tasks, num_tasks, dtype=_wide(rows.dtype), device=device)
        with self._on(device):
            self.check(
                self.library().dbmtl_gramian(GramianArgs(_rows(rows), _array(out), self._where(device, num_tasks)))
            )
        return out


native = CLibrary("native", "libdbmtl_cpu", False, "install again with a C++17 compiler on the PATH (or CXX set)")
cuda = CLibrary("cuda", "libdbmtl_cuda", True, "install again with DBMTL_CUDA=1 and nvcc >= 12.4 on the PATH")
