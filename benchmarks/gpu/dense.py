"""The dense op and the Gramian: against a device-to-device copy, eager code, torch.compile of it, the authors' code."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import partial

import clock
import contenders
import dbmtl_kernels as dbk
import torch
import triton
from dbmtl_kernels import backends, ops
from report import OURS, Report, Row, WrongResultError, plain
from torch import Tensor

BACKEND = "triton"
CUDA = "cuda"  # the other backend, and the name of its rows
EMPTY = "empty cooperative launch"
CACHE = 60e6  # bytes of the H200's second-level cache
LAUNCHES = "DBMTL_TRITON_LAUNCHES"


def ours(grads: Tensor, ema: Tensor) -> Tensor:
    """One call, (4 K P + P) elements moved."""
    return dbk.balance_(grads, ema, contenders.BETA, contenders.EPS, backend=BACKEND)[0]


def ours_cuda(grads: Tensor, ema: Tensor) -> Tensor:
    """The same by the CUDA kernels."""
    return dbk.balance_(grads, ema, contenders.BETA, contenders.EPS, backend=CUDA)[0]


def has_cuda(device: torch.device) -> bool:
    """Whether the `cuda` backend serves ``device``; where its library is not built it is left out."""
    return backends.get(CUDA).missing(device) is None


@triton.jit
def empty_kernel(unused):
    """Does nothing."""
    return


def empty_launch(device: torch.device) -> clock.Call:
    """What a cooperative launch costs by itself, with one program on each multiprocessor."""
    unused = torch.zeros(1, device=device)
    if device.type != "cuda":
        return lambda _: empty_kernel[(1,)](unused)
    grid = (torch.cuda.get_device_properties(device).multi_processor_count,)
    return lambda _: empty_kernel[grid](unused, launch_cooperative_grid=True)


def compare_backends(report: Report, base: Row, times: dict[str, list[float]], target: float | None = 1.0) -> None:
    """How many times faster the CUDA kernels are than Triton's; after `Report.add_times` of the same."""
    if CUDA in times and OURS in times:
        row = report.row_of(base, CUDA)
        report.compare(row, BACKEND, statistics.median(times[OURS]) / statistics.median(times[CUDA]), ">=", target)


def compare_with_empty(report: Report, base: Row, times: dict[str, list[float]], judged: bool) -> None:
    """How many times as long as an empty cooperative launch each backend takes; a target is the CUDA kernels' only."""
    empty = statistics.median(times[EMPTY])
    for name, target in ((OURS, None), (CUDA, 2.0 if judged else None)):
        if name in times:
            report.compare(report.row_of(base, name), EMPTY, statistics.median(times[name]) / empty, "<=", target)


def ours_in(launches: int, grads: Tensor, ema: Tensor) -> Tensor:
    """The same in one launch or in two, whatever would be chosen."""
    before = os.environ.get(LAUNCHES)
    os.environ[LAUNCHES] = str(launches)
    try:
        return ours(grads, ema)
    finally:
        if before is None:
            del os.environ[LAUNCHES]
        else:
            os.environ[LAUNCHES] = before


def widened(eager: contenders.Contender, grads: Tensor, ema: Tensor) -> Tensor:
    """Eager code for gradients of another dtype than the state."""
    return eager(grads.to(ema.dtype), ema).to(grads.dtype)


class Inputs:
    """Sets of inputs of one size, so many that together they do not stay in the cache."""

    def __init__(self, K: int, P: int, grads: torch.dtype, state: torch.dtype, device: torch.device) -> None:
        one = K * P * (grads.itemsize + state.itemsize) + P * grads.itemsize
        count = 1 if one > 4 * CACHE else min(64, int(4 * CACHE // one) + 1) if device.type == "cuda" else 2
        spread = torch.linspace(0.5, 2.0, K, device=device)[:, None]

        def random(dtype: torch.dtype) -> Tensor:
            return torch.empty(K, P, dtype=dtype, device=device).normal_().mul_(spread.to(dtype))

        self.sets = [(random(grads), random(state)) for _ in range(count)]
        self.moved = K * P * (grads.itemsize + 3 * state.itemsize) + P * grads.itemsize
        self.base = Row("", "", "", K, P, plain(grads), plain(state))

    def rotating(self, call: contenders.Contender) -> clock.Call:
        """``call`` on another set each time."""
        return lambda number: call(*self.sets[number % len(self.sets)])

    def check(self, call: contenders.Contender) -> None:
        """Raise WrongResultError unless ``call`` agrees with the reference, to what its dtypes can hold."""
        grads, ema = self.sets[0]
        expected, new, _ = dbk.reference.balance(grads.float(), ema.float(), contenders.BETA, contenders.EPS)
        mine = ema.clone()
        actual = call(grads, mine)
        half = torch.bfloat16 in (grads.dtype, ema.dtype)
        close(actual, expected, 2.0**-5 if half else 2e-5, "the balanced gradient")
        close(mine, new, 2.0**-7 if half else 1e-6, "the state")


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise WrongResultError unless the largest error is below ``tolerance`` times the largest value."""
    if actual.shape != expected.shape:
        raise WrongResultError(f"{what} has shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}")
    error = float((actual.to(expected.dtype) - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:  # NaN is wrong
        raise WrongResultError(f"{what} is off by {error:.2e}, allowed is {tolerance:.2e}")


def check_replayed(name: str, inputs: Inputs, replay: clock.Call, result: Tensor) -> None:
    """A replay must do to the last set what a call does."""
    grads, ema = inputs.sets[-1]
    before = ema.clone()
    replay(0)
    expected, new, _ = dbk.reference.balance(grads, before, contenders.BETA, contenders.EPS)
    close(result, expected, 2e-5, f"the balanced gradient of {name}, replayed,")
    close(ema, new, 1e-6, f"the state of {name}, replayed,")


class Dense:
    """The sections of the dense op.

    Args:
        report: where rows go.
        timer: measures.
        tiny: sizes for trying the script, not for measuring.
    """

    def __init__(self, report: Report, timer: clock.Clock, tiny: bool) -> None:
        self.report = report
        self.timer = timer
        self.tiny = tiny
        self.device = timer.device

    def compiled(self, function: Callable[..., object]) -> Callable[..., object]:
        """By torch.compile; where only the script is tried, without generating code."""
        torch.compiler.reset()
        return torch.compile(function, dynamic=False, backend="eager" if self.tiny else "inductor")

    def size(self, P: int) -> int:
        """``P``, or something tiny."""
        return min(P, 1024) if self.tiny else P

    def copy(self) -> tuple[clock.Call, float]:
        """A device-to-device copy of 4 GB, and the bytes that it reads and writes."""
        numel = self.size(1_000_000_000)
        source, target = torch.randn(numel, device=self.device), torch.empty(numel, device=self.device)
        if not torch.equal(target.copy_(source), source):
            raise WrongResultError("a copy is not the same")
        return (lambda _: target.copy_(source)), 8.0 * numel

    def large(self, K: int, P: int, grads: torch.dtype, state: torch.dtype, with_compile: bool = False) -> None:
        """K P s >= 1 GB: bound by memory."""
        inputs = Inputs(K, self.size(P), grads, state, self.device)
        case = f"dense K={K} P={inputs.base.P} {plain(grads)}-{plain(state)}" + (", compiled" if with_compile else "")
        eager = {"eager (lerp_)": contenders.eager_lerp, "eager (mul_, add_)": contenders.eager_addmul}
        named: dict[str, contenders.Contender] = {OURS: ours, **eager}
        if grads == state == torch.float32 and not with_compile:
            named["authors' arithmetic"] = contenders.authors
            named["two launches"] = partial(ours_in, 2)
            if has_cuda(self.device):
                named[CUDA] = ours_cuda
        if with_compile:
            named["torch.compile (lerp_)"] = self.compiled(contenders.eager_lerp)
        if grads != state:
            named.update({name: partial(widened, call) for name, call in eager.items()})
        right = self.report.agree(case, named, inputs.check)
        copy, copied = self.copy()
        calls = {name: inputs.rotating(call) for name, call in right.items()}
        times = self.timer.on_device({**calls, "copy": copy})
        base = Row("dense", case, "", K, inputs.base.P, inputs.base.grads, inputs.base.state, "device")
        # The targets speak of K P s >= 1 GB; half precision is held to the bandwidth only.
        full = grads == state == torch.float32
        targets = {
            "copy": 0.9, "eager": 1.2 if full else None, "authors": 4.0, "torch.compile": None, "two launches": None
        }  # fmt: skip
        self.report.add_times(base, times, {"": inputs.moved, "copy": copied}, targets)
        compare_backends(self.report, base, times)
        if CUDA in times:
            share = inputs.moved / copied * statistics.median(times["copy"]) / statistics.median(times[CUDA])
            self.report.compare(self.report.row_of(base, CUDA), "copy", share, ">=", None)

    def small(self, P: int) -> None:
        """K=3: bound by launches. On the device alone, by calls made from Python, and replayed from a CUDA graph."""
        K, dtype = 3, torch.float32
        inputs = Inputs(K, self.size(P), dtype, dtype, self.device)
        case = f"dense K={K} P={inputs.base.P}"
        named: dict[str, contenders.Contender] = {
            OURS: ours,
            "one launch": partial(ours_in, 1),
            "two launches": partial(ours_in, 2),
            "eager (lerp_)": contenders.eager_lerp,
            "eager (mul_, add_)": contenders.eager_addmul,
            "authors' arithmetic": contenders.authors,
        }
        if has_cuda(self.device):
            named[CUDA] = ours_cuda
        right = self.report.agree(case, named, inputs.check)
        calls = {name: inputs.rotating(call) for name, call in right.items()}
        target = 3.0 if P == 1_000_000 else None
        authors = 4.0 if P <= 1_000_000 else None
        targets = {"eager": target, "authors": authors, "one launch": None, "two launches": None}
        base = Row("small", case, "", K, inputs.base.P, inputs.base.grads, inputs.base.state)
        for kind, times in (
            ("device", self.timer.on_device({**calls, EMPTY: empty_launch(self.device)})),
            ("call", self.timer.of_calls(calls, 1 if self.tiny else 50)),
        ):
            base.clock = kind
            self.report.add_times(base, times, {"": inputs.moved, EMPTY: 0.0}, targets, (EMPTY,))
            compare_backends(self.report, base, times, 1.15 if kind == "device" and P >= 1_000_000 else 1.0)
            if EMPTY in times:
                compare_with_empty(self.report, base, times, P == 100_000)
        if self.device.type != "cuda":
            return
        count = len(inputs.sets)
        graphs = {}
        for name in (name for name in calls if "mul_" not in name):
            graphs[name], results = clock.replayed(calls[name], count, self.device)
            check_replayed(name, inputs, graphs[name], results[-1])
        times = {name: [t / count for t in found] for name, found in self.timer.on_device(graphs).items()}
        base.clock = "graph"
        self.report.add_times(base, times, {"": inputs.moved}, {"eager": None, "two launches": None})
        compare_backends(self.report, base, times)

    def gramian(self, K: int, P: int) -> None:
        """All inner products of K rows."""
        P = self.size(P)
        rows = torch.randn(K, P, device=self.device)
        case = f"gramian K={K} P={P}"
        expected = sum(part.double() @ part.double().T for part in rows.split(1 << 22, dim=1))

        def check(call: Callable[[], Tensor]) -> None:
            close(call().double(), expected, 1e-5, "the Gramian")

        named = {OURS: lambda: ops.gramian(rows, BACKEND), "torch matmul": lambda: rows @ rows.T}
        if has_cuda(self.device):
            named[CUDA] = lambda: ops.gramian(rows, CUDA)
        right = self.report.agree(case, named, check)
        times = self.timer.on_device({name: lambda _, call=call: call() for name, call in right.items()})
        base = Row("gramian", case, "", K, P, "float32", "float32", "device")
        self.report.add_times(base, times, {"": 4.0 * K * P}, {"torch matmul": None})
        compare_backends(self.report, base, times, None)
