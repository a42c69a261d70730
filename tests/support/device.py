"""The device, the backends, and the comparisons of the GPU tests: the CPU kernels are the reference.

``DBMTL_TEST_DEVICE=cpu pytest tests/gpu`` runs, at small sizes, interpreted and emulated, what needs no CUDA itself.
"""

import os

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from dbmtl_kernels import ops
from torch import nn

DEVICE = torch.device(os.environ.get("DBMTL_TEST_DEVICE", "cuda:0"))
ON_GPU = DEVICE.type == "cuda"
MARKS = [pytest.mark.gpu] if ON_GPU else []
needs_cuda = pytest.mark.skipif(not ON_GPU, reason="needs CUDA itself, not the interpreter or the emulation")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
GRADS, STATES = (F32, BF16, F16, F64), (F32, BF16, F64)
PAIRS = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F32), (BF16, F32), (F32, BF16)]  # gradients, state
LARGE = 100003 if ON_GPU else 5003
# What is launched: by form of the dense op, for one row, for the end of a step, for the Gramian.
KERNELS = {
    "triton": (
        ["balance_kernel"],
        "accumulate_kernel",
        "balance_rows_kernel",
        ["gramian_kernel", "add_gramians_kernel"],
    ),
    "cuda": (["balance_kernel"], "accumulate_kernel", "rows_kernel", ["gramian_kernel"]),
}


def there(x):
    """A copy on the device."""
    return None if x is None else x.to(DEVICE, copy=True)


def bits(x):
    x = x.detach().cpu().contiguous()
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(bits(a), bits(b))


def dense(backend, grads, ema, beta=0.9, scale="max"):
    """(grad, ema, norms) of the kernels, back on the CPU; the arguments stay as they are."""
    state = there(ema)
    grad, norms = dbk.balance_(there(grads), state, beta, 1e-8, scale, backend)
    return grad.cpu(), state.cpu(), norms.cpu()


def assert_dense_as_native(backend, grads, ema, beta=0.9, scale="max"):
    """The state bit for bit; sums run in another order, so norms and gradient to the rounding of their dtypes."""
    actual = dense(backend, grads, ema, beta, scale)
    state = ema.clone()
    grad, norms = dbk.balance_(grads, state, beta, 1e-8, scale, "native")
    assert_same_bits([actual[1]], [state])
    torch.testing.assert_close(actual[2], norms, rtol=1e-12 if norms.dtype == F64 else 1.2e-7, atol=0)
    terms = (norms.double().max() / norms.double().clamp_min(1e-30)) @ state.double().abs()
    atol = (1e-12 if state.dtype == F64 else 2e-6) * float(terms.max())
    torch.testing.assert_close(actual[0], grad, rtol=2 * torch.finfo(grad.dtype).eps, atol=atol)


def row_problem(state, grad_dtypes, step=32, unaligned=False, sizes=None):
    """Segments on multiples of ``step`` elements with gaps between, one gradient each, one of them missing."""
    sizes = sizes or (5, 33, 1, 20000 if ON_GPU else 2000, 0, 64, 8192, 8193, 40, LARGE)
    segments, end = [], step
    for size in sizes:
        segments.append([end, size])
        end = -(-(end + size + 1) // step) * step
    row, shift = torch.randn(end, dtype=F64).to(state), int(unaligned)
    bases = [torch.randn(n + shift, dtype=F64).to(grad_dtypes[i % len(grad_dtypes)]) for i, n in enumerate(sizes)]
    grads = [None if i == 2 else base[shift:] for i, base in enumerate(bases)]
    return row, torch.tensor(segments), grads


def assert_accumulates_as_native(
    backend, row, segments, grads, decay=0.9, gain=0.1, scale=None, in_memory=False, unaligned=False
):
    """The state bit for bit, gaps untouched; the sum of squares, in float64 on both, but for the order of the sum."""
    loss_scale = None if scale is None else torch.tensor(scale)
    expected, total = row.clone(), torch.zeros(1, dtype=F64)
    ops.accumulate_(expected, total, grads, segments, (decay, gain), loss_scale, "native")
    actual, sumsq = there(row), there(torch.full((1,), torch.nan, dtype=F64))
    coefficients = there(torch.tensor([decay, gain], dtype=F64)) if in_memory else (decay, gain)
    shift = int(unaligned)
    on_device = [None if g is None else there(torch.cat([g[:shift], g]))[min(shift, len(g)) :] for g in grads]
    ops.accumulate_(actual, sumsq, on_device, segments, coefficients, there(loss_scale), backend)
    assert_same_bits([actual], [expected])
    torch.testing.assert_close(sumsq.cpu(), total, rtol=1e-12, atol=0)
    ops.accumulate_(None, total, grads, segments, (decay, gain), loss_scale, "native")
    ops.accumulate_(None, sumsq, on_device, segments, coefficients, there(loss_scale), backend)
    torch.testing.assert_close(sumsq.cpu(), total, rtol=1e-12, atol=0)


def stats(num_tasks, device=DEVICE):
    wide = [torch.zeros(num_tasks, dtype=F64, device=device) for _ in range(3)]
    counts = [torch.zeros(num_tasks, dtype=dtype, device=device) for dtype in (torch.bool, torch.int64)]
    return ops.Stats(*wide, *counts)


class EngineStep:
    """Rows, gradients of each task, a flat result. A call is a step: `accumulate_` K times, then `balance_rows_`."""

    def __init__(self, backend, num_tasks=3, state=F32):
        row, self.segments, _ = row_problem(state, (F32,), sizes=(LARGE, 7, 4096, 1))
        self.backend = backend
        self.rows = torch.zeros(num_tasks, len(row), dtype=state, device=DEVICE)
        self.out = torch.zeros(len(row), dtype=state, device=DEVICE)
        self.stats = stats(num_tasks)
        self.coefficients = there(torch.tensor([0.9, 0.1], dtype=F64))
        self.grads = [[there(torch.randn(n)) for n in self.segments[:, 1].tolist()] for _ in range(num_tasks)]

    def __call__(self):
        for task, grads in enumerate(self.grads):
            sumsq = self.stats.sumsq[task : task + 1]
            ops.accumulate_(self.rows[task], sumsq, grads, self.segments, self.coefficients, backend=self.backend)
        end = ops.BalanceRows(self.rows, self.stats, [self.out], [0], None, None, 1.0, 1e-8, "max", 0.0, True, False)
        ops.balance_rows_(end, self.backend)

    def results(self):
        return [x.clone() for x in (self.rows, self.out, *self.stats)]


def numbers(x):
    return x.detach().double().cpu().numpy()


def assert_near(actual, expected, tolerance):
    """To ``tolerance`` times the largest element."""
    actual, expected = numbers(actual), numbers(expected)
    assert np.abs(actual - expected).max() <= tolerance * max(1e-30, np.abs(expected).max())


class Net(nn.Module):
    """A small trunk of convolutions, and three heads."""

    def __init__(self):
        super().__init__()
        convolutions = [nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 5, 3, stride=2), nn.Tanh()]
        self.trunk = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(45, 17), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(17, 4) for _ in range(3))

    def losses(self, x, y):
        z = self.trunk(x)
        return [nn.functional.mse_loss(head(z), target) + 0.1 for head, target in zip(self.heads, y, strict=True)]

    def backward(self, mode, balancer, x, y):
        self.zero_grad()
        if mode == "scaled":
            (balancer(self.losses(x, y)) * 1024).backward()
        elif mode == "plain":
            balancer.backward(self.losses(x, y))
        else:  # a step without task 1
            for task in (0, 2):
                with balancer.task(task):
                    dbk.log_transform(self.losses(x, y)[task]).backward()
            balancer.balance()
