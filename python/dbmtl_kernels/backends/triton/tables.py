"""What the gathering kernel reads besides gradients: where they are, and how a row is cut into chunks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class _Staging:
    """Pinned memory for what a graph uploads at every replay: made before a capture, where pinning is forbidden."""

    NUMBERS = 1 << 17

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._used = 0
        self._more: list[Tensor] = []

    def prepare(self) -> None:
        """Called outside captures."""
        if self._block is None:
            self._block = torch.empty(self.NUMBERS, dtype=torch.int64, pin_memory=True)

    def take(self, values: np.ndarray) -> Tensor:
        """``values`` in pinned memory that lives as long as the process, as a graph may."""
        end = self._used + values.size
        if self._block is None or end > self.NUMBERS:  # no warm-up, or very many captures: newer PyTorch allows it
            self._more.append(torch.from_numpy(values).pin_memory())
            return self._more[-1]
        part = self._block[self._used : end].view(values.shape)
        self._used = end
        return part.copy_(torch.from_numpy(values))


_staging = _Staging()


class _Remembered:
    """Device tables by what is in them, the least recently used forgotten first.

    One belongs to the stream it was uploaded on: there, and only there, the upload comes before every use.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._tables: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], np.ndarray]) -> Tensor:
        if device.type == "cpu":
            return torch.from_numpy(make())
        if torch.cuda.is_current_stream_capturing():
            return _staging.take(make()).to(device, non_blocking=True)
        _staging.prepare()
        full_key = (device, torch.cuda.current_stream(device).cuda_stream, key)
        found = self._tables.get(full_key)
        if found is None:
            # From pinned memory, which its allocator keeps until the copy is done: the host waits for nothing.
            found = torch.from_numpy(make()).pin_memory().to(device, non_blocking=True)
            self._tables[full_key] = found
            if len(self._tables) > self._capacity:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(full_key)
        return found


_addresses = _Remembered(256)
_chunks = _Remembered(1024)


def addresses(grads: list[Tensor | None], device: torch.device) -> tuple[Tensor, frozenset[int]]:
    """(n, 2) int64 on the device: address and dtype code of each gradient; and the codes that occur.

    A missing gradient has address 0. Where the allocator hands out the same addresses again, nothing is uploaded.
    """
    codes = frozenset(DTYPE_CODES[g.dtype] for g in grads if g is not None) or frozenset((0,))
    some = min(codes)
    flat: list[int] = []
    for g in grads:
        flat += (0, some) if g is None or g.numel() == 0 else (g.data_ptr(), DTYPE_CODES[g.dtype])
    table = _addresses.get(tuple(flat), device, lambda: np.array(flat, dtype=np.int64).reshape(-1, 2))
    return table, codes


def chunk_table(segments: np.ndarray, chunk: int) -> np.ndarray:
    """(c, 4) int64: segment, first element of it, its column in the row, number of elements."""
    offsets, numels = segments[:, 0], segments[:, 1]
    counts = -(-numels // chunk)
    segment = np.repeat(np.arange(len(segments)), counts)
    first = (np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)) * chunk
    return np.stack([segment, first, offsets[segment] + first, np.minimum(chunk, numels[segment] - first)], axis=1)


def chunks(segments: Tensor, chunk: int, device: torch.device) -> tuple[Tensor, bool]:
    """The chunk table on the device, and whether every segment begins at a multiple of 16 elements."""
    values: np.ndarray = segments.numpy()
    table = _chunks.get((chunk, values.tobytes()), device, lambda: chunk_table(values, chunk))
    return table, not bool((values[:, 0] % 16).any())
