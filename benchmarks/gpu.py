"""Checks and times on a GPU: ``python benchmarks/gpu.py OUT SECTION BACKEND...``, a process of gpu_suite.sh.

Results are compared with float64, twice before they are timed and once after; ``parity`` only compares, ``first`` has
no torch.compile. Exit code: 1 after a fault of ours, 3 if the device was lost. TRITON_INTERPRET=1: tiny, on a CPU.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_ops
import torch
from dbmtl_kernels import backends
from dbmtl_kernels.bench import dense as op
from dbmtl_kernels.bench import models, steps, timing
from dbmtl_kernels.bench.dense import Call, close
from gpu_rows import Rows, card

CPU = bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = torch.device("cpu" if CPU else "cuda")
M, COMPILE = (1000, {"backend": "eager"}) if CPU else (1_000_000, {})
WIDTHS = (16, 32, 16) if CPU else (1024, 4096, 4096, 1024)
BEST = ("eager", "torch.compile")  # how the names of rivals begin, of which the fastest counts


class Suite:
    """What is known of this run: rows, backends, bytes a second of a copy, faults."""

    def __init__(self, folder: Path, section: str, backends: Sequence[str]) -> None:
        self.rows, self.section, self.backends = Rows(folder), section, backends
        self.rounds, self.warmup = (1, 1) if CPU else (9 if section == "first" else 25, 4)
        self.compiled = section not in ("parity", "first")
        self.faults, self.copied = 0, None
        self.ours = lambda name: name.split(",")[0] in backends

    def passes(self, what: str, name: str, run: Call, **size: Any) -> bool:
        """Whether ``run`` does not raise; if it does, a row says so. A rival that is wrong is no fault."""
        try:
            run()
            torch.zeros(1, device=DEVICE).item()  # the device has done it
            return True
        except torch.cuda.OutOfMemoryError:
            verdict = "skipped: needs more memory than the card has"
        except Exception as error:
            traceback.print_exc()
            fault = what == "section" or self.ours(name)
            self.faults += fault
            verdict = f"{'FAULT' if fault else 'wrong, not timed:'} {type(error).__name__}: {error}"[:200]
        self.rows.add(what, name, verdict=verdict, **size)
        if any(words in verdict for words in ("CUDA error", "CUDA: ", "[CUDA]")):
            sys.exit(3)  # after an illegal access nothing works any more
        return False

    def case(
        self, what: str, calls: dict[str, Call], check: Call, moved: int, targets: Sequence[tuple[Any, float | None]],
        run: Call = lambda call: call, bare: dict[str, Call] | None = None, **size: Any,
    ) -> None:  # fmt: skip
        """Check ``calls``; time ``run(call)`` of those that are right and stay so, of one of ours twice, of ``bare``.

        Then each of ours by the device's clock against the fastest of those whose names begin as ``targets`` say, or a
        "copy" of ``moved`` bytes: how many times as fast it must be. With ``bare``: in what comes on top of the first.
        """
        if self.section == "parity":
            what, size = " ".join(map(str, ("parity:", what, *size.values()))), {}
            calls = {name: call for name, call in calls.items() if self.ours(name)}
        right = lambda name: self.passes(what, name, partial(check, calls[name]), **size)  # noqa: E731
        known = [name for name in calls if right(name) and right(name)]  # whoever does nothing may be right once
        if self.section == "parity":
            for name in known:
                self.rows.add(what, name, verdict="right")
            return
        timed = {name: run(calls[name]) for name in known}
        again = {f"{name}, again": timed[name] for name in [*filter(self.ours, known)][:1]}
        timed |= again | {name: run(call) for name, call in (bare or {}).items()}
        clocks = timing.by_host_twice if CPU else timing.by_device_and_host
        times, now = timing.interleaved(timed, self.rounds, self.warmup, clocks), card()
        wrong = [name for name in known if not right(name)]
        times = {name: found for name, found in times.items() if name.removesuffix(", again") not in wrong}
        median = {name: statistics.median(device for device, _ in found) for name, found in times.items()}
        self.copied = moved / median["torch"] if "torch" in median else self.copied
        for name, (index, clock) in itertools.product(times, enumerate(("device", "host"))):
            of_copy = moved / median[name] / self.copied if self.copied else None
            share = {} if bare or index else {"bytes": moved, "of_copy": of_copy}
            found = {f"{q}_ms": ms for q, ms in timing.summary([pair[index] for pair in times[name]]).items()}
            self.rows.add(what, name, clock=clock, **found, **share, **size, **now)
        beyond = {name: found - (median[next(iter(bare))] if bare else 0.0) for name, found in median.items()}
        beyond |= {"copy": moved / self.copied} if self.copied else {}
        ours = [name for name in known if name in times and self.ours(name)]
        for name, (rivals, target) in itertools.product(ours, [*targets, *((name, None) for name in again)]):
            of = beyond if rivals in (BEST, "copy") else median
            against = min((rival for rival in of if rival.startswith(rivals)), key=of.__getitem__, default="")
            if against:
                ratio, clear = of[against] / of[name], min(of[against], of[name]) > 0.0
                verdict = "unclear" if not clear else "reached" if ratio >= (target or 0.0) else "missed"
                told = {"target": target, "verdict": verdict} if target else {}
                self.rows.add(what, name, clock="device", against=against, ratio=ratio, **told, **size)


def copy(suite: Suite) -> None:
    """Bytes a second of a device-to-device copy: what a share of the bandwidth is a share of."""
    source, target = torch.randn(250 * M, device=DEVICE), torch.full((250 * M,), torch.nan, device=DEVICE)
    check = lambda call: close(call(), source, 0.0, "the copy")  # noqa: E731
    suite.case("copy", {"torch": partial(target.copy_, source)}, check, 8 * len(source), [], P=len(source))


def dense(suite: Suite, K: int, P: int, dtype: torch.dtype = torch.float32) -> None:
    """The op on a K x P matrix, Triton's in two launches too."""
    large, inputs = K * P * dtype.itemsize >= 1000 * M, torch.randn(2, K, P, device=DEVICE).to(dtype)
    calls = gpu_ops.forms(suite.backends) | op.rivals(suite.compiled, **COMPILE)
    targets: list[tuple[Any, float | None]] = [("copy", 0.9), ("copy", 0.97)] if large else [("copy", None)]
    if dtype == torch.float32:
        best = 1.2 if large else 3.0 if P == M else None
        targets += [(BEST, best if suite.compiled else None), ("authors", 4.0)]
    suite.case(
        "dense", calls, partial(op.check_dense, *inputs), (4 * K + 1) * P * dtype.itemsize, targets,
        lambda call: partial(call, *inputs), K=K, P=P, dtype=str(dtype)[6:],
    )  # fmt: skip


def step(suite: Suite, what: str, batch: int, widths: tuple[int, ...] = WIDTHS) -> None:
    """Forward, K backward passes, optimizer: "step" against the bare passes, "engine" by what comes on top of them."""
    problem = models.mlp(3, widths, batch, DEVICE)
    K, P = problem.num_tasks, problem.num_params
    calls: dict[str, Call] = {name: partial(steps.ours, backend=name) for name in suite.backends}
    calls |= steps.rivals(suite.compiled, **COMPILE)
    bare = {"bare, let go": steps.bare_let_go, "bare, adding up": steps.bare}
    limit = 0.95 * (5 * K + 1) / (4 * K + 1) if suite.compiled else None  # by the bytes that either moves
    targets = [(BEST, limit), ("copy", None)] if what == "engine" else [(name, 1 / 1.05) for name in bare]
    suite.case(
        what, calls, partial(steps.check, problem), 4 * P * (4 * K + 1), targets,
        lambda make: partial(problem.step, make(problem)), bare, K=K, P=P, dtype="float32",
    )  # fmt: skip


def alone(suite: Suite, K: int, sizes: list[int]) -> None:
    """Each op alone, on K rows of parameters of ``sizes``, also with plain PyTorch."""
    *starts, P = itertools.accumulate(sizes, lambda end, size: end + -(-size // 32) * 32, initial=0)
    segments, grads = torch.tensor([*zip(starts, sizes, strict=True)]), [torch.randn(n, device=DEVICE) for n in sizes]
    given = torch.randn(K, P, device=DEVICE), torch.rand(K, dtype=torch.float64, device=DEVICE), grads, segments
    for name, moved in {"accumulate_": 3, "balance_rows_": K + 1, "combine_out": K + 1, "gramian": K}.items():
        calls = {backend: gpu_ops.each_op(backend, *given)[name] for backend in (*suite.backends, "eager")}
        check, targets = partial(gpu_ops.check_op, name, *given), [("eager", None), ("copy", None)]
        suite.case(name, calls, check, 4 * moved * P, targets, K=K, P=P, dtype="float32")


LARGE, SMALL = partial(dense, K=3, P=100 * M), partial(dense, K=3, P=M)
ENGINE, STEP = partial(step, what="engine", batch=16), partial(step, what="step", batch=16 if CPU else 4096)
OTHERS, HALF = ((11, 50 * M), (3, 2 * M), (3, M // 10)), partial(dense, K=3, P=200 * M, dtype=torch.bfloat16)
# Tasks and, about, shared parameters of QM9, of NYUv2 with a ResNet-50, of CelebA.
PROTOCOLS = ((11, [50 * M // 1000] * 12), (3, [149 * M // 1000] * 161), (40, [250 * M // 1000] * 20))
SECTIONS: dict[str, list[Call]] = {
    "parity": [  # whole tiles, a rest, rows off 16 bytes; last, what waits at a barrier
        partial(alone, K=3, sizes=[4096, 77, 1, 8193]), partial(step, what="engine", batch=8, widths=(31, 65, 129)),
        partial(dense, K=3, P=32768), partial(dense, K=11, P=5003), partial(dense, K=3, P=8192, dtype=torch.bfloat16),
    ],
    "first": [copy, LARGE, ENGINE, SMALL, STEP],
    "dense": [copy, LARGE, SMALL, HALF, *(partial(dense, K=K, P=P) for K, P in OTHERS)],
    "step": [copy, ENGINE, STEP],
    "ops": [copy, *(partial(alone, K=K, sizes=sizes) for K, sizes in PROTOCOLS)],
}  # fmt: skip


def main(folder: str, section: str, *asked: str) -> int:
    torch.manual_seed(0)
    missing = {name: backends.get(name).missing(DEVICE) for name in asked}
    suite = Suite(Path(folder), section, [name for name in asked if missing[name] is None])
    for name, reason in missing.items():
        suite.rows.add("backend", name, verdict=f"skipped: {reason}" if reason else "present")
    for run in SECTIONS[section]:
        suite.passes("section", f"{section} {getattr(run, 'keywords', '')}", partial(run, suite))
        torch.cuda.empty_cache()  # two large cases together do not fit
    return int(suite.faults > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
