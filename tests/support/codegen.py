"""Compiles every Triton kernel as it would be launched, with no GPU, and prints what came out as JSON.

A process of its own (``python codegen.py 80 90 100``), as kernels are plain Python once TRITON_INTERPRET is set. Triton
is told that a GPU of the architecture is there, and each launch stops after compiling.
"""

import json
import re
import sys
import tempfile
from collections import Counter
from functools import partial

import sass
import torch
import triton
from dbmtl_kernels.backends.arguments import BalanceRows, Stats
from dbmtl_kernels.backends.triton import launches
from dbmtl_kernels.backends.triton.tuning import choose
from dbmtl_kernels.ops.arguments import check_accumulate
from machine import machine

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KERNELS = {
    kernel.__name__: kernel
    for kernel in (launches.balance_kernel, *vars(launches.row_kernels).values())
    if isinstance(kernel, triton.runtime.JITFunction) and kernel.__name__.endswith("_kernel")
}


def balance(num_tasks, size, grad, state, scale="max", form=1):
    launches.driver.launches = lambda device: (form, "")
    grads, ema = torch.zeros(num_tasks, size, dtype=grad), torch.zeros(num_tasks, size, dtype=state)
    launches.balance_(grads, ema, 0.9, 1e-8, scale, 0.0)


def accumulate(dtypes, state, sizes=(8192, 77), loss_scale=None, step=32, task=0, coefficients=(0.9, 0.1)):
    """Parameters of ``sizes``, each on a multiple of ``step`` elements of the row."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // step) * step)
    grads = [torch.zeros(n, dtype=dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]
    segments = torch.tensor([[start, size] for start, size in zip(starts, sizes, strict=False)])
    # The sums of all tasks lie in one tensor, as the engine has them: every second one on 16 bytes.
    row, sumsq = (
        None if state is None else torch.zeros(starts[-1], dtype=state),
        torch.zeros(4, dtype=F64)[task : task + 1],
    )
    given = check_accumulate(row, sumsq, grads, segments, coefficients, loss_scale)
    launches.accumulate_(row, sumsq, given, segments, coefficients, loss_scale)


def combine(num_tasks, size, dtype, out=None):
    rows = torch.zeros(num_tasks, size, dtype=dtype)
    launches.combine_out(rows, torch.ones(num_tasks), torch.zeros(size, dtype=out or dtype), False)


def balance_rows(num_tasks, outs, state=F32, active=None, loss_scale=None, above=1.0):
    stats = Stats(*(torch.zeros(num_tasks, dtype=dtype) for dtype in (F64, F64, F64, torch.bool, torch.int64)))
    rows = torch.zeros(num_tasks, 4096 * len(outs), dtype=state)
    outs, starts = [torch.zeros(4096, dtype=d) for d in outs], [4096 * i for i in range(len(outs))]
    ending = (active, loss_scale, above, 1e-8, "max", 0.0)
    launches.balance_rows_(BalanceRows(rows, stats, outs, starts, *ending, fresh=True, accumulate=False))


CASES = {
    "dense": partial(balance, 3, 1 << 21, F32, F32),
    "dense small": partial(balance, 3, 1 << 16, F32, F32),
    "dense K=64 median": partial(balance, 64, 1 << 21, F32, F32, "median"),
    "dense bf16, bf16 state": partial(balance, 11, 1 << 21, BF16, BF16),
    "dense fp16, bf16 state": partial(balance, 3, 1 << 21, F16, BF16),
    "dense fp64": partial(balance, 3, 1 << 21, F64, F64),
    "dense bf16": partial(balance, 3, 1 << 21, BF16, F32),
    "dense, two launches": partial(balance, 3, 1 << 21, F32, F32, form=2),
    "dense, odd P": partial(balance, 3, (1 << 21) + 1, F32, F32),
    "dense bf16, odd P": partial(balance, 3, (1 << 21) + 1, BF16, BF16),
    "accumulate fp32": partial(accumulate, [F32], F32),
    "accumulate bf16": partial(accumulate, [BF16], F32),
    "accumulate fp16, scaled": partial(accumulate, [F16], F32, loss_scale=torch.ones(())),
    "accumulate mixed": partial(accumulate, [F32, BF16, F16], F32),
    "accumulate fp32, bf16 state": partial(accumulate, [F32], BF16),
    "accumulate bf16, bf16 state": partial(accumulate, [BF16], BF16),
    "accumulate fp64": partial(accumulate, [F64], F64),
    "accumulate, unaligned row": partial(accumulate, [F32], F32, step=7),
    "sum fp32": partial(accumulate, [F32], None),
    "sum bf16": partial(accumulate, [BF16], None),
    "nonzero": lambda: launches.any_nonzero([torch.zeros(n, dtype=d) for n, d in ((8192, F32), (77, F64), (5, BF16))]),
    "combine fp32": partial(combine, 3, 1 << 16, F32),
    "combine bf16": partial(combine, 11, 1 << 16, BF16),
    "combine, odd P": partial(combine, 3, (1 << 16) + 1, F32),
    "combine bf16, odd P": partial(combine, 5, (1 << 16) + 1, BF16),
    "combine bf16 to fp64": partial(combine, 3, 1 << 16, BF16, F64),
    "combine fp64 to bf16": partial(combine, 3, 1 << 16, F64, BF16),
    "rows fp32": partial(balance_rows, 3, [F32]),
    "rows mixed, scaled, partial": partial(
        balance_rows, 11, [F32, BF16, F16], active=torch.ones(11, dtype=torch.bool), loss_scale=torch.ones(())
    ),
    "rows K=64": partial(balance_rows, 64, [F32]),
    "rows bf16": partial(balance_rows, 3, [BF16], BF16),
    "rows fp32, bf16 state": partial(balance_rows, 3, [F32], BF16),
    "rows bf16 to all": partial(balance_rows, 3, [F32, BF16, F16, F64], BF16),
    "gramian fp32": lambda: launches.gramian(torch.zeros(3, 1 << 16, dtype=F32)),
    "gramian K=64": lambda: launches.gramian(torch.zeros(64, 1 << 16, dtype=F32)),
    "gramian K=64 bf16": lambda: launches.gramian(torch.zeros(64, 1 << 16, dtype=BF16)),
}


def events(ptx):
    """What matters for the order of memory accesses: stores, barriers, atomics, loads and those past the L1 cache."""
    pattern = r"\bst\.global|\bbar\.sync|\b(?:atom|red)\.global[\w.]*|\bld\.global(?:\.gpu\.acquire|\.cg)?"
    found = re.findall(pattern, ptx)
    return [event for i, event in enumerate(found) if i == 0 or event != found[i - 1]]


def main_loops(case, instructions, elements):
    """Loops over whole tiles on 16 bytes: bytes in flight a thread, instructions and slow ones an element.

    ``elements``: of a tile that a thread has.
    """
    # Of two dtypes the narrower is loaded 64 bits at a time; fewer are of a gradient that lies anywhere.
    half = "mixed" in case or ("fp64" not in case and ("bf16" in case or "fp16" in case))
    found = []
    for loop in sass.loops(instructions) if elements else ():  # the Gramian's threads have none of their own
        rows = [one for one in loop.body if one.loads]
        combines = any(".EF" in one.name for one in rows) and not loop.count("STG")
        if combines:  # the others are weights
            rows = [one for one in rows if ".EF" in one.name]
        sizes = {one.loads for one in rows}
        if min(sizes) < (8 if half else 16) or (max(sizes) < 16 and not combines):
            continue
        a_round = 4 * elements if combines else elements  # four rows at a time
        found.append({
            "kind": "combine" if combines else "update", "instructions": len(loop.body) / a_round,
            "slow": loop.slow / a_round, "in_flight": loop.in_flight(rows),
        })  # fmt: skip
    return found


def report(case, arch, kernel, compiled, tuning, line, block):
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = sass.dump("-res-usage", file.name), sass.dump("-sass", file.name)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
    accesses = Counter(
        access.split()[0] + (" 16" if re.search(r", 0x10\b", access) else "")
        for access in re.findall(r"(?:ld|st)\.(?:global|local)[\w:.]*|cp\.async\.c[ag]\.shared\.global[^;]*", ptx)
    )
    threads = 32 * tuning.warps
    return {
        "case": case, "arch": arch, "kernel": kernel.__name__, "registers": registers, "limit": tuning.registers,
        "stack": stack + local, "address64": ".address_size 64" in ptx, "accesses": accesses, "events": events(ptx),
        "fused": sum(1 + bool(pair) for pair in re.findall(r"\bfma\.rn\.f32(x2)?", ptx)), "flushed": ptx.count(".ftz"),
        "cooperative": compiled.metadata.launch_cooperative_grid, "line": line, "claimed": tuning.in_flight,
        "threads": threads * tuning.programs, "elements": block // threads,
        "loops": main_loops(case, sass.parse(code), block // threads),
    }  # fmt: skip


def compile_cases(arch, cases=(), change=lambda tuning: tuning):
    """A report of each kernel that the cases launch, with ``change`` made to the lines of the table."""
    reports, lines = [], []
    triton.runtime.driver.set_active(machine(arch))
    launches.driver.capability = lambda device: divmod(arch, 10)
    launches._dense_plan.cache_clear()

    def chosen(kernel, capability, size):
        tuning = change(choose(kernel, capability, size))
        lines.append(f"{kernel!r}, {capability}: {tuning}")
        return tuning

    launches.choose = chosen
    for case in cases or CASES:

        def compile_only(kernel, grid, *args, tuning, cooperative=False, case=case, **meta):
            compiled = kernel.warmup(*args, grid=(grid,), **meta, **launches._options(tuning, cooperative))
            block = meta.get("BLOCK", tuning.block)
            reports.append(report(case, arch, kernel, compiled, tuning, lines[-1], block))

        launches._launch = compile_only
        CASES[case]()
    return reports


def specialisations():
    """How many times each kernel is compiled in 12 steps of one layout in which every number changes."""
    made, store = {name: set() for name in KERNELS}, torch.zeros(99, dtype=F64)
    launches._launch = lambda kernel, grid, *args, tuning, cooperative=False, **meta: made[kernel.__name__].add(
        kernel.warmup(*args, grid=(grid,), **meta, **launches._options(tuning, cooperative))
    )
    for step in range(12):
        scale = torch.full((7,), 2.0**step)[step % 7]
        for dtypes in ([F32], [BF16]):  # and gradients that come in two dtypes
            for size in (1000, 1008, 16, 1, 4096):  # of one parameter
                for coefficients in ((0.9 / (step + 1), 0.1), store[step : step + 2]):
                    accumulate(dtypes, BF16, (size, 512), scale, task=step % 4, coefficients=coefficients)
        balance_rows(3, [F32], BF16, loss_scale=scale, above=(1.0, float("inf"), -1.0, 0.0)[step % 4])
        balance(3, 4096 + 16 * step, F32, F32)
    return {name: len(found) for name, found in made.items()}


def main(archs):
    asked = []

    def ask(name, count, function, threads, shared):
        asked.append((name, function.value, threads.value, shared.value))
        count._obj.value = 2

    launches.driver._call = ask
    reports = [report for arch in archs for report in compile_cases(arch)]
    doctored = [
        compile_cases(archs[0], ["accumulate fp32"], change)[0]
        for change in (lambda line: line._replace(registers=32), lambda line: line._replace(in_flight=1000))
    ]
    print(json.dumps({
        "kernels": sorted(KERNELS), "reports": reports, "doctored": doctored, "asked": asked,
        "specialisations": specialisations(),
    }))  # fmt: skip


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])
