"""The device and the backend that the GPU tests run on, and what they share.

``DBMTL_TEST_BACKEND`` is "triton" or "cuda". ``DBMTL_TEST_DEVICE=cpu TRITON_INTERPRET=1 pytest --noconftest
tests/test_gpu.py tests/test_gpu_engine.py`` runs, on small sizes, whatever does not need CUDA itself; so does
``DBMTL_TEST_DEVICE=cpu DBMTL_TEST_BACKEND=cuda``, with the CUDA kernels emulated.
"""

import os
import tempfile
from pathlib import Path

import dbmtl_kernels as dbk
import emulator
import numpy as np
import oracle
import pytest
import torch
from dbmtl_kernels import backends, ops
from dbmtl_kernels.backends import cuda
from test_balance import ULP, assert_same_bits

DEVICE = torch.device(os.environ.get("DBMTL_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
BACKEND = os.environ.get("DBMTL_TEST_BACKEND", "triton")
needs_cuda = pytest.mark.skipif(not ON_GPU, reason="needs CUDA itself, not the interpreter or the emulation")
# Of the dense op; the CUDA kernels have but one.
FORMS = {"1": "one-launch", "2": "two-launches"} if BACKEND == "triton" else {"1": "one-launch"}
both_forms = pytest.mark.parametrize("form", FORMS, ids=FORMS.values())
# What is launched: for each form of the dense op, for one row, for the end of a step, for the Gramian.
if BACKEND == "triton":
    DENSE_LAUNCHES = {"1": ["balance_kernel"], "2": ["update_kernel", "combine_kernel"]}
    ROW_LAUNCHES, END_LAUNCHES = ["accumulate_kernel"], ["balance_rows_kernel"]
    GRAMIAN_LAUNCHES = ["gramian_kernel", "add_gramians_kernel"]
else:
    DENSE_LAUNCHES = {"1": ["balance_kernel"]}
    ROW_LAUNCHES, END_LAUNCHES, GRAMIAN_LAUNCHES = ["accumulate_kernel"], ["rows_kernel"], ["gramian_kernel"]

SIZES = (1, 7, 33, 1000, 4096, 100003, 1 << 20, (1 << 22) + 16) if ON_GPU else (1, 7, 33, 1000, 4096)
LARGE = 100003 if ON_GPU else 5003
TASKS = (1, 2, 3, 5, 11, 16, 33)
GRADS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATES = (torch.float32, torch.bfloat16, torch.float64)
SEEDS = (0, -1, 123456789123456789)


def emulate():
    """The `cuda` backend serves CPU tensors, for as long as this process runs."""
    with tempfile.TemporaryDirectory() as folder:  # once loaded, a library needs its file no longer
        library = emulator.build(Path(folder))
        cuda.library_path, cuda.SERVES = (lambda: library), "cpu"
        cuda._load.cache_clear()
        backends.clear_cache()
        assert cuda.missing(torch.device("cpu")) is None


if BACKEND == "cuda" and not ON_GPU:
    emulate()


def there(x):
    """A copy on the device."""
    return None if x is None else x.to(DEVICE, copy=True)


def numpy(x):
    return x.detach().double().cpu().numpy()


def dense(grads, ema, beta=0.9, scale="max", seed=None):
    """(grad, ema, norms) of the kernels, back on the CPU; the arguments stay as they are."""
    state = there(ema)
    grad, norms = dbk.balance_(there(grads), state, beta, 1e-8, scale, BACKEND, seed=seed)
    return grad.cpu(), state.cpu(), norms.cpu()


def workspace():
    """Scratch of the current stream of the device: its four counters, and all that may hold anything."""
    device = torch.empty(0, device=DEVICE).device
    if BACKEND == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream if ON_GPU else 0
        space = cuda._workspaces[device, stream]
        return space[:16].view(torch.int32), [space[256:].view(torch.float64)]
    from dbmtl_kernels.backends.triton import launches  # not at import: the interpreter is chosen there

    space = launches.workspace(device)
    return space.counters, [space._slots, space._weights]


def short(name):
    """Of one of our CUDA kernels as a profiler calls it, mangled or not, its own name; others as they are."""
    if BACKEND != "cuda" or "dbmtl" not in name:
        return name
    kernels = ("balance_kernel", "accumulate_kernel", "rows_kernel", "gramian_kernel")
    return next((kernel for kernel in kernels if kernel in name), name)


def assert_nobody_waits():
    """The counters of whoever waits or is last are back at zero; the other one counts how often a barrier opened."""
    come, _, ticket, _ = workspace()[0].tolist()
    assert (come, ticket) == (0, 0)


def assert_like_the_oracle(grads, ema, result, beta, scale):
    """As `test_balance.test_parity_with_the_oracle`: what was added up bounds the error."""
    grad, new, norms = result
    assert (grad.dtype, new.dtype, grad.shape) == (grads.dtype, ema.dtype, (ema.shape[1],))
    rounding, stored = (1e-12 if ema.dtype == torch.float64 else 1e-5), ULP.get(ema.dtype, 0.0)
    terms = beta * np.abs(numpy(ema)) + (1 - beta) * np.abs(numpy(grads))
    expected, expected_ema, expected_norms = oracle.balance(numpy(grads), numpy(ema), beta, 1e-8, scale)
    slack = rounding * terms.max(axis=1, keepdims=True)
    assert (np.abs(numpy(new) - expected_ema) <= stored * np.abs(expected_ema) + slack).all()
    if ema.dtype == torch.bfloat16:  # from here on the stored state is what counts
        expected, _, expected_norms = oracle.balance(numpy(new), numpy(new), 0.0, 1e-8, scale)
    assert (np.abs(numpy(norms) - expected_norms) <= rounding * np.sqrt((terms**2).sum(axis=1))).all()
    weights = oracle.alpha(expected_norms, scale) / (expected_norms + 1e-8)
    bound = rounding * np.abs(weights @ terms).max()
    if grads.dtype in ULP:
        bound = bound + ULP[grads.dtype] * np.abs(expected) + (2.0**-25 if grads.dtype == torch.float16 else 0.0)
    inside = np.abs(expected) < (60000 if grads.dtype == torch.float16 else 1e38)
    assert (np.abs(numpy(grad) - expected) <= bound)[inside].all()


def row_problem(state, grad_dtypes, step, unaligned=False, sizes=None):
    """Segments on multiples of ``step`` elements with gaps between, one gradient each, one of them missing."""
    sizes = sizes or ((5, 33, 1, 20000, 0, 64, 8192, 8193, 40, 100003) if ON_GPU else (5, 33, 1, 2000, 0, 64, 8193, 40))
    segments, end = [], step
    for size in sizes:
        segments.append([end, size])
        end = -(-(end + size + 1) // step) * step
    row = torch.randn(end, dtype=torch.float64).to(state)
    shift = int(unaligned)
    bases = [
        torch.randn(n + shift, dtype=torch.float64).to(grad_dtypes[i % len(grad_dtypes)]) for i, n in enumerate(sizes)
    ]
    bases[2] = None
    return row, torch.tensor(segments), bases, shift


def in_memory(decay, gain, seed):
    """As `ops.accumulate_` takes its coefficients."""
    return torch.cat([torch.tensor([decay, gain], dtype=torch.float64), torch.tensor([seed or 0]).view(torch.float64)])


def assert_accumulates_as_native(
    row, segments, bases, shift=0, decay=0.9, gain=0.1, scale=None, seed=None, coefficients=None
):
    """State bit for bit, gaps untouched; the sum of squares, in float64 on both, but for the order it is summed in."""
    loss_scale = None if scale is None else torch.tensor(scale)
    expected, total = row.clone(), torch.zeros(1, dtype=torch.float64)
    grads = [None if b is None else b[shift:] for b in bases]
    ops.accumulate_(expected, total, grads, segments, decay, gain, loss_scale, seed, "native")
    actual, sumsq = there(row), there(torch.full((1,), torch.nan, dtype=torch.float64))
    on_device = [None if b is None else there(b)[shift:] for b in bases]
    ops.accumulate_(
        actual, sumsq, on_device, segments, decay, gain, there(loss_scale), seed, BACKEND, there(coefficients)
    )
    assert_same_bits([actual.cpu()], [expected])
    torch.testing.assert_close(sumsq.cpu(), total, rtol=1e-12, atol=0)
    assert_nobody_waits()
