"""Parity and times of the GPU kernels: ``python benchmarks/gpu.py OUT_DIR {parity,first,times}``, run by gpu_suite.sh.

``parity``: every kernel of each backend. ``first``: that, then one size of everything. ``times``: all sizes, and
torch.compile. Each result is a row of OUT_DIR/results.csv as soon as it is known; a wrong one says so and is not timed.
Exit code: 1 if anything was wrong or raised; a target that is missed is a row that says "missed". Under Triton's
interpreter (TRITON_INTERPRET=1) all of it runs on a CPU, at tiny sizes, without verdicts.
"""

from __future__ import annotations

import csv
import datetime
import gc
import itertools
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import contenders
import dbmtl_kernels as dbk
import numpy as np
import oracle
import test_step
import timing
import torch
import triton
from contenders import BETA, EPS, Engine
from dbmtl_kernels import backends, ops
from torch import Tensor

CPU = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if CPU else "cuda")
ROUNDS, WARMUP = (1, 1) if CPU else (25, 4)
FIELDS = [
    "what", "contender", "K", "P", "dtype", "clock", "p20_ms", "p50_ms", "p80_ms", "against", "ratio", "target",
    "verdict", "bytes", "of_copy", "device", "driver", "torch", "triton", "cuda", "commit", "date", "command",
]  # fmt: skip
Call = Callable[..., Any]
HERE = [name for name in ("triton", "cuda") if backends.get(name).missing(DEVICE) is None]


class Rows:
    """What is found, one CSV row each, written at once."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "results.csv").open("a", newline="")
        self.writer = csv.DictWriter(self.file, FIELDS)
        if self.file.tell() == 0:
            self.writer.writeheader()
        self.faults = 0  # wrong results and exceptions so far
        self.copied = 1.0  # bytes a second of a device-to-device copy
        driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version,clocks.max.sm --format=csv,noheader")
        self.common = {
            "device": "cpu" if CPU else torch.cuda.get_device_name(), "driver": "" if CPU else driver.split("\n")[0],
            "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
            "commit": subprocess.getoutput("git describe --always --dirty 2> /dev/null"),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["gpu.py", *sys.argv[1:]]),
        }  # fmt: skip

    def add(self, what: str, contender: str, **values: Any) -> None:
        """A row: written, and said."""
        values = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in values.items()}
        self.writer.writerow({"what": what, "contender": contender, **values, **self.common})
        self.file.flush()
        print(what, contender, *(f"{key}={value}" for key, value in values.items() if value is not None), flush=True)

    def verified(self, what: str, calls: dict[str, Call], check: Call) -> dict[str, Call]:
        """Those that pass ``check``: a time is never reported of a wrong result."""
        return {name: call for name, call in calls.items() if self.passes(what, name, partial(check, call))}

    def passes(self, what: str, name: str, run: Call) -> bool:
        """Whether ``run`` does not raise; if it does, that is a fault."""
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            self.faults += 1
            self.add(what, name, verdict=f"FAULT {type(error).__name__}: {error}"[:300])
            return False
        return True

    def timed(
        self, what: str, calls: dict[str, Call], moved: int, targets: dict[str, Any], base: str = "", **size
    ) -> None:
        """Times of verified calls by both clocks; then each backend against the fastest of each family.

        ``targets``: by how a family's names begin, how many times as fast ours must be; negative: at most how many
        times as long it may take; "copy": the share of the bandwidth. The device's clock counts. ``base``: ratios are
        of what comes on top of this contender. ``moved``: bytes; 0 if that is not the point.
        """
        for clock in ("device", "host"):
            times = measure(calls, clock)
            median = {name: statistics.median(found) for name, found in times.items()}
            beyond = {name: max(median[name] - median.get(base, 0.0), 1e-9) for name in calls}
            for name, found in times.items():
                share = {"bytes": moved, "of_copy": moved / beyond[name] / self.copied} if moved else {}
                self.add(what, name, clock=clock, **size, **timing.summary(found), **share)
            for name, family in itertools.product([f"ours {b}" for b in HERE if f"ours {b}" in calls], targets):
                rivals = [rival for rival in calls if rival.startswith(family) and rival != name]
                best, target = min(rivals, key=beyond.__getitem__, default="copy"), targets[family]
                ratio = moved / self.copied / beyond[name] if best == "copy" else beyond[best] / beyond[name]
                reached = target is None or (ratio >= target if target > 0 else 1 / ratio <= -target)
                judged = target and clock == "device" and not CPU
                verdict = {"target": target, "verdict": "reached" if reached else "missed"} if judged else {}
                if best.startswith(family):
                    self.add(what, name, clock=clock, **size, against=best, ratio=ratio, **verdict)


def measure(calls: dict[str, Call], clock: str) -> dict[str, list[float]]:
    """Seconds by contender. Each round begins with another one: what one leaves behind falls on all in turn.

    "device": the device sleeps while the host puts a call's launches in line, so the host's time is left out. "host":
    of calls in a row, the host's share or the device's, whichever is longer.
    """
    names, times = list(calls), {name: [] for name in calls}
    synchronize = (lambda: None) if CPU else torch.cuda.synchronize
    for round_, turn in itertools.product(range(WARMUP + ROUNDS), range(len(names))):
        name = names[(round_ + turn) % len(names)]
        synchronize()
        if clock == "device" and not CPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(40_000_000)  # about 20 ms
            start.record()
            calls[name]()
            end.record()
            synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            for _ in range(5):
                calls[name]()
            synchronize()
            times[name].append((time.perf_counter() - began) / 5)
    return {name: found[WARMUP:] for name, found in times.items()}


def close(actual: Tensor, expected: Tensor | np.ndarray, tolerance: float, what: str) -> None:
    """Raise unless the largest error is within ``tolerance`` times the largest element."""
    actual, expected = actual.double(), torch.as_tensor(expected, device=actual.device).double()
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:  # NaN is wrong
        raise ValueError(f"{what} is off by {error:.1e}, allowed is {tolerance:.1e}")


def exact(x: Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def poison(numel: int, dtype: torch.dtype = torch.float32) -> None:
    """NaN where the next result of that size is likely to be allocated."""
    torch.full((numel,), torch.nan, dtype=dtype, device=DEVICE)


def ours() -> dict[str, Call]:
    """The dense op of every backend that is here; Triton's in one launch (an A/A pair of it) and in two."""

    def call(backend: str, form: str, grads: Tensor, ema: Tensor) -> Tensor:
        os.environ["DBMTL_TRITON_LAUNCHES"] = form
        return dbk.balance_(grads, ema, BETA, EPS, backend=backend)[0]

    forms = {"ours triton, again": "1", "ours triton, two launches": "2"}
    found = {f"ours {name}": partial(call, name, "1") for name in HERE}
    return {**found, **{name: partial(call, "triton", form) for name, form in forms.items()}}


def engine_check(problem: Engine, call: Call) -> None:
    """The first call, from a state of zeros."""
    expected = problem.expected()
    poison(len(expected))
    call()
    close(torch.cat([p.grad.reshape(-1) for p in problem.parameters]), expected, 2e-5, "the balanced .grad")


def parity(rows: Rows) -> None:
    """Every kernel of each backend at small sizes, against NumPy float64: whole tiles, a rest, a nonfinite task."""

    def dense(call: Call) -> None:
        dtypes = ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2.0**-6))
        for (dtype, tolerance), size in itertools.product(dtypes, (1, 33, 4096, 5003)):
            grads, ema = torch.randn(2, 3, size, device=DEVICE).to(dtype)
            _, new, _ = oracle.balance(exact(grads), exact(ema), BETA)
            poison(size, dtype)
            out = call(grads, ema)
            close(ema, new, tolerance, f"the state of {size} {dtype}")
            expected, _, _ = oracle.balance(exact(ema), exact(ema), 0.0)
            close(out, expected, tolerance, f"the gradient of {size} {dtype}")
        grads, ema = torch.randn(2, 3, 4096, device=DEVICE)
        grads[1, 77] = torch.nan
        if not (call(grads, ema).isfinite().all() and (ema[1] == 0).all()):
            raise ValueError("a nonfinite task is not left out")

    def step(backend: str) -> None:  # accumulate_ and balance_rows_
        problem = Engine(3, [(4096,), (7, 11), (1,), (8193,)], DEVICE)
        engine_check(problem, problem.ours(backend))

    def combine_and_gramian(backend: str) -> None:
        for K, size in ((3, 4099), (33, 1000)):
            matrix, weights = torch.randn(K, size, device=DEVICE), torch.rand(K, device=DEVICE)
            poison(size)
            out = ops.combine(matrix, weights, backend=backend)
            close(out, exact(weights) @ exact(matrix), 1e-5, "the sum of the rows")
            close(ops.gramian(matrix, backend), exact(matrix) @ exact(matrix).T, 1e-5, "the Gramian")

    for check in (dense, step, combine_and_gramian):
        calls = ours() if check is dense else {f"ours {name}": name for name in HERE}
        for right in rows.verified(f"parity: {check.__name__}", calls, check):
            rows.add(f"parity: {check.__name__}", right, verdict="right")


def copy(rows: Rows) -> None:
    """Bytes a second of a device-to-device copy: what a share of the bandwidth is a share of."""
    source = torch.randn(1000 if CPU else 250_000_000, device=DEVICE)
    target, moved = torch.empty_like(source), 8 * source.numel()
    found = measure({"copy": lambda: target.copy_(source)}, "device")["copy"]
    rows.copied = moved / statistics.median(found)
    rows.add("copy", "torch", P=source.numel(), clock="device", **timing.summary(found), bytes=moved)


def dense(rows: Rows, K: int, P: int, dtype: torch.dtype = torch.float32, compiled: bool = False) -> None:
    """The op on a K x P matrix. Small ones rotate through inputs that together do not stay in the cache."""
    P, half = (min(P, 2000) if CPU else P), dtype == torch.bfloat16
    large = K * P * dtype.itemsize >= 1e9
    inputs = [
        torch.randn(2, K, P, device=DEVICE).to(dtype)
        for _ in range(1 if large or CPU else 12 if P >= 1_000_000 else 120)
    ]

    def check(call: Call) -> None:
        grads, ema = inputs[0][0], inputs[0][1].clone()
        expected, new, _ = dbk.reference.balance(grads.float(), ema.float(), BETA, EPS)
        poison(P, dtype)
        close(call(grads, ema), expected, 2.0**-5 if half else 2e-5, "the balanced gradient")
        close(ema, new, 2.0**-7 if half else 1e-6, "the state")

    others = {name: call for name, call in contenders.all_contenders().items() if compiled or "compile" not in name}
    del others["dbmtl_kernels"]
    numbers = itertools.count()
    right = rows.verified("dense", {**ours(), **others}, check)
    calls = {name: lambda call=call: call(*inputs[next(numbers) % len(inputs)]) for name, call in right.items()}
    eager = 1.2 if large else 3.0 if P == 1_000_000 else None
    targets = {} if half else {"eager": eager, "torch.compile": None, "authors": 4.0}
    targets |= {"ours triton": None, "copy": 0.9 if large else None}
    rows.timed("dense", calls, (4 * K + 1) * P * dtype.itemsize, targets, K=K, P=P, dtype=str(dtype)[6:])


def engine(rows: Rows, compiled: bool = False) -> None:
    """K backward passes to the balanced ``.grad``; ratios are of what comes on top of the bare passes."""
    width = 8 if CPU else 768  # about the 152 tensors and 87 M elements of a ViT-B/16
    problem = Engine(4, [(width,), (width, width), (4 * width,), (4 * width, 2 * width)] * (2 if CPU else 19), DEVICE)
    named = {f"ours {name}": problem.ours(name) for name in HERE}
    named |= {"eager (cat, lerp_)": problem.eager(), "eager (foreach)": problem.eager(foreach=True)}
    if compiled:
        named["torch.compile (cat, lerp_)"] = problem.eager(torch.compile)
    calls = rows.verified("engine", named, partial(engine_check, problem))
    calls |= {"bare passes": problem.passes, "bare passes, adding up": partial(problem.passes, let_go=False)}
    targets, P = {"eager": 1.6, "torch.compile": 1.3, "ours triton": None, "copy": None}, sum(problem.sizes)
    rows.timed("engine", calls, 4 * P * 17, targets, "bare passes", K=4, P=P, dtype="float32")


def step(rows: Rows) -> None:
    """Forward, K backward passes, optimizer: against the bare passes, ``.grad`` adding up or let go."""
    widths, batch = ((16, 32, 16), 8) if CPU else ((1024, 4096, 4096, 1024), 4096)
    problem = test_step.Problem(HERE, widths, batch, DEVICE)
    backward = {f"ours {name}": partial(test_step.ours, name) for name in HERE}
    backward |= {"bare, adding up": test_step.bare, "bare, let go": test_step.bare_let_go}
    calls = {name: partial(problem.step, call) for name, call in backward.items()}
    P = sum(p.numel() for p in problem.trunk.parameters())
    rows.timed("step", calls, 0, {"bare, adding up": -1.05, "bare, let go": None}, K=3, P=P, dtype="float32")


def launches(rows: Rows) -> None:
    """Kernels, copies and fills of one call: ``ratio``."""
    problem, matrices = Engine(3, [(4096,), (7, 11)], DEVICE), torch.randn(2, 3, 4096, device=DEVICE)
    calls = {f"{name}, dense": partial(call, *matrices) for name, call in ours().items()}
    calls |= {f"ours {name}, engine": problem.ours(name) for name in HERE} | {"bare passes": problem.passes}
    for name, call in calls.items():
        for _ in range(2):  # the first loads the profiler
            with torch.profiler.profile() as profiler:
                call()
        found = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        rows.add("launches", name, K=3, ratio=len(found))


def main() -> int:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    torch.manual_seed(0)
    rows = Rows(folder)
    first = [copy, partial(dense, K=3, P=100_000_000), engine, partial(dense, K=3, P=1_000_000), step, launches]
    sizes = [(11, 50_000_000), (3, 2_000_000), (3, 100_000), (3, 200_000_000, torch.bfloat16)]
    times = [copy, *(partial(lambda rows, size: dense(rows, *size), size=size) for size in sizes)]
    times += [partial(dense, K=3, P=100_000_000, compiled=True), partial(engine, compiled=True)]
    for section in {"parity": [parity], "first": [parity, *first], "times": times}[what]:
        rows.passes("section", str(section), partial(section, rows))
        gc.collect()  # two large cases do not fit
        if not CPU:
            torch.cuda.empty_cache()
    return int(rows.faults > 0)


if __name__ == "__main__":
    sys.exit(main())
