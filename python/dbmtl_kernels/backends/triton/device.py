"""What is asked of the CUDA driver, and what of Triton that its documentation does not describe."""

from __future__ import annotations

import ctypes
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

COOPERATIVE_LAUNCH = 95  # CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH
ENVIRONMENT = "DBMTL_TRITON_LAUNCHES"
# CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE and CUDA_ERROR_NOT_SUPPORTED, as cuGetErrorString and Triton call them.
REFUSALS = ("too many blocks in cooperative launch", "operation not supported")


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuInit(0)  # whoever asks may be the first to need the driver; what fails, fails again below
    return driver


def _call(name: str, *args: Any) -> None:
    status = getattr(_driver(), name)(*args)
    if status != 0:
        raise RuntimeError(f"{name} failed with CUDA error {status}")


def has_cooperative_launch(device: torch.device) -> bool:
    """Whether the device can launch a grid whose programs wait for one another."""
    handle, value = ctypes.c_int(), ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device.index or 0))
    _call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(COOPERATIVE_LAUNCH), handle)
    return bool(value.value)


def resident_programs(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """How many programs of a kernel one multiprocessor of the current device holds at once.

    Undocumented in Triton 3.3 to 3.9: `warmup` compiles without launching; to index what it returns with a grid loads
    the binary; `function` is then its CUfunction, and `metadata` has its warps and bytes of shared memory.
    """
    compiled = kernel.warmup(*args, grid=(1,), **options)
    _ = compiled[(1, 1, 1)]
    count, metadata = ctypes.c_int(), compiled.metadata
    _call(
        "cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(count), ctypes.c_void_p(compiled.function),
        ctypes.c_int(32 * metadata.num_warps), ctypes.c_size_t(metadata.shared),
    )  # fmt: skip
    return count.value


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 1 where there is none (the interpreter on a CPU)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' own."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def launches(device: torch.device) -> tuple[int, str]:
    """How many launches `balance_` takes on the device, and why.

    ``DBMTL_TRITON_LAUNCHES`` = 1 or 2 decides; without it, one launch wherever the device can launch cooperatively.

    Raises:
        ValueError: another value of the variable.
        RuntimeError: one launch asked for on a device that cannot.
    """
    return _launches(os.environ.get(ENVIRONMENT, ""), device)


_refused: dict[torch.device, str] = {}


def refuse(device: torch.device, error: RuntimeError) -> None:
    """A cooperative launch failed and wrote nothing: from now on it takes two on this device, which is said once.

    A process that has a part of the GPU (MPS, a green context) is refused what the GPU's properties allow.

    Raises:
        RuntimeError: it failed for another reason, or one launch was asked for.
    """
    if not str(error).endswith(REFUSALS):  # others go on: "operation not supported on global/shared address space"
        raise error
    if os.environ.get(ENVIRONMENT) == "1":
        raise RuntimeError(f"{ENVIRONMENT}=1 was asked for but {device} refused it: {error}") from error
    _refused[device] = f"the driver refused a cooperative launch: {error}"
    _launches.cache_clear()
    warnings.warn(
        f"dbmtl_kernels: balance_ takes two launches on {device}, as {_refused[device]}", RuntimeWarning, stacklevel=3
    )


@cache
def _launches(asked: str, device: torch.device) -> tuple[int, str]:
    if asked not in ("", "1", "2"):
        raise ValueError(f"{ENVIRONMENT} must be 1 or 2, got {asked!r}")
    if asked == "2" and device.type == "cuda":
        return 2, f"{ENVIRONMENT}=2"
    if device.type != "cuda":
        return int(asked or 1), "interpreted"
    if asked != "1" and device in _refused:
        return 2, _refused[device]
    able = has_cooperative_launch(device)
    if asked == "1" and not able:
        raise RuntimeError(f"{ENVIRONMENT}=1 was asked for but {device} cannot launch cooperatively")
    return (1, "cooperative launch") if able else (2, "the device cannot launch cooperatively")
