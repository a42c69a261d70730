"""Problems for the ops, and what their results are held to."""

import dbmtl_kernels as dbk
import numpy as np
import oracle
import torch
from dbmtl_kernels.backends.arguments import BalanceRows, Stats

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKENDS = ("native", "eager", "triton", "cuda")
REAL = ("native", "eager")  # on a CPU; the others are interpreted or emulated, and are slow
SIMULATED = ("triton", "cuda")
DTYPES = [(F32, F32), (F64, F64), (BF16, F32), (F16, F32), (F32, BF16), (BF16, BF16), (F16, BF16)]  # (grads, ema)
STATES = (F32, BF16, F64)
GRADS = (F32, F64, BF16, F16)
BETAS = (0.0, 0.5, 0.9)
SCALES = ("max", "mean", "median", "min", 0.7)
ULP = {BF16: 2.0**-8, F16: 2.0**-11}  # half a unit in the last place, relative


def problem(num_tasks, size, grad_dtype=F32, ema_dtype=F32, magnitude=1.0):
    """(grads, ema), rows of very different lengths."""
    spread = torch.logspace(-2, 2, num_tasks, dtype=F64)[:, None]
    return tuple(
        (torch.randn(num_tasks, size, dtype=F64) * spread * magnitude).to(dtype) for dtype in (grad_dtype, ema_dtype)
    )


def numpy(x):
    return x.double().numpy()


def relative(actual, expected):
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-300)


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def assert_like_the_oracle(grads, ema, result, beta, scale):
    """``result`` is (grad, new ema, norms). What was added up bounds the error: with P = 1 the terms can cancel."""
    grad, new, norms = result
    assert (grad.dtype, new.dtype, norms.dtype) == (grads.dtype, ema.dtype, F64 if ema.dtype == F64 else F32)
    assert (grad.shape, norms.shape) == ((ema.shape[1],), (ema.shape[0],))
    rounding, stored = (1e-12 if ema.dtype == F64 else 1e-5), ULP.get(ema.dtype, 0.0)
    terms = beta * np.abs(numpy(ema)) + (1 - beta) * np.abs(numpy(grads))
    expected, expected_ema, expected_norms = oracle.balance(numpy(grads), numpy(ema), beta, 1e-8, scale)
    slack = rounding * terms.max(axis=1, keepdims=True)
    assert (np.abs(numpy(new) - expected_ema) <= stored * np.abs(expected_ema) + slack).all()
    if ema.dtype == BF16:  # from here on the stored state is what counts
        expected, _, expected_norms = oracle.balance(numpy(new), numpy(new), 0.0, 1e-8, scale)
    assert (np.abs(numpy(norms) - expected_norms) <= rounding * np.sqrt((terms**2).sum(axis=1))).all()
    weights = oracle.alpha(expected_norms, scale) / (expected_norms + 1e-8)
    bound = rounding * np.abs(weights @ terms).max()
    if grads.dtype in ULP:
        bound = bound + ULP[grads.dtype] * np.abs(expected) + (2.0**-25 if grads.dtype == F16 else 0.0)
    inside = np.abs(expected) < (60000 if grads.dtype == F16 else 1e38)
    assert (np.abs(numpy(grad) - expected) <= bound)[inside].all()


def dense(grads, ema, beta, scale, backend):
    """(grad, new ema, norms); ``ema`` itself is left as it is."""
    new = ema.clone()
    grad, norms = dbk.balance_(grads, new, beta, 1e-8, scale, backend)
    return grad, new, norms


def row_problem(state, grad_dtypes=GRADS, sizes=(5, 33, 1, 20000, 0, 64)):
    """A row with gaps between its segments, one gradient a segment, the third of them missing."""
    segments, end = [], 3
    for size in sizes:
        segments.append([end, size])
        end += size + 7
    row = torch.randn(end, dtype=F64).to(state)
    grads = [torch.randn(n, dtype=F64).to(grad_dtypes[i % len(grad_dtypes)]) for i, n in enumerate(sizes)]
    grads[2] = None
    return row, torch.full((1,), torch.nan, dtype=F64), grads, torch.tensor(segments)


def new_stats(num_tasks, sumsq=None):
    zeros = [torch.zeros(num_tasks, dtype=dtype) for dtype in (F64, F64, F64, torch.bool, torch.int64)]
    if sumsq is not None:
        zeros[0].copy_(sumsq)
    return Stats(*zeros)


def step_of(rows, stats, outs, starts=(0,), **changes):
    """The arguments of `ops.balance_rows_`, plain ones but for ``changes``."""
    options = {
        "active": None, "loss_scale": None, "propagate_above": 1.0, "eps": 1e-8, "scale": "max", "constant": 0.0,
        "fresh": True, "accumulate": False,
    }  # fmt: skip
    return BalanceRows(rows, stats, list(outs), list(starts), **(options | changes))
