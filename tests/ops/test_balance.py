"""The dense op against the NumPy oracle, the backends against each other, and what must never change a bit."""

import itertools

import cases
import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from cases import BACKENDS, BF16, F16, F32, F64, REAL, assert_same_bits, dense, numpy, problem, relative

SIZES = (1, 7, 31, 32, 33, 1000, 100003)


def run(grads, ema, beta, scale, backend):
    if backend == "reference":
        return dbk.reference.balance(grads, ema, beta, 1e-8, scale)
    return dense(grads, ema, beta, scale, backend)


def cell(seed):
    """Everything random, from the lists of the issue."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(1, 17)), cases.BETAS[seed % 3], cases.SCALES[seed % 5], 10.0 ** rng.uniform(-6, 6)


@pytest.mark.parametrize(
    ("size", "backend"),
    [*itertools.product(SIZES, (*REAL, "reference")), pytest.param(1 << 20, "native", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("dtypes", cases.DTYPES, ids=lambda d: "-".join(str(x).removeprefix("torch.") for x in d))
def test_parity_with_the_oracle(size, dtypes, backend):
    for seed in range(2 if size > 1000 else 15):
        num_tasks, beta, scale, magnitude = cell(seed + size)
        num_tasks = 1 + num_tasks % 5 if size > 100003 else num_tasks
        grads, ema = problem(num_tasks, size, *dtypes, 1.0 if F16 in dtypes else magnitude)
        cases.assert_like_the_oracle(grads, ema, run(grads, ema, beta, scale, backend), beta, scale)


# (K, P, grads, ema, beta, scale)
CELLS = [
    (1, 1, F32, F32, 0.9, "max"),
    (11, 1003, F32, F32, 0.9, "median"),
    (3, 31, BF16, F32, 0.0, 0.7),
    (2, 20011, F32, BF16, 0.9, "mean"),
    (4, 4097, F16, BF16, 0.5, "max"),
    (5, 333, F64, F64, 0.5, "min"),
]


@pytest.mark.parametrize("backend", cases.SIMULATED)
@pytest.mark.parametrize("case", CELLS, ids=lambda c: f"{c[0]}x{c[1]}")
def test_the_bits_of_the_native_backend(case, backend):
    num_tasks, size, grad_dtype, ema_dtype, beta, scale = case
    grads, ema = problem(num_tasks, size, grad_dtype, ema_dtype)
    grads[0, 0] = -0.0
    result, exact = (dense(grads, ema, beta, scale, name) for name in (backend, "native"))
    assert_same_bits(result[1:2], exact[1:2])
    torch.testing.assert_close(result[2], exact[2], rtol=1e-12 if ema_dtype == F64 else 2e-7, atol=0)
    cases.assert_like_the_oracle(grads, ema, result, beta, scale)


LAYOUTS = {
    "transposed": lambda: torch.randn(600, 5).T,
    "every second column": lambda: torch.randn(5, 1200)[:, ::2],
    "row stride": lambda: torch.randn(5, 1200)[:, 17:617],
    "expanded": lambda: torch.randn(5, 1).expand(5, 600),
    "expanded rows": lambda: torch.randn(1, 600).expand(5, 600),
}


@pytest.mark.parametrize(
    ("layout", "backend"), [*itertools.product(LAYOUTS, REAL), *(("row stride", name) for name in cases.SIMULATED)]
)
def test_noncontiguous_gradients(layout, backend):
    grads, ema = LAYOUTS[layout](), torch.randn(5, 600)
    expected, expected_ema, _ = oracle.balance(numpy(grads), numpy(ema))
    grad, new, _ = dense(grads, ema, 0.9, "max", backend)
    assert relative(numpy(grad), expected) <= 1e-5
    assert relative(numpy(new), expected_ema) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_bfloat16_state_is_rounded_to_nearest_ties_to_even(beta, backend):
    """Halfway between two bfloat16 numbers, both ways, and either side of it."""
    even = torch.tensor([1.0, 1.0 + 2**-7, -1.0, 3.0, 2.0**-130, 0.0]).repeat(50)
    grads = (even + torch.tensor([2.0**-8, -(2.0**-8), 2.0**-9, 1.1 * 2.0**-8, 0.0]).repeat(60))[None]
    ema = torch.randn(1, 300).to(BF16)
    _, new, _ = dense(grads, ema, beta, "max", backend)
    expected = np.float32(1 - beta) * grads.numpy()
    if beta:
        expected = np.float32(beta) * ema.float().numpy() + expected
    bits = expected.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(new.view(torch.int16).numpy().view(np.uint16), nearest)


@pytest.mark.parametrize("backend", REAL)
@pytest.mark.parametrize("scale", cases.SCALES)
def test_all_zero_task_is_harmless(backend, scale):
    grads, ema = torch.randn(3, 50), torch.zeros(3, 50)
    grads[1] = 0
    expected, _, _ = oracle.balance(numpy(grads), numpy(ema), 0.5, 1e-8, scale)
    grad, _, norms = dense(grads, ema, 0.5, scale, backend)
    assert norms[1] == 0
    assert torch.isfinite(grad).all()
    assert relative(numpy(grad), expected) <= 1e-5
    assert (dense(torch.zeros(3, 50), ema, 0.9, scale, backend)[0] == 0).all()


@pytest.mark.parametrize("backend", REAL)
def test_one_task_is_its_ema_unscaled(backend):
    grad, ema, _ = dense(torch.randn(1, 100) * 1e-9, torch.zeros(1, 100), 0.5, "max", backend)
    assert torch.equal(grad, ema[0])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_nonfinite_task_is_left_out_and_starts_afresh(backend, poison):
    grads, ema = torch.randn(3, 500), torch.randn(3, 500)
    grads[1, 77] = poison
    grad, new, norms = run(grads, ema, 0.9, "max", backend)
    expected, expected_ema, _ = oracle.balance(numpy(grads[[0, 2]]), numpy(ema[[0, 2]]))
    assert not torch.isfinite(norms[1])
    assert relative(numpy(grad), expected) <= 1e-5
    assert relative(numpy(new[[0, 2]]), expected_ema) <= 1e-5
    assert (new[1] == 0).all()
    healthy = torch.randn(3, 500)
    torch.testing.assert_close(run(healthy, new, 0.9, "max", backend)[1][1], 0.1 * healthy[1])
    grad, new, _ = run(torch.full((2, 10), poison), torch.ones(2, 10), 0.9, "max", backend)
    assert (grad == 0).all()
    assert (new == 0).all()


@pytest.mark.parametrize("backend", [*REAL, "reference"])
def test_an_idle_task_beside_a_huge_one(backend):
    grads = torch.zeros(2, 8)
    grads[0] = 3e31
    grad, _, _ = run(grads, torch.zeros(2, 8), 0.0, "max", backend)
    torch.testing.assert_close(grad, grads[0])


@pytest.mark.parametrize("magnitude", [1e-22, 1e30])
def test_sums_of_squares_neither_overflow_nor_vanish(magnitude):
    grads, ema = problem(3, 1000, magnitude=magnitude)
    expected, _, _ = oracle.balance(numpy(grads), numpy(ema))
    grad, norms = dbk.balance_(grads, ema, backend="native")
    assert torch.isfinite(norms).all()
    assert relative(numpy(grad), expected) <= 1e-5


def test_no_graph_is_recorded():
    grads = torch.randn(3, 40, requires_grad=True) * 2
    grad, norms = dbk.balance_(grads, torch.zeros(3, 40))
    assert not grad.requires_grad
    assert not norms.requires_grad


def test_autograd_knows_that_the_state_changed():
    ema, x = torch.zeros(2, 8), torch.ones(2, 8, requires_grad=True)
    y = (x * ema).sum()
    dbk.balance_(torch.ones(2, 8), ema)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_empty_rows():
    grad, norms = dbk.balance_(torch.empty(3, 0), torch.empty(3, 0))
    assert grad.shape == (0,)
    assert (norms == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    """Schema, fake and functionalization of the one op that torch knows."""
    arguments = (torch.randn(3, 40), torch.randn(3, 40), 0.9, 1e-8, "max", 0.0, backend)
    results = torch.library.opcheck(torch.ops.dbmtl_kernels.balance_.default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compile_fullgraph(compiler):
    def step(grads, ema):
        grad, norms = dbk.balance_(grads * 2, ema, beta=0.5)
        return grad + 1, norms

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for size in (64, 64, 100):
        grads, ema = torch.randn(3, size), torch.randn(3, size)
        eager_ema = ema.clone()
        expected = step(grads, eager_ema)
        actual = compiled(grads, ema)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(ema, eager_ema)


@pytest.mark.parametrize(
    "backend", ["native", "eager", "cuda", "reference", pytest.param("triton", marks=pytest.mark.interpreter)]
)
def test_a_norm_beyond_float32_is_weighted_and_told_as_the_largest(backend):
    """Not finite is told of a task that sits out alone."""
    grads = torch.tensor([[3e38, 3e38, 3e38, -3e38], [1e38, 0.0, 0.0, 0.0], [torch.inf, 0.0, 0.0, 0.0]])
    ema = torch.zeros(3, 4)
    options = {"beta": 0.0, "scale": 1.0}
    if backend == "reference":
        grad, ema, norms = dbk.reference.balance(grads, ema, **options)
    else:
        grad, norms = dbk.balance_(grads, ema, backend=backend, **options)
    assert norms.tolist() == [torch.finfo(torch.float32).max, grads[1, 0], torch.inf]
    torch.testing.assert_close(grad, torch.tensor([1.5, 0.5, 0.5, -0.5]))
    assert torch.equal(ema, torch.cat([grads[:2], torch.zeros(1, 4)]))
