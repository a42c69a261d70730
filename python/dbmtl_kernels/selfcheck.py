"""A second's worth of checking and measuring, for ``python -m dbmtl_kernels``: does it compute right here, how fast."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from . import reference
from .functional import balance_

NUM_TASKS = 3
CHECK_PARAMS = 10_007  # no multiple of any tile or vector
MEASURE_BYTES = 256 << 20  # beyond the caches
SECONDS = 0.3


def largest_error(backend: str, device: torch.device) -> float:
    """How far two steps of `balance_` are from the reference in float64, relative to the largest element.

    Raises:
        RuntimeError: the backend cannot serve tensors on ``device``.
    """
    generator = torch.Generator().manual_seed(0)
    ema = torch.zeros(NUM_TASKS, CHECK_PARAMS, device=device)
    exact = torch.zeros(NUM_TASKS, CHECK_PARAMS, dtype=torch.float64)
    error = 0.0
    for beta in (0.9, 0.6):
        grads = torch.randn(NUM_TASKS, CHECK_PARAMS, generator=generator) * torch.tensor([[1e-3], [1.0], [1e3]])
        ours, _ = balance_(grads.to(device), ema, beta=beta, backend=backend)
        wanted, exact, _ = reference.balance(grads.double(), exact, beta=beta)
        error = max(error, float((ours.cpu().double() - wanted).abs().max() / wanted.abs().max()))
    return error


def bandwidths(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy, and of `balance_` by the bytes that it must move: (4 K P + P) elements.

    Medians over some 0.3 s each, on tensors beyond the caches.
    """
    size = MEASURE_BYTES // 4 // (2 * NUM_TASKS)
    grads, ema = (torch.zeros(NUM_TASKS, size, device=device) for _ in range(2))
    copied = _median_seconds(lambda: ema.copy_(grads), device)
    balanced = _median_seconds(lambda: balance_(grads, ema), device)
    return 2 * grads.nbytes / copied, 4 * size * (4 * NUM_TASKS + 1) / balanced


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()  # whatever the first call prepares
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 3:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
