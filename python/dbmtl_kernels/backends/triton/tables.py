"""Small tables that kernels read: where gradients lie, how a row is cut into chunks, decay and gain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..arguments import DTYPES, Gradients
from ..memory import table

# The kernels' own numbers of dtypes (0 fp32, 1 bf16, 2 fp16, 3 fp64) for those of `arguments.DTYPES`.
CODES = bytes.maketrans(bytes((0, 1, 2, 3)), bytes((0, 3, 1, 2)))
# The gradients of a captured backward pass lie elsewhere: a table for each of up to 64 tasks, four times where one row
# serves all.
TABLES = 256


def widest(codes: int) -> int:
    """Bytes of an element of the widest dtype whose code is a bit of ``codes``."""
    return max(dtype.itemsize for dtype, code in DTYPES.items() if codes >> CODES[code] & 1)


def address_table(addresses: tuple[int, ...], codes: bytes) -> Tensor:
    """(n, 2) int64: address and dtype code of each gradient."""
    return torch.from_numpy(np.stack([np.array(addresses, np.int64), np.frombuffer(codes, np.uint8)], axis=1))


def chunk_table(segments: bytes, chunk: int) -> Tensor:
    """(c, 4) int64: segment, first element of it, its column in the row, number of elements."""
    offsets, numels = np.frombuffer(segments, np.int64).reshape(-1, 2).T
    counts = -(-numels // chunk)
    segment = np.repeat(np.arange(len(counts)), counts)
    first = (np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)) * chunk
    columns = [segment, first, offsets[segment] + first, np.minimum(chunk, numels[segment] - first)]
    return torch.from_numpy(np.stack(columns, axis=1))


def numbers_table(*numbers: float) -> Tensor:
    """(n,) float64."""
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def addresses(grads: Gradients, device: torch.device) -> tuple[Tensor, int]:
    """The address table on the device, and the codes that occur, as bits. A missing gradient has address 0.

    Where the allocator hands out the same addresses again, nothing is uploaded.
    """
    codes = grads.dtypes.translate(CODES)
    return table(address_table, (tuple(grads.addresses), codes), device, TABLES), sum(1 << c for c in set(codes)) or 1


def in_any_order(grads: Sequence[Tensor]) -> tuple[Gradients, Tensor]:
    """For who needs all elements, in whatever order: the gradients, and segments of a row that there is not."""
    dense = [grad if grad.is_contiguous() or _permuted(grad) else grad.contiguous() for grad in grads]
    given = Gradients([*dense], [grad.data_ptr() for grad in dense], bytes(DTYPES[grad.dtype] for grad in dense))
    return given, _segments(tuple(grad.numel() for grad in dense))


def _permuted(grad: Tensor) -> bool:
    """Whether the elements are one stretch of memory in another order."""
    found = {4: torch.channels_last, 5: torch.channels_last_3d}.get(grad.dim())
    return found is not None and grad.is_contiguous(memory_format=found)


@lru_cache(512)
def _segments(numels: tuple[int, ...]) -> Tensor:
    return torch.tensor([(0, numel) for numel in numels], dtype=torch.int64, device="cpu")


def chunks(segments: Tensor, chunk: int, device: torch.device) -> tuple[Tensor, bool]:
    """The chunk table on the device, and whether every segment begins at a multiple of 16 elements."""
    values = segments.numpy().tobytes()
    return table(chunk_table, (values, chunk), device), _aligned(values)


@lru_cache(512)
def _aligned(segments: bytes) -> bool:
    return not bool((np.frombuffer(segments, np.int64)[::2] % 16).any())


def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 on the device."""
    return table(numbers_table, values, device)
