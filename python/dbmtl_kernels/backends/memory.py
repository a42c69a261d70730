"""A few numbers on a device, without a wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(numbers: Sequence[float] | Sequence[bool], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, without a sync: from pinned memory, which its allocator keeps until the copy is done."""
    host = torch.tensor(numbers, dtype=dtype, device="cpu")
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
