"""Interleaved timing: every contender once a round, so that what disturbs the machine disturbs all of them.

Each round starts with another contender: what one leaves behind (freed memory, a cold cache) falls on all in turn.
"""

from __future__ import annotations

import csv
import datetime
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dbmtl_kernels
import torch
from dbmtl_kernels.backends import native

RESULTS = Path(__file__).parent / "results"


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
    """p20, p50 and p80 in milliseconds."""
    ordered = sorted(times)
    pick = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e3  # noqa: E731
    return {"p20_ms": pick(0.2), "p50_ms": statistics.median(ordered) * 1e3, "p80_ms": pick(0.8)}


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster ``fast`` is: the ratio of medians."""
    return statistics.median(times[slow]) / statistics.median(times[fast])


def machine() -> dict[str, Any]:
    """What a figure needs beside it."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "isa": native.isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dbmtl_kernels": dbmtl_kernels.__version__,
        "command": " ".join(["pytest", *sys.argv[1:]]),
    }


def record(name: str, rows: list[dict[str, Any]], folder: Path) -> None:
    """Write ``rows`` to NAME.csv and, with the machine, to NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
