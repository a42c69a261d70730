"""Memory that backends and rows ask for: large CPU buffers, and a few numbers on a device without a wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .c_library import native


def allocate(*shape: int, dtype: torch.dtype, device: torch.device, zero: bool = False) -> Tensor:
    """An empty (or zeroed) tensor; on a CPU with huge pages under it where that helps."""
    out = torch.empty(*shape, dtype=dtype, device=device)
    native.advise_huge_pages(out)
    return out.zero_() if zero else out


def upload(numbers: Sequence[float] | Sequence[bool], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, without a sync: from pinned memory, which its allocator keeps until the copy is done."""
    host = torch.tensor(numbers, dtype=dtype, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
