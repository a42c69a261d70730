"""The device that the GPU tests run on, and what they share.

``DBMTL_TEST_DEVICE=cpu TRITON_INTERPRET=1 pytest --noconftest tests/test_gpu.py tests/test_gpu_engine.py`` runs, on
small sizes, whatever does not need CUDA itself.
"""

import os

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from dbmtl_kernels import ops
from dbmtl_kernels.backends import native
from test_balance import ULP, assert_same_bits

DEVICE = torch.device(os.environ.get("DBMTL_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
needs_cuda = pytest.mark.skipif(not ON_GPU, reason="needs CUDA itself, not the interpreter")
needs_native = pytest.mark.skipif(
    native.missing(torch.device("cpu")) is not None, reason="no native library to compare with"
)
both_forms = pytest.mark.parametrize("form", ["1", "2"], ids=["one-launch", "two-launches"])

SIZES = (1, 7, 33, 1000, 4096, 100003, 1 << 20, (1 << 22) + 16) if ON_GPU else (1, 7, 33, 1000, 4096)
LARGE = 100003 if ON_GPU else 5003
TASKS = (1, 2, 3, 5, 11, 16, 33)
GRADS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATES = (torch.float32, torch.bfloat16, torch.float64)
SEEDS = (0, -1, 123456789123456789)
BACKEND = "triton"


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
    """Of the current stream of the device."""
    from dbmtl_kernels.backends.triton import launches  # not at import: the interpreter is chosen there

    return launches.workspace(torch.empty(0, device=DEVICE).device)


def assert_nobody_waits():
    """The counters of whoever waits or is last are back at zero; the other one counts how often a barrier opened."""
    come, _, ticket, _ = workspace().counters.tolist()
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


def assert_accumulates_as_native(row, segments, bases, shift=0, decay=0.9, gain=0.1, scale=None, seed=None):
    """State bit for bit, gaps untouched; the sum of squares, in float64 on both, but for the order it is summed in."""
    loss_scale = None if scale is None else torch.tensor(scale)
    expected, total = row.clone(), torch.zeros(1, dtype=torch.float64)
    grads = [None if b is None else b[shift:] for b in bases]
    ops.accumulate_(expected, total, grads, segments, decay, gain, loss_scale, seed, "native")
    actual, sumsq = there(row), there(torch.full((1,), torch.nan, dtype=torch.float64))
    on_device = [None if b is None else there(b)[shift:] for b in bases]
    ops.accumulate_(actual, sumsq, on_device, segments, decay, gain, there(loss_scale), seed, BACKEND)
    assert_same_bits([actual.cpu()], [expected])
    torch.testing.assert_close(sumsq.cpu(), total, rtol=1e-12, atol=0)
    assert_nobody_waits()
