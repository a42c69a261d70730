"""Small tensors on a device, without a wait: what is uploaded is kept; what a CUDA graph needs is made before.

A graph that was captured after a step finds everything: tables are those that the step uploaded, and what differs
within the graph (the addresses of gradients) is uploaded from pinned memory that the step prepared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

# Whether this process was forked: then one thread must do for what is of a row's size. OpenMP's threads stay in the
# parent, and its runtime, which PyTorch shares, would wait for them.
forked = False


def _note_fork() -> None:
    global forked
    forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_note_fork)


@contextmanager
def one_thread_if_forked() -> Iterator[None]:
    """In a forked process PyTorch's operations inside use one thread: those on whole rows, which a model does not have.

    A decorator as well.
    """
    if not forked:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_gpu(device: torch.device) -> bool:
    """Whether it has streams, graphs and memory that must be pinned."""
    return device.type == "cuda"


def capturing(device: torch.device) -> bool:
    """Whether what is done on the device is captured into a CUDA graph."""
    if not on_gpu(device):
        return False
    if torch.cuda.device_count() < 2:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):  # its own current stream
        return torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """The address of the current stream; 0 on a CPU."""
    return int(torch._C._cuda_getCurrentRawStream(device.index)) if on_gpu(device) else 0


class Arena:
    """Memory for captured graphs, which keep it for good; blocks of it are made outside captures.

    Args:
        make: a block of so many bytes.
        least: bytes of a block at least.
    """

    def __init__(self, make: Callable[[int], Tensor], least: int) -> None:
        self._make, self._least, self._lock = make, least, Lock()
        self._blocks: list[Tensor] = []
        self._used = self._size = 0  # of the last block

    def has(self, num_bytes: int) -> bool:
        """Whether there is so much."""
        return self._used + num_bytes <= self._size

    def prepare(self, num_bytes: int) -> None:
        """Outside captures: see to it that there is so much."""
        if not self.has(num_bytes):
            block = self._make(max(2 * num_bytes, self._least))
            with self._lock:
                self._blocks.append(block)
                self._size, self._used = block.nbytes, 0

    def take(self, num_bytes: int) -> Tensor:
        """Within a capture: (num_bytes,) uint8 on 16 bytes, that nobody else ever gets."""
        with self._lock:
            start, end = self._used, self._used + -(-num_bytes // 16) * 16
            if end > self._size:  # no step came before, or very many captures with none between
                self._blocks.insert(0, self._make(num_bytes))
                return self._blocks[0]
            self._used = end
            return self._blocks[-1][start : start + num_bytes]


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


_staging = Arena(_pinned, 1 << 20)
_held: dict[int, Tensor] = {}  # what graphs read


@lru_cache(512)
def _by_stream(make: Callable[..., Tensor], key: tuple[Any, ...], device: torch.device) -> dict[int, Tensor]:
    """``make(*key)`` on the device, for each stream: there, and only there, the upload comes before every use."""
    return {}


def table(make: Callable[..., Tensor], key: tuple[Any, ...], device: torch.device, others: int = 0) -> Tensor:
    """``make(*key)``, made on the CPU, on the device; not to be written to. Uploaded only if what is in it is new.

    Args:
        make: a function.
        key: its arguments.
        device: where.
        others: how many tables of this size, and with other contents, a graph may need that is captured later.
    """
    found = _by_stream(make, key, device)
    if capturing(device):
        # Whoever captures has waited for the work before, or what it did to the state would not be there either.
        for known in found.values():
            return _held.setdefault(id(known), known)
        values = make(*key)
        staged = _staging.take(values.nbytes).view(values.dtype).view(values.shape)
        return staged.copy_(values).to(device, non_blocking=True)
    stream = stream_of(device)
    mine = found.get(stream)
    if mine is None:
        mine = make(*key)
        if on_gpu(device):  # from pinned memory, which its allocator keeps until the copy is done: no wait
            with torch.cuda.device(device):  # pinning goes through the current device
                mine = mine.pin_memory().to(device, non_blocking=True)
        found[stream] = mine
    if others and on_gpu(device) and not _staging.has(others * mine.nbytes):
        with torch.cuda.device(device):
            _staging.prepare(others * mine.nbytes)
    return mine


def upload(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, without a sync; not to be written to, as who asks for the same gets the same tensor."""
    if not on_gpu(device):
        return torch.tensor(numbers, dtype=dtype, device=device)
    return table(_numbers, (dtype, *numbers), device, others=64)


def _numbers(dtype: torch.dtype, *numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device="cpu")


@lru_cache(None)
def zeros_of(device: torch.device) -> Arena:
    """Zeros on the device for captured launches: counters, which a kernel sets back to zero itself."""

    def zeros(num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    return Arena(zeros, 1 << 16)
