"""Every kernel once or twice at small sizes, for compute-sanitizer to watch: ``python sanitize.py [--device cpu]``.

``DBMTL_TEST_BACKEND`` chooses the backend: triton, or cuda (on a CPU: the library that ``DBMTL_EMULATED`` names).
Inputs are made on the CPU, so that few kernels of others run. Prints "every kernel ran" at the end.
"""

import os
import sys

if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from pathlib import Path

import dbmtl_kernels as dbk
import torch
from dbmtl_kernels import ops
from dbmtl_kernels.backends import cuda

DEVICE = torch.device("cpu" if "cpu" in sys.argv else "cuda")
BACKEND = os.environ.get("DBMTL_TEST_BACKEND", "triton")
if BACKEND == "cuda" and DEVICE.type == "cpu":
    cuda.library_path, cuda.SERVES = (lambda: Path(os.environ["DBMTL_EMULATED"])), "cpu"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def there(*shape, dtype=F32):
    return torch.randn(*shape, dtype=F64).to(dtype).to(DEVICE)


def dense():
    """Whole tiles, a rest, an odd size, one element; every form; a broken task; stochastic rounding."""
    for form in ("1", "2") if BACKEND == "triton" else ("1",):
        os.environ["DBMTL_TRITON_LAUNCHES"] = form
        for size in (4096, 3 * 1024 + 8, 2049, 1):
            grads, ema = there(3, size), there(3, size)
            grads[1, size // 2] = torch.inf
            grad, _ = dbk.balance_(grads, ema, backend=BACKEND)
            assert grad.isfinite().all()
            assert ema.isfinite().all()
        dbk.balance_(there(5, 2048, dtype=BF16), there(5, 2048, dtype=BF16), scale="median", backend=BACKEND, seed=1)
    del os.environ["DBMTL_TRITON_LAUNCHES"]


def buffer():
    """Mixed and missing gradients, off by one element, whole chunks and rests; then the end of a step."""
    sizes = (8192, 33, 1, 8200, 0, 77)
    starts = [0, 8192, 8256, 8288, 16512, 16544]
    segments = torch.tensor([[start, size] for start, size in zip(starts, sizes, strict=True)])
    rows = torch.zeros(3, 16640, device=DEVICE)
    sumsq = torch.zeros(3, dtype=F64, device=DEVICE)
    scale = there(1)
    for task, dtypes in enumerate(((F32,), (F32, BF16, F16, F64), (BF16,))):
        grads = [
            there(size + 1, dtype=dtypes[i % len(dtypes)])[task % 2 : size + task % 2] for i, size in enumerate(sizes)
        ]
        grads[1] = None
        last = sumsq[task : task + 1]
        ops.accumulate_(rows[task], last, grads, segments, 0.9, 0.1, scale if task else None, None, BACKEND)
    half = torch.zeros(16640, dtype=BF16, device=DEVICE)
    for given in (None, torch.tensor([0.9, 0.1, 0.0], dtype=F64, device=DEVICE)):
        grads = [there(n) for n in sizes]
        ops.accumulate_(half, sumsq[:1].clone(), grads, segments, 0.9, 0.1, None, 5, BACKEND, given)
    sumsq[2] = torch.inf
    books = [torch.zeros(3, dtype=dtype, device=DEVICE) for dtype in (torch.bool, torch.int64, F64, F64)]
    outs = [torch.zeros(8256, device=DEVICE), torch.zeros(16640 - 8256, dtype=BF16, device=DEVICE)]
    ops.balance_rows_(rows, sumsq, *books, outs, [0, 8256], None, None, 1e-8, "max", 0.0, True, False, BACKEND)
    assert all(out.isfinite().all() for out in outs)
    assert (rows[2] == 0).all()
    for size in (4096, 2051):
        out = torch.zeros(size, device=DEVICE)
        ops.combine_out(rows[:, :size], torch.ones(3, device=DEVICE), out, True, BACKEND)
        assert out.isfinite().all()


def gramian():
    for num_tasks, size in ((3, 4099), (33, 1000)):
        assert ops.gramian(there(num_tasks, size), BACKEND).isfinite().all()


if __name__ == "__main__":
    torch.manual_seed(0)
    for run in (dense, buffer, gramian):
        run()
        print(f"{run.__name__} done", flush=True)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran", flush=True)
