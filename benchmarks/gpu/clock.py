"""Times calls in turn, by two clocks: the device's own, and the host's over calls made one after another."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

Call = Callable[[int], object]  # given a number that grows with every call, to rotate inputs by

CYCLES_A_SECOND = 2e9  # about what a GPU sleeps by; a bit more or less does no harm


class Clock:
    """Measures on ``device``; on a CPU both clocks are the host's.

    Args:
        device: where the calls work.
        rounds: how often each contender is measured.
        warmup: rounds before that, which are left out; in the last of them nothing compiles any more.
    """

    def __init__(self, device: torch.device, rounds: int, warmup: int = 4) -> None:
        self.device = device
        self.rounds = rounds
        self.warmup = warmup
        self._count = itertools.count()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def on_device(self, contenders: dict[str, Call]) -> dict[str, list[float]]:
        """Seconds that the device takes for each call, gaps between its launches left to the device alone.

        Before each call the device sleeps while the host puts the call's launches in line.
        """
        if self.device.type != "cuda":
            return self.of_calls(contenders, 1)
        ahead = dict.fromkeys(contenders, 0.0)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for round_, order in self._rotating(contenders):
            events = {}
            for name in order:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(int(min(0.05, 2 * ahead[name] + 1e-4) * CYCLES_A_SECOND))
                began = time.perf_counter()
                start.record()
                result = contenders[name](next(self._count))
                end.record()
                del result
                if round_ < self.warmup:
                    ahead[name] = time.perf_counter() - began
                    self.synchronize()
                events[name] = start, end
            self.synchronize()
            if round_ >= self.warmup:
                for name, (start, end) in events.items():
                    times[name].append(start.elapsed_time(end) / 1e3)
        return times

    def of_calls(self, contenders: dict[str, Call], repeat: int = 20) -> dict[str, list[float]]:
        """Seconds a call of ``repeat`` in a row: the host's share or the device's, whichever is longer."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for round_, order in self._rotating(contenders):
            for name in order:
                self.synchronize()
                began = time.perf_counter()
                for _ in range(repeat):
                    contenders[name](next(self._count))
                self.synchronize()
                if round_ >= self.warmup:
                    times[name].append((time.perf_counter() - began) / repeat)
        return times

    def _rotating(self, contenders: dict[str, Call]) -> list[tuple[int, list[str]]]:
        """Each round begins with another contender: what one leaves behind falls on all in turn."""
        names = list(contenders)
        shifts = [(round_, round_ % len(names)) for round_ in range(self.warmup + self.rounds)]
        return [(round_, names[shift:] + names[:shift]) for round_, shift in shifts]


def replayed(call: Call, count: int, device: torch.device) -> tuple[Call, list[object]]:
    """``call`` of the numbers up to ``count``, captured in one CUDA graph: a replay makes all of them.

    Returns:
        what replays, and where each call leaves its result.
    """
    for number in range(3):  # whatever compiles or allocates does it now
        call(number)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(number) for number in range(count)]
    return (lambda _: graph.replay()), results
