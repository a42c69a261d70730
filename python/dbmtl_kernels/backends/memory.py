"""A few numbers on a device, without a wait."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def upload(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, without a sync; not to be written to, as who asks for the same gets the same tensor.

    It is kept, so that a CUDA graph that was captured after a warm-up finds it, and uploads nothing.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    if torch.cuda.is_current_stream_capturing():  # what is made now is part of the graph
        return _upload.__wrapped__(tuple(numbers), dtype, device, 0)
    return _upload(tuple(numbers), dtype, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=4096)
def _upload(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    """On the stream it is asked for on: there, and only there, the copy comes before every use."""
    with torch.cuda.device(device):  # pinning goes through the current device
        host = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=True)
    return host.to(device, non_blocking=True)
