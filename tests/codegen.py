"""Compiles every Triton kernel ahead of time, as it would be launched, and prints what came out as JSON.

A process of its own (``python codegen.py 80 90 100``), as kernels are plain Python once TRITON_INTERPRET is set. There
is no GPU: Triton is told that one of the architecture is there, and each launch stops after compiling.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from dbmtl_kernels.backends.triton import launches
from triton.backends.compiler import GPUTarget

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BOOKS = (F64, torch.bool, torch.int64, F64, F64)


class Machine:
    """Stands for the driver of a machine with a GPU of an architecture."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


def balance(num_tasks, size, grad, state, scale="max", seed=None, form=1):
    launches.driver.launches = lambda device: (form, "")
    grads, ema = torch.zeros(num_tasks, size, dtype=grad), torch.zeros(num_tasks, size, dtype=state)
    launches.balance_(grads, ema, 0.9, 1e-8, scale, 0.0, seed)


def accumulate(
    dtypes, state, sizes=(8192, 77), seed=None, loss_scale=None, step=32, decay=0.9, task=0, coefficients=None
):
    """Parameters of ``sizes``, each on a multiple of ``step`` elements of the row."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // step) * step)
    grads = [torch.zeros(n, dtype=dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]
    segments = torch.tensor([[start, size] for start, size in zip(starts, sizes, strict=False)])
    # The sums of all tasks lie in one tensor, as the engine has them: every second one on 16 bytes.
    row, sumsq = torch.zeros(starts[-1], dtype=state), torch.zeros(4, dtype=F64)[task : task + 1]
    launches.accumulate_(row, sumsq, grads, segments, decay, 0.1, loss_scale, seed, coefficients)


def combine(num_tasks, size, state, out):
    rows = torch.zeros(num_tasks, size, dtype=state)
    launches.combine_out(rows, torch.ones(num_tasks), torch.zeros(size, dtype=out), False)


def balance_rows(num_tasks, outs, state=F32, active=None, loss_scale=None):
    books = [torch.zeros(num_tasks, dtype=dtype) for dtype in BOOKS]
    rows = torch.zeros(num_tasks, 4096 * len(outs), dtype=state)
    step = launches.EngineStep(
        rows, *books, [torch.zeros(4096, dtype=d) for d in outs], [4096 * i for i in range(len(outs))], active,
        loss_scale, 1e-8, "max", 0.0, True, False,
    )  # fmt: skip
    launches.balance_rows_(step)


def gramian(num_tasks, size, dtype):
    launches.gramian(torch.zeros(num_tasks, size, dtype=dtype))


CASES = {
    "dense": lambda: balance(3, 1 << 21, F32, F32),
    "dense small": lambda: balance(3, 1 << 16, F32, F32),
    "dense K=1": lambda: balance(1, 1 << 16, F32, F32),
    "dense K=16 median": lambda: balance(16, 1 << 21, F32, F32, "median"),
    "dense K=64 median": lambda: balance(64, 1 << 21, F32, F32, "median"),
    "dense bf16, bf16 state": lambda: balance(11, 1 << 21, BF16, BF16, seed=1),
    "dense bf16": lambda: balance(3, 1 << 21, BF16, F32),
    "dense fp16, bf16 state": lambda: balance(3, 1 << 21, F16, BF16),
    "dense fp64": lambda: balance(3, 1 << 21, F64, F64),
    "dense, two launches": lambda: balance(3, 1 << 21, F32, F32, form=2),
    "dense, odd P": lambda: balance(3, (1 << 21) + 1, F32, F32),
    "accumulate fp32": lambda: accumulate([F32], F32),
    "accumulate bf16": lambda: accumulate([BF16], F32),
    "accumulate fp16, scaled": lambda: accumulate([F16], F32, loss_scale=torch.ones(())),
    "accumulate mixed": lambda: accumulate([F32, BF16, F16], F32),
    "accumulate fp32, bf16 state": lambda: accumulate([F32], BF16, seed=1),
    "accumulate bf16, bf16 state": lambda: accumulate([BF16], BF16, seed=1),
    "accumulate fp64": lambda: accumulate([F64], F64),
    "accumulate, unaligned row": lambda: accumulate([F32], F32, step=7),
    "accumulate fp32, coefficients": lambda: accumulate([F32], F32, coefficients=torch.zeros(3).double()),
    "accumulate mixed, coefficients": lambda: accumulate([F32, BF16, F16], F32, coefficients=torch.zeros(3).double()),
    "accumulate bf16, bf16 state, coefficients": lambda: accumulate(
        [BF16], BF16, seed=1, coefficients=torch.zeros(3).double()
    ),
    "accumulate fp64, coefficients": lambda: accumulate([F64], F64, coefficients=torch.zeros(3).double()),
    "combine fp32": lambda: combine(3, 1 << 16, F32, F32),
    "combine K=64": lambda: combine(64, 1 << 16, F32, F32),
    "combine bf16": lambda: combine(11, 1 << 16, BF16, BF16),
    "rows fp32": lambda: balance_rows(3, [F32]),
    "rows mixed, scaled, partial": lambda: balance_rows(
        11, [F32, BF16, F16], active=torch.ones(11, dtype=torch.bool), loss_scale=torch.ones(())
    ),
    "rows K=64": lambda: balance_rows(64, [F32]),
    "rows bf16": lambda: balance_rows(3, [BF16], BF16),
    "gramian fp32": lambda: gramian(3, 1 << 16, F32),
    "gramian K=64": lambda: gramian(64, 1 << 16, F32),
    "gramian K=64 bf16": lambda: gramian(64, 1 << 16, BF16),
}


def dump(option, path):
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def meetings(ptx):
    """What matters where programs meet, in order: stores, barriers of a program, atomics, loads past the cache."""
    pattern = r"\bst\.global|\bbar\.sync|\b(?:atom|red)\.global[\w.]*|\bld\.global\.gpu\.acquire|\bld\.global\.cg"
    found = re.findall(pattern, ptx)
    return [event for i, event in enumerate(found) if i == 0 or event != found[i - 1]]


def report(case, arch, kernel, compiled):
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (dump(option, file.name) for option in ("-res-usage", "-sass"))
    registers, local = map(int, re.search(r"REG:(\d+) .*LOCAL:(\d+)", usage).groups())
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    accesses = {}
    for access in re.findall(r"(?:ld|st)\.(?:global|local)[\w:.]*|cp\.async\.c[ag]\.shared\.global[^;]*", ptx):
        name = " ".join(access.split()[:1]) + (" 16" if re.search(r", 0x10\b", access) else "")
        accesses[name] = accesses.get(name, 0) + 1
    return {
        "case": case, "arch": arch, "kernel": kernel.__name__, "registers": registers, "local": local,
        "spills": spills, "instructions": len(re.findall(r"/\*[0-9a-f]{4}\*/", sass)),
        "warps": compiled.metadata.num_warps, "address64": ".address_size 64" in ptx, "accesses": accesses,
        "meetings": meetings(ptx), "fused": len(re.findall(r"\bfma\.rn\.f32", ptx)), "flushed": ptx.count(".ftz"),
        "cooperative": compiled.metadata.launch_cooperative_grid,
    }  # fmt: skip


def specialisations(in_memory):
    """How many times each kernel is compiled in 12 steps of one layout in which every number changes.

    If ``in_memory``, coefficients lie in a tensor, each step's elsewhere in it.
    """
    store = torch.zeros(99, dtype=F64)
    launches._launch = lambda kernel, grid, *args, tuning, cooperative=False, **meta: kernel.warmup(
        *args, grid=(grid,), **meta, **launches._options(tuning, cooperative)
    )
    before = {name: len(kernel.device_caches[90][0]) for name, kernel in KERNELS.items()}
    for step in range(12):
        scale = torch.full((7,), 2.0**step)[step % 7]
        for dtypes in ([F32], [BF16]):  # and gradients that come in two dtypes
            for size in (1000, 1008, 16, 1, 4096):  # of one parameter
                accumulate(
                    dtypes, BF16, (size, 512), seed=step, loss_scale=scale, decay=0.9 / (step + 1), task=step % 4,
                    coefficients=store[step : step + 3] if in_memory else None,
                )  # fmt: skip
        balance_rows(3, [F32], BF16, loss_scale=scale)
        balance(3, 4096 + 16 * step, F32, F32, form=1)
    return {name: len(kernel.device_caches[90][0]) - before[name] for name, kernel in KERNELS.items()}


KERNELS = {
    kernel.__name__: kernel
    for module in (launches, launches.row_kernels)
    for kernel in vars(module).values()
    if isinstance(kernel, triton.runtime.JITFunction) and kernel.__name__.endswith("_kernel")
}


def main(archs):
    launches._resident_programs = lambda *_: 2
    launches._capability = lambda device: divmod(triton.runtime.driver.active.arch, 10)
    reports = []
    for arch in archs:
        triton.runtime.driver.set_active(Machine(arch))
        launches._dense_plan.cache_clear()
        for case, run in CASES.items():

            def compile_only(kernel, grid, *args, tuning, cooperative=False, case=case, arch=arch, **meta):
                options = launches._options(tuning, cooperative)
                compiled = kernel.warmup(*args, grid=(grid,), **meta, **options)
                reports.append({**report(case, arch, kernel, compiled), "limit": tuning.registers})

            launches._launch = compile_only
            run()
    triton.runtime.driver.set_active(Machine(90))
    made = [specialisations(in_memory) for in_memory in (False, True)]
    print(json.dumps({"kernels": sorted(KERNELS), "reports": reports, "specialisations": made}))


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])
