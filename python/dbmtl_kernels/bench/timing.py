"""Interleaved timing: every contender once a round, so that what disturbs the machine disturbs all of them.

Each round starts with another contender: what one leaves behind (freed memory, a cold cache) falls on all in turn.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def by_host(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def by_host_twice(call: Callable[[], object]) -> tuple[float, float]:
    """Stands for `by_device_and_host` on a CPU."""
    return (by_host(call),) * 2


def by_device_and_host(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call on the GPU, by events, and on the host, which waits for nothing.

    The GPU first reads 256 MB, so that no cache holds what the call reads. It then sleeps for some 10 ms while the host
    puts the call's launches in line, and its clock starts when it wakes. Where it woke before the host was done, the
    call is repeated with a sleep twice as long; one that waits for the GPU itself is given up at some 300 ms.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for doubled in range(6):
        torch.cuda.synchronize()
        other_memory().sum()
        torch.cuda._sleep(20_000_000 << doubled)
        start.record()
        host = by_host(call)
        awake = start.query()
        end.record()
        torch.cuda.synchronize()
        if not awake:
            break
    return start.elapsed_time(end) / 1e3, host


@functools.cache
def other_memory() -> torch.Tensor:
    """256 MB, more than a GPU's caches hold."""
    return torch.zeros(64 << 20, device="cuda")


def interleaved(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[Callable[[], object]], Any] = by_host,
) -> dict[str, list[Any]]:
    """What ``clock`` says of each call, by contender; warm-up rounds are left out."""
    times: dict[str, list[Any]] = {name: [] for name in contenders}
    names = list(contenders)
    for round_ in range(warmup + rounds):
        shift = round_ % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            found = clock(contenders[name])
            if round_ >= warmup:
                times[name].append(found)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of seconds, in milliseconds."""
    ordered = sorted(times)
    p20, p80 = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.8))
    return {"p20": p20 * 1e3, "p50": statistics.median(ordered) * 1e3, "p80": p80 * 1e3}


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster ``fast`` is: the ratio of medians."""
    return statistics.median(times[slow]) / statistics.median(times[fast])
