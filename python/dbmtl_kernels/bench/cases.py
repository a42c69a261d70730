"""Cases: one level at one size. Contenders are verified, then timed in turn; then their memory is counted."""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import dense, gradients, memory, models, steps, timing
from .dense import Call
from .models import Size
from .results import Row
from .timing import Case, Contender

COPY_ELEMENTS = 64 << 20  # that the copy reads at most
CHECKED = 1 << 30  # bytes of float64 that a check may take
MEASURE_EVERY = 10  # the default of OnePassDBMTL
MOST_ROUNDS, LEAST_ROUNDS, WARMUP = 201, 3, 2

OURS = "dbmtl_kernels"
BARE, LET_GO, EW = "bare passes (.grad added up)", "bare passes (.grad let go)", "equal weighting"
SHIPPED, ON_DEVICE = "authors' arithmetic (as shipped)", "authors' arithmetic (on the device)"
ROWS, ONE_ROW, ONE_PASS = f"{OURS} (DBMTL)", f"{OURS} (DBMTL, beta=0)", f"{OURS} (OnePassDBMTL)"
OP, LISTS = f"{OURS} (balance_)", f"{OURS} (accumulate_, balance_rows_)"
JD, COPY = "TorchJD (DB-MTL as its Aggregator)", "copy"
FAMILIES = (OURS, "eager", "torch.compile", "authors' arithmetic", "TorchJD", EW, "bare passes")


# --- the levels ------------------------------------------------------------------------------------------------------


def compiler_missing(device: torch.device) -> str:
    """Why torch.compile cannot work here; "" if nothing is known to be missing."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if device.type == "cpu" and not any(map(shutil.which, names)):
        return "torch.compile needs a C++ compiler"
    return ""


def op(K: int, size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    """From a K x P matrix to the balanced gradient."""
    P, s = size.num_params, dtype.itemsize
    makers: dict[str, Call] = {OP: dense.ours, **dense.rivals(compiled=True, dynamic=False)}
    makers[ON_DEVICE] = makers.pop("authors' arithmetic")
    makers[EW] = dense.equal_weighting
    columns = max(1, min(P, CHECKED // (8 * K)))

    def build(names: Sequence[str]) -> dict[str, Contender]:
        grads, ema = (torch.randn(K, P, dtype=torch.float32, device=device).to(dtype) for _ in range(2))

        few, state = (matrix[:, :columns].contiguous() for matrix in (grads, ema))
        known: list[tuple[Tensor, Tensor]] = []

        def check(name: str) -> None:
            if name == EW:
                wanted = few.sum(0, dtype=torch.float64)
                dense.close(makers[name](few, state), wanted, 2e-5 if s > 2 else 2.0**-5, "the sum")
                return
            if not known:
                known.append(dense.exact(few, state))
            for _ in range(2):  # whoever does nothing may be right once
                dense.check_dense(few, state, makers[name], known[0])

        moved = dict.fromkeys(makers, (4 * K + 1) * P * s) | {EW: (K + 1) * P * s}
        return {
            name: Contender(
                partial(partial, makers[name], grads, ema),
                partial(check, name),
                moved[name],
                room=(3 * K if name.startswith("authors") else 1) * P * s,
            )
            for name in names
        }

    detail = {"verified_columns": columns} if columns < P else {}
    return Case("op", "", K, P, dtype, device, list(makers), build, OP, (3 * K + 1) * P * s, detail)


def grads(K: int, size: Size, device: torch.device) -> Case:
    """From the .grad of K tasks to the balanced .grad."""
    P = size.num_params
    compiler = partial(torch.compile, dynamic=False)
    makers: dict[str, gradients.Maker] = {LISTS: gradients.ours}
    makers |= {f"eager ({kind})": gradients.eager(kind) for kind in steps.KINDS}
    makers |= {f"torch.compile ({kind})": gradients.eager(kind, compiler) for kind in steps.KINDS}
    makers[SHIPPED] = partial(gradients.authors, shipped=True)
    if device.type != "cpu":  # there it is the same
        makers[ON_DEVICE] = partial(gradients.authors, shipped=False)
    makers[EW] = gradients.equal_weighting
    few: list[tuple[int, ...]] = []
    total = 0
    for shape in size.shapes:  # a check takes 2 K P numbers of float64, and as many of float32
        total += torch.Size(shape).numel()
        if few and total * K * 24 > 2 * CHECKED:
            break
        few.append(shape)

    def build(names: Sequence[str]) -> dict[str, Contender]:
        lists = gradients.Lists.random(K, size.shapes, device)
        part = gradients.Lists([task[: len(few)] for task in lists.grads])
        known: list[list[Tensor]] = []

        def check(name: str) -> None:
            if name != EW and not known:
                known.append(gradients.expected(part))
            wanted = gradients.expected(part, plain=True) if name == EW else known[0]
            gradients.check(part, makers[name], wanted)

        moved = dict.fromkeys(makers, (4 * K + 1) * P * 4) | {EW: (K + 1) * P * 4}
        return {
            name: Contender(
                partial(makers[name], lists),
                partial(check, name),
                moved[name],
                room=(5 if name.startswith("authors") else 3 if "stack" in name else 2) * K * P * 4,
            )
            for name in names
        }

    detail = {"verified_tensors": len(few)} if len(few) < len(size.shapes) else {}
    model = size.name if size.known else f"{len(size.shapes)} tensors"
    return Case("grads", model, K, P, torch.float32, device, list(makers), build, LISTS, (3 * K + 3) * P * 4, detail)


def step(model: str, make: Callable[[], steps.Problem], device: torch.device, **detail: Any) -> Case:
    """Forward, backward passes, optimizer; ``make`` gives the model, one for ours and one for the others.

    So hooks that ours keep in a model's parameters are no load for others.
    """
    first = make()
    K, P, dtype = first.num_tasks, first.num_params, first.shared[0].dtype
    makers: dict[str, tuple[steps.Maker, str]] = {
        BARE: (steps.bare, "sum"),
        LET_GO: (steps.bare_let_go, "last"),
        EW: (steps.equal_weighting, "sum"),
        ROWS: (steps.ours, "balanced"),
        ONE_ROW: (partial(steps.ours, beta=0.0), "balanced, beta=0"),
        ONE_PASS: (steps.one_pass, "balanced, beta=0"),
    }
    makers |= {name: (made, "balanced") for name, made in steps.rivals(compiled=True, dynamic=False).items()}
    makers[SHIPPED] = partial(steps.authors, shipped=True), "balanced"
    if device.type != "cpu":
        makers[ON_DEVICE] = partial(steps.authors, shipped=False), "balanced"
    if importlib.util.find_spec("torchjd") is not None:
        makers[JD] = steps.torchjd, "balanced"

    def build(names: Sequence[str]) -> dict[str, Contender]:
        problems = [first, make()]
        for problem in problems:
            problem.step(steps.bare(problem))  # the optimizer makes its state

        def made(name: str) -> Call:
            problem = problems[name.startswith(OURS)]
            problem.zero_grad()
            return partial(problem.step, makers[name][0](problem))

        return {
            name: Contender(
                partial(made, name),
                partial(steps.check, problems[name.startswith(OURS)], *makers[name]),
                room=(5 if name.startswith("authors") else 3) * K * P * 4,
            )
            for name in names
        }

    return Case("step", model, K, P, dtype, device, list(makers), build, BARE, (8 + 3 * K) * P * 4, dict(detail))


def mlp_step(K: int, size: Size, batch: int, device: torch.device) -> Case:
    """A step of an MLP of about so many parameters."""
    make = partial(models.mlp, K, models.widths_of(size.num_params), batch, device)
    return step("mlp", make, device, batch=batch)


# --- running one -----------------------------------------------------------------------------------------------------


Say = Callable[[str], None]


def run(case: Case, names: Sequence[str], budget: timing.Budget, cases_left: int, say: Say) -> list[Row]:
    """Verify, time and count; a row for each contender and quantity, also for who is wrong or left out."""
    torch.compiler.reset()
    contenders = case.build(names)
    began, allowed = time.perf_counter(), budget.share(cases_left)
    verdicts: dict[str, str] = {}
    for name in names:
        say(f"verifying {name}")
        verdict = _verdict(case, name, contenders[name], budget)
        if verdict:
            verdicts[name] = verdict
    right = [name for name in names if name not in verdicts]
    rows = [case.row(name, detail={"verdict": verdict}) for name, verdict in verdicts.items()]
    if not right:
        return rows
    seconds = max(budget.timing, 0.7 * (allowed - (time.perf_counter() - began)))
    times, moved = _timed(case, {name: contenders[name] for name in right}, seconds, say)
    counted: dict[str, memory.Taken] = {}
    for name in right:
        say(f"memory of {name}")
        counted[name] = memory.taken(contenders[name].make, case.device)
    return rows + _rows(case, contenders, times, moved, counted)


def _verdict(case: Case, name: str, contender: Contender, budget: timing.Budget) -> str:
    """Why the contender is not timed; "" if it is right. Compiling counts."""
    compiled, began = name.startswith("torch.compile"), time.perf_counter()
    missing = compiler_missing(case.device) if compiled else ""
    if missing:
        return f"left out: {missing}"
    if compiled and budget.compiling <= 0:
        return "left out: the time for compiling is over (--seconds gives more)"
    free = memory.free(case.device)
    if free is not None and contender.room > free:
        return f"left out: it takes about {contender.room / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
    try:
        contender.check()
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".splitlines()
        return f"wrong, not timed: {lines[0][:200]}"
    finally:
        if compiled:
            budget.compiling -= time.perf_counter() - began
    return ""


def _copy(case: Case) -> tuple[Call, int]:
    """A copy of as many numbers as the gradients of all tasks, and the bytes it moves.

    Between buffers like those of ours, with huge pages where there are such; written to first, as untouched memory is
    one page of zeros for all.
    """
    count = min(case.K * case.P, COPY_ELEMENTS)
    source, target = (ops.allocate(count, dtype=case.dtype, device=case.device).fill_(1.0) for _ in range(2))
    return partial(target.copy_, source), 2 * source.nbytes


def _timed(
    case: Case, contenders: dict[str, Contender], seconds: float, say: Say
) -> tuple[dict[str, list[float]], int]:
    """Seconds of each call, and of a copy of so many bytes; all take turns. As many rounds as the time allows."""
    copy, moved = _copy(case)
    calls = {name: contender.make() for name, contender in contenders.items()} | {COPY: copy}
    repeat = 20 if case.level != "step" and case.P * case.K < 100_000 else 1  # or the clock is what is measured
    on_device = case.device.type == "cuda" and case.level != "step"
    clock: Callable[[Call], float] = partial(timing.seconds, case.device, on_device, repeat)
    began = time.perf_counter()
    timing.interleaved(calls, rounds=1, warmup=WARMUP - 1, clock=clock)
    one = (time.perf_counter() - began) / WARMUP
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(one, 1e-9))))
    say(f"{rounds} rounds of {len(calls)} contenders, {rounds * one:.0f} s")
    return timing.interleaved(calls, rounds, warmup=0, clock=clock), moved


def _rows(
    case: Case,
    contenders: dict[str, Contender],
    times: dict[str, list[float]],
    moved: int,
    counted: dict[str, memory.Taken],
) -> list[Row]:
    copied = moved / statistics.median(times[COPY])  # bytes a second
    median = {name: statistics.median(found) for name, found in times.items()}
    if ONE_PASS in times:
        plain, measuring = _one_pass(times[ONE_PASS])
        median[ONE_PASS] = plain + max(0.0, measuring - plain) / case.K / MEASURE_EVERY
    over = case.over if case.over in median else next(iter(median))
    found = []
    for name in median:
        of = contenders.get(name)
        summary = timing.summary(times[name])
        must = moved if name == COPY else of.bytes if of is not None else None
        row = case.row(
            name,
            p20=summary["p20"],
            p50=summary["p50"],
            p80=summary["p80"],
            ratio=median[name] / median[over],
            over=over,
            bytes=must,
            of_copy=must / median[name] / copied if must else None,
            rounds=len(times[name]),
        )
        extra: dict[str, Any] = {}
        if name == ONE_PASS:
            extra = {"ms_amortised": 1e3 * median[name], "ms_measuring_all": 1e3 * measuring}
        if case.level == "step" and name == ROWS and BARE in median:
            # What the rows move on top of the bare passes, at the speed of the copy.
            beyond = (4 * case.K + 1) * case.P * case.dtype.itemsize / copied
            extra = {"floor_by_bytes": 1.0 + beyond / median[BARE]}
        if case.level == "step" and LET_GO in median:
            extra["over_let_go"] = median[name] / median[LET_GO]
        found.append(replace(row, detail=row.detail | extra))
        if name in counted:
            taken = counted[name]
            first = {"peak_of_first_steps": taken.first} if name == ONE_PASS else {}
            found.append(case.row(name, "held", p50=float(taken.held), unit="bytes", rounds=1))
            found.append(case.row(name, "peak", p50=float(taken.peak), unit="bytes", rounds=1, detail=first))
    return found


def _one_pass(times: Sequence[float]) -> tuple[float, float]:
    """Medians of the steps of `OnePassDBMTL` that measure nothing, and of those that measure all tasks.

    These are the first, second, fourth, ... up to the 64th; after that one task is measured now and then.
    """
    numbered = list(enumerate(times, 1 + WARMUP))
    measuring = [t for n, t in numbered if n <= 64 and n & (n - 1) == 0]
    plain = [t for n, t in numbered if (n & (n - 1) if n <= 64 else n % MEASURE_EVERY)]
    return statistics.median(plain or times), statistics.median(measuring or times)
