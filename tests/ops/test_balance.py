"""The dense op against the NumPy oracle, the backends against each other, and what must never change a bit."""

import itertools

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from dbmtl_kernels.backends import native

SIZES = (1, 7, 31, 32, 33, 1000, 100003, 1 << 20)
# (grads, ema)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.bfloat16),
]
BETAS = (0.0, 0.5, 0.9)
SCALES = ("max", "mean", "median", "min", 0.7)
BACKENDS = ("native", "triton", "cuda", "eager")
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place, relative


def case(seed):
    """Everything random, from the lists of the issue."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(1, 17)), BETAS[seed % 3], SCALES[seed % 5], 10.0 ** rng.uniform(-6, 6)


def problem(num_tasks, size, grad_dtype, ema_dtype, magnitude=1.0):
    spread = torch.logspace(-2, 2, num_tasks, dtype=torch.float64)[:, None]
    grads = (torch.randn(num_tasks, size, dtype=torch.float64) * spread * magnitude).to(grad_dtype)
    ema = (torch.randn(num_tasks, size, dtype=torch.float64) * spread * magnitude).to(ema_dtype)
    return grads, ema


def relative(actual, expected):
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-300)


def numpy(x):
    return x.double().numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x).removeprefix("torch.") for x in d))
@pytest.mark.parametrize("size", SIZES)
def test_parity_with_the_oracle(size, dtypes, backend):
    grad_dtype, ema_dtype = dtypes
    many = 4 if backend == "triton" else 15  # interpreted
    for seed in range(many if size <= 1000 else 2):
        num_tasks, beta, scale, magnitude = case(seed + 15 * SIZES.index(size))
        if torch.float16 in dtypes:
            magnitude = 1.0
        grads, ema = problem(num_tasks, size, grad_dtype, ema_dtype, magnitude)
        terms = beta * np.abs(numpy(ema)) + (1 - beta) * np.abs(numpy(grads))
        expected, expected_ema, expected_norms = oracle.balance(numpy(grads), numpy(ema), beta, 1e-8, scale)
        grad, norms = dbk.balance_(grads, ema, beta, 1e-8, scale, backend)
        assert grad.shape == (size,)
        assert grad.dtype == grad_dtype
        assert ema.dtype == ema_dtype
        assert norms.shape == (num_tasks,)
        # What was added up bounds the error, not what is left of it: with P = 1 the terms can cancel.
        rounding = 1e-12 if ema_dtype == torch.float64 else 1e-5
        stored = ULP.get(ema_dtype, 0.0)
        row_terms = terms.max(axis=1, keepdims=True)
        assert (np.abs(numpy(ema) - expected_ema) <= stored * np.abs(expected_ema) + rounding * row_terms).all()
        if ema_dtype == torch.bfloat16:  # from here on the stored state is what counts
            expected, _, expected_norms = oracle.balance(numpy(ema), numpy(ema), 0.0, 1e-8, scale)
        assert (np.abs(numpy(norms) - expected_norms) <= rounding * np.sqrt((terms**2).sum(axis=1))).all()
        weights = oracle.alpha(expected_norms, scale) / (expected_norms + 1e-8)
        bound = rounding * np.abs(weights @ terms).max()
        if grad_dtype not in (torch.float32, torch.float64):
            smallest = 2.0**-25 if grad_dtype == torch.float16 else 0.0
            bound = bound + ULP[grad_dtype] * np.abs(expected) + smallest
        inside = np.abs(expected) < (60000 if grad_dtype == torch.float16 else 1e38)
        assert (np.abs(numpy(grad) - expected) <= bound)[inside].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_scale_and_beta(backend, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for num_tasks, beta, scale in itertools.product((1, 2, 3, 4, 16), BETAS, SCALES):
        grads, ema = problem(num_tasks, 1000, dtype, dtype)
        expected, expected_ema, _ = oracle.balance(numpy(grads), numpy(ema), beta, 1e-8, scale)
        grad, _ = dbk.balance_(grads, ema, beta, 1e-8, scale, backend)
        assert relative(numpy(grad), expected) <= tolerance
        assert relative(numpy(ema), expected_ema) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
def test_reference_against_the_oracle(dtype, scale):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, ULP.get(dtype, 0) + 1e-5)
    for num_tasks in (1, 2, 5, 16):
        grads, ema = problem(num_tasks, 1003, dtype, state)
        if dtype == torch.float16:
            grads, ema = grads / 16, ema / 16
        expected, expected_ema, expected_norms = oracle.balance(numpy(grads), numpy(ema), 0.9, 1e-8, scale)
        grad, new_ema, norms = dbk.reference.balance(grads, ema, 0.9, 1e-8, scale)
        assert relative(numpy(new_ema), expected_ema) <= min(tolerance, 1e-5)
        assert relative(numpy(norms), expected_norms) <= min(tolerance, 1e-5)
        assert relative(numpy(grad), expected) <= tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "every second column", "row stride", "expanded", "expanded rows"])
def test_noncontiguous_gradients(backend, layout):
    base = torch.randn(600, 5) if layout == "transposed" else torch.randn(5, 1200)
    grads = {
        "transposed": lambda: base.T,
        "every second column": lambda: base[:, ::2],
        "row stride": lambda: base[:, 17:617],
        "expanded": lambda: base[:, :1].expand(5, 600),
        "expanded rows": lambda: base[:1, :600].expand(5, 600),
    }[layout]()
    ema = torch.randn(5, 600)
    expected, expected_ema, _ = oracle.balance(numpy(grads), numpy(ema))
    grad, _ = dbk.balance_(grads, ema, backend=backend)
    assert relative(numpy(grad), expected) <= 1e-5
    assert relative(numpy(ema), expected_ema) <= 1e-5


def outputs(backend, num_tasks, size, dtypes):
    torch.manual_seed(3)
    grads, ema = problem(num_tasks, size, *dtypes)
    grad, norms = dbk.balance_(grads, ema, 0.9, 1e-8, "max", backend)
    return grad, ema, norms


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", [33, 100003, 1 << 20])
def test_same_bits_for_any_run_thread_count_and_instruction_set(size, dtypes):
    first = outputs("native", 5, size, dtypes)
    assert_same_bits(first, outputs("native", 5, size, dtypes))
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert_same_bits(first, outputs("native", 5, size, dtypes))
    best = native.isa()
    try:
        for isa in ("baseline", "avx2", "avx512")[: ("baseline", "avx2", "avx512").index(best) + 1]:
            native.set_isa(isa)
            assert native.isa() == isa
            assert_same_bits(first, outputs("native", 5, size, dtypes))
    finally:
        native.set_isa(None)
    assert native.isa() == best


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", SCALES)
def test_all_zero_task_is_harmless(backend, scale):
    grads, ema = torch.randn(3, 50), torch.zeros(3, 50)
    grads[1] = 0
    expected, _, _ = oracle.balance(numpy(grads), numpy(ema), 0.5, 1e-8, scale)
    grad, norms = dbk.balance_(grads, ema, 0.5, 1e-8, scale, backend)
    assert norms[1] == 0
    assert torch.isfinite(grad).all()
    assert relative(numpy(grad), expected) <= 1e-5
    grad, _ = dbk.balance_(torch.zeros(3, 50), torch.zeros(3, 50), backend=backend)
    assert (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_task_is_its_ema_unscaled(backend):
    grads, ema = torch.randn(1, 100) * 1e-9, torch.zeros(1, 100)
    grad, _ = dbk.balance_(grads, ema, 0.5, backend=backend)
    assert torch.equal(grad, ema[0])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_nonfinite_task_is_left_out_and_starts_afresh(backend, poison):
    def run(grads, ema):
        if backend == "reference":
            grad, new, norms = dbk.reference.balance(grads, ema, 0.9)
            ema.copy_(new)
            return grad, norms
        return dbk.balance_(grads, ema, 0.9, backend=backend)

    grads, ema = torch.randn(3, 500), torch.randn(3, 500)
    others, others_ema = grads[[0, 2]].clone(), ema[[0, 2]].clone()
    grads[1, 77] = poison
    grad, norms = run(grads, ema)
    expected, expected_ema, _ = oracle.balance(numpy(others), numpy(others_ema))
    assert not torch.isfinite(norms[1])
    assert relative(numpy(grad), expected) <= 1e-5
    assert relative(numpy(ema[[0, 2]]), expected_ema) <= 1e-5
    assert (ema[1] == 0).all()
    healthy = torch.randn(3, 500)
    run(healthy, ema)
    torch.testing.assert_close(ema[1], 0.1 * healthy[1])
    bad = torch.full((2, 10), poison)
    grad, _ = run(bad, ema2 := torch.ones(2, 10))
    assert (grad == 0).all()
    assert (ema2 == 0).all()


@pytest.mark.parametrize("magnitude", [1e-22, 1e30])
def test_sums_of_squares_neither_overflow_nor_vanish(magnitude):
    grads, ema = problem(3, 1000, torch.float32, torch.float32, magnitude)
    expected, _, _ = oracle.balance(numpy(grads), numpy(ema))
    grad, norms = dbk.balance_(grads, ema, backend="native")
    assert torch.isfinite(norms).all()
    assert relative(numpy(grad), expected) <= 1e-5


def test_no_graph_is_recorded():
    grads = torch.randn(3, 40, requires_grad=True) * 2
    grad, norms = dbk.balance_(grads, torch.zeros(3, 40))
    assert not grad.requires_grad
    assert not norms.requires_grad


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_an_idle_task_beside_a_huge_one(backend):
    grads = torch.zeros(2, 8)
    grads[0] = 3e31
    if backend == "reference":
        grad, _, _ = dbk.reference.balance(grads, torch.zeros(2, 8), 0.0)
    else:
        grad, _ = dbk.balance_(grads, torch.zeros(2, 8), 0.0, backend=backend)
    torch.testing.assert_close(grad, grads[0])


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


def test_many_steps_stay_with_the_oracle():
    ema = torch.zeros(4, 3001)
    exact = np.zeros((4, 3001))
    for step in range(1, 51):
        grads = torch.randn(4, 3001) * torch.tensor([[1e-3], [1.0], [5.0], [1e3]])
        beta = 0.9 / step**0.5
        expected, exact, _ = oracle.balance(numpy(grads), exact, beta)
        grad, _ = dbk.balance_(grads, ema, beta)
        assert relative(numpy(grad), expected) <= 1e-5
