"""Exact DB-MTL in one row against the oracle: every scale, number of tasks, dtype and backend."""

import itertools

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from cases import BACKENDS, BF16, F16, F32, F64, SCALES, SIMULATED, ULP
from problems import state_of

SHAPES = ((5, 7), (4, 3, 2, 2), (1,), (33,))


def problem(num_tasks, dtype, seed=0):
    """Parameters, the second of them channels-last, and (K, P) gradients of very different lengths, of their dtype."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    params[1] = params[1].to(memory_format=torch.channels_last)
    spread = torch.logspace(-2, 2, num_tasks)
    grads = [[(torch.randn(shape, generator=generator) * s).to(dtype) for shape in SHAPES] for s in spread]
    return [p.requires_grad_() for p in params], grads


def losses_of(params, grads, present=None):
    """Losses whose gradients are these, to the bit."""
    return [
        sum((p * g).sum(dtype=torch.float64) for p, g in zip(params, row, strict=True))
        for task, row in enumerate(grads)
        if present is None or task in present
    ]


def flat(tensors):
    return torch.cat([x.detach().reshape(-1).double() for x in tensors]).numpy()


def assert_balanced(balancer, params, grads, scale, dtype, before=0.0):
    matrix = np.stack([flat(row) for row in grads])
    expected, _, norms = oracle.balance(matrix, np.zeros_like(matrix), 0.0, 1e-8, scale)
    weights = oracle.alpha(norms, scale) / (norms + 1e-8)
    if len(grads) == 1 and isinstance(scale, str):
        weights[:] = 1.0
    rounding = 1e-12 if dtype == F64 else 1e-6
    bound = rounding * (np.abs(weights) @ np.abs(matrix)).max() + ULP.get(dtype, 0.0) * np.abs(expected) + 2.0**-24
    np.testing.assert_array_less(np.abs(flat([p.grad for p in params]) - before - expected), bound + 1e-300)
    np.testing.assert_allclose(balancer.norms.double().numpy(), norms, rtol=1e-6)
    np.testing.assert_allclose(balancer.weights.double().numpy(), weights, rtol=1e-6)


def step(how, balancer, losses):
    if how == "call":
        balancer(losses).backward()
        return
    for task, loss in enumerate(losses):
        with balancer.task(task):
            loss.backward()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11, 40])
def test_every_scale(num_tasks, dtype):
    for scale, how in itertools.product(SCALES, ("call", "task")):
        params, grads = problem(num_tasks, dtype)
        balancer = dbk.DBMTL(params, num_tasks, beta=0.0, scale=scale, log_transform=False)
        for _ in range(2):
            for p in params:
                p.grad = None
            step(how, balancer, losses_of(params, grads))
            assert_balanced(balancer, params, grads, scale, dtype)
        assert not state_of(balancer).allocated


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_every_backend(dtype, backend):
    for num_tasks, scale in ((3, "max"),) if backend in SIMULATED else ((1, "max"), (3, "median"), (11, 0.3)):
        params, grads = problem(num_tasks, dtype)
        balancer = dbk.DBMTL(params, num_tasks, beta=0.0, scale=scale, log_transform=False, backend=backend)
        for number in range(1 if dtype in ULP else 2):  # the second time it is added to what was there
            for p in params:
                p.grad = None if number == 0 else torch.ones_like(p)
            step("call", balancer, losses_of(params, grads))
            assert_balanced(balancer, params, grads, scale, dtype, before=float(number))
        rows = dbk.DBMTL(params, num_tasks, beta=0.0, scale=scale, log_transform=False, backend=backend, keep_rows=True)
        step("call", rows, losses_of(params, grads))
        torch.testing.assert_close(balancer.norms, rows.norms, rtol=1e-6, atol=0)
        torch.testing.assert_close(balancer.weights, rows.weights, rtol=1e-6, atol=0)


def test_norms_and_weights_have_the_bits_of_those_of_rows():
    for num_tasks, dtype in itertools.product((1, 3, 11), (F32, F64, BF16, F16)):
        params, grads = problem(num_tasks, dtype)
        one, rows = (
            dbk.DBMTL(
                params, num_tasks, beta=0.0, log_transform=False, keep_rows=keep, backend="native", state_dtype=F64
            )
            for keep in (False, True)
        )
        for balancer in (one, rows):
            step("call", balancer, losses_of(params, grads))
        assert torch.equal(one.norms, rows.norms)
        assert torch.equal(one.weights, rows.weights)


@pytest.mark.parametrize("scale", ["max", "mean", 2.0])
def test_great_and_small_gradients(scale):
    """Norms of 1e-20 to 1e20 beside each other: float64 sums neither overflow nor vanish."""
    params, grads = problem(3, F32)
    grads = [[g / flat(row).std() * s for g in row] for row, s in zip(grads, (1e-20, 1.0, 1e20), strict=True)]
    grads = [[g.float() for g in row] for row in grads]
    balancer = dbk.DBMTL(params, 3, beta=0.0, scale=scale, log_transform=False)
    step("call", balancer, losses_of(params, grads))
    assert_balanced(balancer, params, grads, scale, F32)


@pytest.mark.parametrize("dtypes", [(F32, F64), (BF16, F32), (F16, F64, BF16, F32)], ids=str)
def test_parameters_of_several_dtypes(dtypes):
    params = [torch.randn(n).to(dtype).requires_grad_() for n, dtype in zip((33, 7, 300, 1), dtypes, strict=False)]
    twins = [p.detach().clone().requires_grad_() for p in params]
    for kept, some in ((False, params), (True, twins)):
        balancer = dbk.DBMTL(some, 3, beta=0.0, keep_rows=kept)
        for _ in range(2):  # added to what was there
            balancer([sum((p.double() - t).square().sum() for p in some) + 1 for t in range(3)]).backward()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=max(2e-6, 2 * ULP.get(p.dtype, 0)), atol=1e-6)
