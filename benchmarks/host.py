"""Host time of a step beyond its backward passes, and of one call of an op.

``python benchmarks/host.py`` times ``balancer.backward(losses)`` of 161 small parameters (a ResNet-50 has as many
tensors) and K=3 losses, and the K backward passes alone. Prints medians.

``--case balance accumulate`` times what the host does for one call of an op, whole and in parts, on small CPU tensors:
Triton compiles for an H100 that is not there, and what would launch does nothing; nor does the library of ``cuda``. Of
CUDA itself (streams, the allocator, the launch) nothing is in these numbers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "support"))
K = 3
NUM_PARAMETERS = 161
Call = Callable[[], object]


def host() -> dict[str, Call]:
    """Ours, and the bare backward passes, with ``.grad`` adding up and let go before the next."""
    import dbmtl_kernels as dbk
    import torch

    torch.set_num_threads(1)
    parameters = [torch.randn(4 + index % 13, requires_grad=True) for index in range(NUM_PARAMETERS)]
    factors = torch.rand(K, sum(p.numel() for p in parameters)) + 0.5
    balancer = dbk.DBMTL(parameters, K)

    def losses() -> list[torch.Tensor]:
        for p in parameters:
            p.grad = None
        z = torch.cat(parameters)
        return [(z * factor).square().sum() for factor in factors]

    def bare(losses: list[torch.Tensor], let_go: bool) -> None:
        for task, loss in enumerate(losses):
            loss.backward(retain_graph=task < K - 1)
            for p in parameters if let_go else ():
                p.grad = None

    def timed(backward: Callable[[list[torch.Tensor]], object]) -> Callable[[], float]:
        def run() -> float:
            given = losses()
            began = time.thread_time()  # all of it runs in this thread; what else the machine does is left out
            backward(given)
            return time.thread_time() - began

        return run

    return {
        "balancer.backward": timed(balancer.backward),
        "bare passes": timed(lambda given: bare(given, False)),
        "bare passes, .grad let go": timed(lambda given: bare(given, True)),
    }


def often(call: Callable[[], object]) -> Call:
    """Seconds of one call, of this thread: other work on the machine is left out."""

    def run() -> float:
        began = time.thread_time()
        for _ in range(20):
            call()
        return (time.thread_time() - began) / 20

    return run


def stubbed() -> Any:
    """`launches` of the Triton backend, which serves CPU tensors, and `cuda` too: nothing is launched."""
    import torch
    import triton
    from dbmtl_kernels import backends
    from dbmtl_kernels.backends.triton import launches
    from machine import machine

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(machine(90, lambda source, metadata: lambda *args: None))
    backends.triton.missing = lambda device: None
    driver = launches.driver
    driver.capability, driver.multiprocessors = (lambda device: (9, 0)), (lambda device: 132)
    driver.has_cooperative_launch, driver.resident_programs = (lambda device: True), lambda *args: 4
    done = {f"dbmtl_{name}": lambda *args: 0 for name in ("balance", "accumulate", "available")}
    backends.cuda._loaded = SimpleNamespace(**done, dbmtl_workspace_bytes=lambda num_tasks: 1 << 14)
    backends.cuda.serves = "cpu"
    return launches


def last_launch(launches: Any, call: Call) -> Call:
    """The last launch of a call, by itself."""
    seen: list[Any] = []
    launch, launches._launch = launches._launch, lambda *args, **options: seen.append(partial(launch, *args, **options))
    call()
    launches._launch = launch
    return seen[-1]


def balance() -> dict[str, Call]:
    """``balance_`` of 3 x 1000 numbers."""
    import dbmtl_kernels as dbk
    import torch
    from dbmtl_kernels import ops

    launches, given = stubbed(), (*torch.randn(2, K, 1000), 0.9, 1e-8, "max", 0.0)
    launch = last_launch(launches, partial(launches.balance_, *given))
    calls = {f"balance_ {name}": partial(dbk.balance_, *given[:2], backend=name) for name in ("triton", "cuda")}
    calls |= {"checks": partial(ops.arguments.check_balance, *given), "a launch, looked at again": launch}
    calls["ops.balance_ triton"] = partial(ops.balance_, *given, "triton")
    calls["launches.balance_"] = partial(launches.balance_, *given)
    return {name: often(call) for name, call in calls.items()}


def accumulate() -> dict[str, Call]:
    """``accumulate_`` of as many gradients as a ResNet-50 and a ViT-L have."""
    import torch
    from dbmtl_kernels import ops

    launches, calls = stubbed(), dict[str, Call]()
    for count in (NUM_PARAMETERS, 296):
        segments = torch.tensor([[32 * index, 8] for index in range(count)])
        grads, row, sumsq = list(torch.randn(count, 8)), torch.zeros(32 * count), torch.zeros(1, dtype=torch.float64)
        args = row, sumsq, grads, segments, torch.tensor([0.9, 0.1], dtype=torch.float64), None
        given = ops.arguments.check_accumulate(*args)
        for name in ("triton", "cuda", "native"):
            calls[f"accumulate_ {count} {name}"] = partial(ops.accumulate_, *args, name)
        calls[f"checks {count}"] = partial(ops.arguments.check_accumulate, *args)
        calls[f"launches.accumulate_ {count}"] = partial(launches.accumulate_, *args[:2], given, *args[3:])
        calls[f"addresses {count}"] = partial(launches.tables.addresses, given, row.device)
        calls[f"chunks {count}"] = partial(launches.tables.chunks, segments, 1 << 13, row.device)
        calls[f"a launch {count}"] = last_launch(launches, calls[f"launches.accumulate_ {count}"])
    return {name: often(call) for name, call in calls.items()}


CASES: dict[str, tuple[Callable[[], dict[str, Call]], int]] = {  # and calls a round
    "host": (host, 20),
    "balance": (balance, 10),
    "accumulate": (accumulate, 2),
}


def measure(case: str, rounds: int, warmup: int = 3) -> dict[str, float]:
    """By name, the median in seconds."""
    make, repeat = CASES[case]
    times: dict[str, list[float]] = {}
    calls = make()
    for round_ in range(warmup + rounds):
        for _ in range(repeat):
            for name, call in calls.items():
                found = call()
                times.setdefault(name, []).extend([found] if round_ >= warmup else [])
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["host"])
    options = parser.parse_args()
    for case in options.case:
        medians = measure(case, options.rounds)
        if case == "host":
            for bare in ("bare passes", "bare passes, .grad let go"):
                medians[f"beyond {bare}"] = medians["balancer.backward"] - medians[bare]
        for what, median in medians.items():
            print(f"{what:34s} {1e3 * median:9.4f} ms", flush=True)


if __name__ == "__main__":
    main()
