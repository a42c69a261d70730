"""What one process measures: methods on one trunk with K tasks, and the rows that this gives."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from dbmtl_kernels.bench import timing
from dbmtl_kernels.bench.results import Row
from torch.profiler import ProfilerActivity, profile, record_function

from .methods import EW, METHODS, A, check, expected, one_pass, plain_sum
from .models import TRUNKS, Backward, Model, Times

DENSE = 64  # steps, at the first of which OnePassDBMTL measures all tasks again and again
BLOCK = 10  # steps, each with one measurement once the dense ones are over
# What rows are of.
STEP, MEASURING, MEAN, FIRST, PART, PEAK = (
    "step", "step that measures one task", "mean step", "first 64 steps", "part of a step", "peak memory",
)  # fmt: skip
PARTS = ("memory", "one backward", "K backwards")


class Case(NamedTuple):
    """What one process measures.

    Attributes:
        part: one of `PARTS`.
        trunk: by its name in `TRUNKS`.
        num_tasks: K.
        methods: by their names in `METHODS`.
        steps: of each method of one backward, after the first `DENSE` of `OnePassDBMTL`.
        visits: how often a method of K backwards is made anew, when it is its turn.
        pairs: steps of it in one visit, each right after equal weighting.
        threads: of PyTorch.
        clock: one of `models.CLOCKS`.
    """

    part: str
    trunk: str
    num_tasks: int
    methods: Sequence[str]
    steps: int
    visits: int
    pairs: int
    threads: int
    clock: str

    def rows(self) -> list[Row]:
        """What is measured, in this process."""
        torch.set_num_threads(self.threads)
        measure = {"memory": _memory, "one backward": _one_backward, "K backwards": _many_backwards}[self.part]
        trunk = TRUNKS[self.trunk]
        detail = {"batch": trunk.batch} | ({"clock": self.clock} if self.part != "memory" else {})
        return [
            replace(row, model=self.trunk, K=self.num_tasks, P=trunk.parameters(), detail={**row.detail, **detail})
            for row in measure(self)
        ]


def _row(what: str, name: str, seconds: Sequence[float], ratio: float, **more: object) -> Row:
    found = timing.summary(list(seconds))
    return replace(Row("price_list", what, name, rounds=len(seconds), ratio=ratio, over=EW, **found), **more)


def _ratio(mine: Sequence[float], base: Sequence[float]) -> float:
    """The median of what each step takes over the one beside it."""
    return statistics.median(a / b for a, b in zip(mine, base, strict=True))


def _verified(name: str, model: Model, backward: Backward, wanted: torch.Tensor) -> None:
    """A first step, whose gradients must be right."""
    torch.manual_seed(1)  # methods that draw lots draw those of `expected`
    model.step(backward)
    check(name, model, wanted)


def _many_backwards(case: Case) -> Iterator[Row]:
    """Methods of K backward passes, each step right after some of equal weighting, on a model of its own.

    A method has a model of its own, made when it is its turn and given up after it: K P numbers are not held by all at
    once. Ratios are medians of those of neighbouring steps: what disturbs the machine disturbs both.
    """
    wanted = expected(case.trunk, case.num_tasks, case.methods)
    plain = Model(case.trunk, case.num_tasks, case.clock)
    mine: dict[str, list[float]] = {name: [] for name in case.methods}
    base: dict[str, list[float]] = {name: [] for name in case.methods}
    parts: list[Times] = []
    neighbours = 1 if case.num_tasks < 10 else 3  # they cost next to nothing then
    for visit in range(case.visits):
        shift = visit % max(1, len(mine))
        for name in [*mine][shift:] + [*mine][:shift]:
            model = Model(case.trunk, case.num_tasks, case.clock)
            backward = METHODS[name].make(model)
            _verified(name, model, backward, wanted[name])
            for _ in range(case.pairs):
                near = [plain.step(plain_sum) for _ in range(neighbours)]
                parts += near
                base[name].append(statistics.median(sum(times) for times in near))
                mine[name].append(sum(model.step(backward)))
            del model, backward
            gc.collect()
    copies = _copy_bandwidth()
    sums = [sum(times) for times in parts]
    yield _row(STEP, EW, sums, 1.0, detail={"with": "K backwards", "copy_bytes_per_s": copies})
    for index, part in enumerate(Times._fields):
        seconds = [times[index] for times in parts]
        yield _row(PART, part, seconds, statistics.median(seconds) / statistics.median(sums))
    parameters = TRUNKS[case.trunk].parameters()
    for name, times in mine.items():
        moves = METHODS[name].moves
        moved = None if moves is None else 4 * moves(case.num_tasks) * parameters
        yield _row(STEP, name, times, _ratio(times, base[name]), bytes=moved)


def _copy_bandwidth(numel: int = 1 << 24) -> float:
    """Bytes read and written a second by a copy of 64 MB, the median of nine."""
    source, target = torch.ones(numel), torch.zeros(numel)
    seconds = []
    for _ in range(9):
        began = time.process_time()
        target.copy_(source)
        seconds.append(time.process_time() - began)
    return 8 * numel / statistics.median(seconds)


def _one_backward(case: Case) -> Iterator[Row]:
    """Methods of one backward, in turn with equal weighting.

    `OnePassDBMTL` measures all tasks in the first `DENSE` steps again and again. Later rows are of steps that measure
    none, of those that measure one, and of the mean of both: of the ratios of blocks of `BLOCK` steps.
    """
    names = [name for name in case.methods if name != EW]
    wanted = expected(case.trunk, case.num_tasks, names)
    models = {name: Model(case.trunk, case.num_tasks, case.clock) for name in (EW, *names)}
    makers: dict[str, Callable[[Model], Backward]] = {name: METHODS[name].make for name in models}
    backwards = {name: make(models[name]) for name, make in makers.items()}
    for name in names:
        if name != A:
            _verified(name, models[name], backwards[name], wanted[name])
    if A in names:
        first = []
        for step in range(DENSE):
            base = sum(models[EW].step(plain_sum))
            if step == 0:
                began = models[A].step(backwards[A])
                check(A, models[A], wanted[A])
                first.append((sum(began), base))
            else:
                first.append((sum(models[A].step(backwards[A])), base))
        mine, bases = zip(*first, strict=True)
        yield _row(FIRST, A, [sum(mine)], sum(mine) / sum(bases), rounds=1)
    balancer = getattr(backwards.get(A), "__self__", None)
    count = lambda: 0 if balancer is None else balancer.audit.measured  # noqa: E731
    whole: dict[str, list[float]] = {name: [] for name in models}
    measured = [count()]
    for round_ in range(case.steps):
        shift = round_ % len(models)
        for name in [*models][shift:] + [*models][:shift]:
            whole[name].append(sum(models[name].step(backwards[name])))
        measured.append(count())
    yield _row(STEP, EW, whole[EW], 1.0, detail={"with": "one backward"})
    for name in names:
        kinds = {STEP: list(range(case.steps))}
        if name == A:
            kinds = {STEP: [], MEASURING: []}
            for index, (before, after) in enumerate(pairwise(measured)):
                kinds[MEASURING if after > before else STEP].append(index)
        for what, of in kinds.items():
            if of:
                times, base = ([whole[n][i] for i in of] for n in (name, EW))
                yield _row(what, name, times, _ratio(times, base))
        if name == A:
            blocks = range(0, case.steps, BLOCK)
            times, base = ([statistics.mean(whole[n][i : i + BLOCK]) for i in blocks] for n in (A, EW))
            ratio = statistics.mean(a / b for a, b in zip(times, base, strict=True))
            yield _row(MEAN, A, times, ratio, rounds=case.steps)


def _memory(case: Case) -> Iterator[Row]:
    """Peak bytes of tensors over a step; parameters and the optimizer's state left out, a balancer's counted.

    ``bytes`` is what is beyond the peak of equal weighting.
    """
    base = peaks(case.trunk, case.num_tasks, METHODS[EW].make, 2)[1]
    for name in case.methods:
        found: dict[str, int]
        if name == A:  # all tasks are measured in steps 1, 2 and 4, then one in every third
            steps = peaks(case.trunk, case.num_tasks, lambda model: one_pass(model, measure_every=3), 5)
            found = {"": steps[4], "one measured": steps[2], "all measured": steps[3]}
        else:
            found = {"": base if name == EW else peaks(case.trunk, case.num_tasks, METHODS[name].make, 2)[1]}
        for measured, peak in found.items():
            numbers = dict.fromkeys(("p20", "p50", "p80"), float(peak))
            what = f"{PEAK}, {measured}" if measured else PEAK
            yield Row(
                "price_list",
                what,
                name,
                unit="bytes",
                ratio=peak / base,
                over=EW,
                bytes=peak - base,
                rounds=1,
                **numbers,
            )


def peaks(trunk: str, num_tasks: int, make: Callable[[Model], Backward], steps: int) -> list[int]:
    """The most bytes alive in each step, counted by PyTorch's allocator since before the balancer was made."""
    gc.collect()  # what others left is not to be freed, and counted, in between
    model = Model(trunk, num_tasks)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        backward = make(model)
        for index in range(steps):
            with record_function(f"step {index}"):
                model.step(backward)
    # Not public: what is has sums by operator, and no peak.
    events = sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    spans = {e.name(): (e.start_ns(), e.end_ns()) for e in events if e.name().startswith("step ")}
    live, out = 0, [0] * steps
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            if live < 0:
                raise RuntimeError("memory was freed that had been taken before: the peak would be too low")
            for index in range(steps):
                began, ended = spans[f"step {index}"]
                if began <= event.start_ns() <= ended:
                    out[index] = max(out[index], live)
    return out
