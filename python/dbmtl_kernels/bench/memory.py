"""Memory: what a contender holds and takes at most, counted by the allocator, and what is free."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Call = Callable[[], object]
STEPS = 3  # in the third no form of ours measures norms, and every state is there


class Taken(NamedTuple):
    """Bytes beyond what was there before the contender was made.

    Attributes:
        held: after a step, with what it returned or left in .grad.
        peak: the most within that step.
        first: the most within the steps before it.
    """

    held: int
    peak: int
    first: int


def taken(make: Callable[[], Call], device: torch.device) -> Taken:
    """What the call that ``make`` gives takes, in its third run."""
    make()  # lets go what others left in .grad
    gc.collect()  # what is garbage is not to be freed, and counted, in between
    return _on_cuda(make, device) if device.type == "cuda" else _on_cpu(make)


def _on_cuda(make: Callable[[], Call], device: torch.device) -> Taken:
    before = torch.cuda.memory_allocated(device)
    call, peaks = make(), []
    result = None
    for _ in range(STEPS):
        result = None
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    held = torch.cuda.memory_allocated(device) - before
    del result
    return Taken(held, peaks[-1], max(peaks[:-1]))


def _on_cpu(make: Callable[[], Call]) -> Taken:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call = make()
        result = None
        for index in range(STEPS):
            result = None
            with record_function(f"bench step {index}"):
                result = call()
        with record_function("bench end"):
            pass
        del result
    # Not public: what is has sums by operator, and no peak.
    events = sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    spans = {e.name(): (e.start_ns(), e.end_ns()) for e in events if e.name().startswith("bench ")}
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    live = [(0, 0), *((at, bytes_) for (at, _), bytes_ in zip(changes, _summed(changes), strict=True))]

    def before(at: int) -> int:
        return [bytes_ for when, bytes_ in live if when <= at][-1]

    peaks = []
    for began, ended in (spans[f"bench step {index}"] for index in range(STEPS)):
        peaks.append(max([before(began), *(bytes_ for when, bytes_ in live if began <= when <= ended)]))
    return Taken(before(spans["bench end"][0]), peaks[-1], max(peaks[:-1]))


def _summed(changes: Sequence[tuple[int, int]]) -> Iterator[int]:
    return itertools.accumulate(bytes_ for _, bytes_ in changes)


def free(device: torch.device) -> int | None:
    """Bytes that can be had; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) << 10 if "MemAvailable" in lines else None
