"""Small tables that kernels read: where gradients lie, how a row is cut into chunks, decay and gain."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def widest(codes: int) -> int:
    """Bytes of an element of the widest dtype whose code is a bit of ``codes``."""
    return max(dtype.itemsize for dtype, code in DTYPE_CODES.items() if codes >> code & 1)


def address_table(*pairs: int) -> np.ndarray:
    """(n, 2) int64: address and dtype code of each gradient."""
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def chunk_table(segments: bytes, chunk: int) -> np.ndarray:
    """(c, 4) int64: segment, first element of it, its column in the row, number of elements."""
    offsets, numels = np.frombuffer(segments, np.int64).reshape(-1, 2).T
    counts = -(-numels // chunk)
    segment = np.repeat(np.arange(len(counts)), counts)
    first = (np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)) * chunk
    return np.stack([segment, first, offsets[segment] + first, np.minimum(chunk, numels[segment] - first)], axis=1)


def numbers_table(*numbers: float) -> np.ndarray:
    """(n,) float64."""
    return np.array(numbers, dtype=np.float64)


class _Staging:
    """Pinned memory for what a graph uploads at every replay: made before a capture, where pinning is forbidden."""

    NUM_BYTES = 1 << 20

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._used = 0
        self._more: list[Tensor] = []

    def prepare(self) -> None:
        """Called outside captures."""
        if self._block is None:
            self._block = torch.empty(self.NUM_BYTES, dtype=torch.uint8, pin_memory=True)

    def take(self, values: Tensor) -> Tensor:
        """``values`` in pinned memory that lives as long as the process, as a graph may."""
        end = self._used + values.nbytes
        if self._block is None or end > self.NUM_BYTES:  # no warm-up, or very many captures: newer PyTorch allows it
            self._more.append(values.pin_memory())
            return self._more[-1]
        part = self._block[self._used : end].view(values.dtype).view(values.shape)
        self._used = end
        return part.copy_(values)


_staging = _Staging()


@lru_cache(512)
def _uploaded(make: Callable[..., np.ndarray], key: tuple[Any, ...], device: torch.device, stream: int) -> Tensor:
    """``make(*key)`` on the device, for one stream: there, and only there, the upload comes before every use."""
    _staging.prepare()
    # From pinned memory, which its allocator keeps until the copy is done: the host waits for nothing.
    return torch.from_numpy(make(*key)).pin_memory().to(device, non_blocking=True)


def _table(make: Callable[..., np.ndarray], key: tuple[Any, ...], device: torch.device) -> Tensor:
    """``make(*key)`` on the device; uploaded only if what is in it is new."""
    if device.type == "cpu":
        return torch.from_numpy(make(*key))
    if torch.cuda.is_current_stream_capturing():
        return _staging.take(torch.from_numpy(make(*key))).to(device, non_blocking=True)
    return _uploaded(make, key, device, torch.cuda.current_stream(device).cuda_stream)


def addresses(grads: list[Tensor | None], device: torch.device) -> tuple[Tensor, int]:
    """The address table on the device, and the codes that occur, as bits. A missing gradient has address 0.

    Where the allocator hands out the same addresses again, nothing is uploaded.
    """
    codes = {DTYPE_CODES[g.dtype] for g in grads if g is not None} or {0}
    some = min(codes)
    flat: list[int] = []
    for g in grads:
        flat += (0, some) if g is None or g.numel() == 0 else (g.data_ptr(), DTYPE_CODES[g.dtype])
    return _table(address_table, tuple(flat), device), sum(1 << code for code in codes)


def chunks(segments: Tensor, chunk: int, device: torch.device) -> tuple[Tensor, bool]:
    """The chunk table on the device, and whether every segment begins at a multiple of 16 elements."""
    values: np.ndarray = segments.numpy()
    return _table(chunk_table, (values.tobytes(), chunk), device), not bool((values[:, 0] % 16).any())


def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 on the device."""
    return _table(numbers_table, values, device)
