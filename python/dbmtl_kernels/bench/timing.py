"""What is timed, and interleaved timing: every contender once a round, so that what disturbs one disturbs all.

Each round starts with another contender: what one leaves behind (freed memory, a cold cache) falls on all in turn.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .results import Row

Call = Callable[..., Any]


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
    return torch.zeros(64 << 20, dtype=torch.float32, device="cuda")


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


class Contender(NamedTuple):
    """What takes part.

    Attributes:
        make: gives a call with a state of its own.
        check: raises ValueError unless it is right.
        bytes: that must be moved, if a share of the bandwidth says something.
        room: bytes that it takes at most, about.
    """

    make: Callable[[], Call]
    check: Callable[[], None]
    bytes: int | None = None
    room: int = 0


@dataclass
class Case:
    """One level at one size.

    Attributes:
        level: "op", "grads" or "step".
        model: what the gradients are of; "" for a matrix.
        K: tasks.
        P: shared parameters.
        dtype: of the gradients.
        device: where.
        names: of the contenders, in the order of the table.
        build: makes them; called when the case begins.
        over: the contender that ratios are over.
        need: bytes that the case takes at least, about.
        detail: what every row says.
    """

    level: str
    model: str
    K: int
    P: int
    dtype: torch.dtype
    device: torch.device
    names: list[str]
    build: Callable[[Sequence[str]], dict[str, Contender]]
    over: str
    need: int
    detail: dict[str, Any] = field(default_factory=dict)

    def title(self) -> str:
        """For people."""
        model = f" {self.model}" if self.model else ""
        return f"{self.level}{model} K={self.K} P={self.P:,} {str(self.dtype)[6:]}"

    def key(self, name: str) -> tuple[object, ...]:
        """What its row of times is known by, but for the machine."""
        batch = self.detail.get("batch")
        return self.level, name, self.model, self.K, self.P, str(self.dtype)[6:], batch

    def row(self, name: str, what: str = "", **values: Any) -> Row:
        """A row of it."""
        detail = self.detail | values.pop("detail", {})
        what = f"{self.level} {what}".strip()
        return Row("bench", what, name, self.model, self.K, self.P, str(self.dtype)[6:], detail=detail, **values)


def key_of(row: Row) -> tuple[object, ...]:
    """As `Case.key`."""
    return row.what, row.contender, row.model, row.K, row.P, row.dtype, row.detail.get("batch")


class Budget:
    """Seconds that are left, for all and for compiling; ``timing`` is what each case may take turns for at least."""

    def __init__(self, seconds: float, cases: int) -> None:
        self.end, self.compiling = time.perf_counter() + seconds, 0.4 * seconds
        self.timing = 0.25 * seconds / max(1, cases)

    def share(self, cases: int) -> float:
        """Of one of so many cases that are to come."""
        return max(0.0, self.end - time.perf_counter()) / max(1, cases)


def seconds(device: torch.device, on_device: bool, repeat: int, call: Call) -> float:
    """Seconds of a call: by the device's clock, or by the host's until the device is done."""
    if on_device:
        return by_device_and_host(call)[0]

    def calls() -> None:
        for _ in range(repeat):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return by_host(calls) / repeat
