"""All benchmarks of a GPU, most important first: ``python benchmarks/gpu/run.py OUT_DIR``; see ../gpu_suite.sh.

Exit code: 0, 1 if anything went wrong, 3 if all went well but a target was missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
sys.path.insert(0, str(Path(__file__).parents[1]))  # contenders, timing

import torch
from clock import Clock
from dbmtl_kernels import backends
from dense import Dense, has_cuda
from engine import gathering, memory, whole_step
from report import Report

FLOAT, HALF = torch.float32, torch.bfloat16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; no target is judged")
    parser.add_argument("--seconds", type=float, default=130.0, help="after so many no section begins any more")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    tiny = options.dry_run
    if not tiny and not torch.cuda.is_available():
        print("there is no GPU; --dry-run tries the script on a CPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    device = torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())
    timer = Clock(device, 1, 1) if tiny else Clock(device, options.rounds)
    report = Report(options.folder, judge=not tiny, seconds=options.seconds)
    if not has_cuda(device):
        print(f"the cuda backend is not measured: {backends.get('cuda').missing(device)}")
    dense = Dense(report, timer, tiny)
    sections = {
        "dense K=3": partial(dense.large, 3, 100_000_000, FLOAT, FLOAT),
        "dense K=11": partial(dense.large, 11, 50_000_000, FLOAT, FLOAT),
        "dense, 1 M": partial(dense.small, 1_000_000),
        "dense, 2 M": partial(dense.small, 2_000_000),
        "dense, 100 k": partial(dense.small, 100_000),
        "engine": partial(gathering, report, timer, tiny, None),
        "step": partial(whole_step, report, timer, tiny, tf32=False),
        "memory": partial(memory, report, device, tiny),
        "dense bf16": partial(dense.large, 3, 200_000_000, HALF, HALF),
        "dense bf16 gradients": partial(dense.large, 3, 100_000_000, HALF, FLOAT),
        "gramian": partial(dense.gramian, 11, 50_000_000),
        "step, TF32": partial(whole_step, report, timer, tiny, tf32=True),
        # Last, as compiling takes long
        "dense K=3, compiled": partial(dense.large, 3, 100_000_000, FLOAT, FLOAT, with_compile=True),
        "engine, compiled": partial(gathering, report, timer, tiny, dense.compiled),
    }
    for name, run in sections.items():
        report.section(name, run)
    for failure in report.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    for miss in report.missed:
        print(f"MISSED {miss}", file=sys.stderr)
    return 1 if report.failures else 3 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
