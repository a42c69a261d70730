"""Registration (opcheck, torch.compile) and the parity of accumulate_, combine and gramian with float64."""

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels import ops, reference
from dbmtl_kernels.backends import native
from torch.library import opcheck

OPS = torch.ops.dbmtl_kernels
BACKENDS = ("native", "triton", "cuda", "eager")
STATES = (torch.float32, torch.bfloat16, torch.float64)
GRADS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def row_problem(state, grad_dtypes, sizes=(5, 33, 1, 20000, 0, 64)):
    """A row with gaps between its segments, and one gradient a segment."""
    segments, end = [], 3
    for size in sizes:
        segments.append([end, size])
        end += size + 7
    row = torch.randn(end, dtype=torch.float64).to(state)
    grads = [torch.randn(n, dtype=torch.float64).to(grad_dtypes[i % len(grad_dtypes)]) for i, n in enumerate(sizes)]
    return row, torch.zeros(1, dtype=torch.float64), grads, torch.tensor(segments)


def expect_row(row, grads, segments, decay, gain):
    new, total = row.double().clone(), 0.0
    for grad, (offset, numel) in zip(grads, segments.tolist(), strict=True):
        part = slice(offset, offset + numel)
        update = 0.0 if grad is None else gain * grad.double().reshape(-1)
        new[part] = decay * row[part].double() + update
        total += float(new[part].square().sum())
    return new, total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("grad_dtypes", [*[(g,) for g in GRADS], GRADS], ids=lambda g: f"{len(g)}-{g[0]}")
def test_accumulate(backend, state, grad_dtypes):
    for decay, gain, scale in ((0.9, 0.1, None), (0.0, 1.0, None), (1.0, 0.3, 1024.0), (0.5, 0.5, 0.0)):
        row, sumsq, grads, segments = row_problem(state, grad_dtypes)
        grads[2] = None
        loss_scale = None if scale is None else torch.tensor(scale)
        exact_gain = gain if scale is None else (gain / scale if scale else 0.0)
        expected, total = expect_row(row, grads, segments, decay, exact_gain)
        before = row.clone()
        ops.accumulate_(row, sumsq, grads, segments, decay, gain, loss_scale, None, backend)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8 + 1e-6}[state]
        assert (row.double() - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
        gaps = torch.ones(len(row), dtype=torch.bool)
        for offset, numel in segments.tolist():
            gaps[offset : offset + numel] = False
        assert torch.equal(row[gaps], before[gaps])
        stored = row.double()[~gaps].square().sum()
        assert float(sumsq) == pytest.approx(float(stored), rel=1e-6 if backend == "eager" else 1e-12)
        assert float(sumsq) == pytest.approx(total, rel=2.0**-7 if state == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulate_reads_any_strides_in_logical_order(backend):
    segments = torch.tensor([[0, 12], [12, 12], [24, 8]])
    grads = [torch.randn(4, 3).T, torch.randn(3, 8)[:, ::2], torch.randn(1, 1).expand(2, 4)]
    row, sumsq = torch.zeros(32), torch.zeros(1, dtype=torch.float64)
    ops.accumulate_(row, sumsq, grads, segments, 0.0, 1.0, None, None, backend)
    torch.testing.assert_close(row, torch.cat([g.reshape(-1) for g in grads]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulate_without_decay_reads_nothing_of_the_row(backend):
    row, sumsq = torch.full((40,), float("nan")), torch.zeros(1, dtype=torch.float64)
    negative = torch.randn(20, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    ops.accumulate_(row, sumsq, [negative, None], torch.tensor([[0, 20], [20, 20]]), 0.0, 1.0, None, None, backend)
    torch.testing.assert_close(row, torch.cat([negative, torch.zeros(20)]))


def test_accumulate_same_bits_for_any_thread_count_and_instruction_set():
    results = []
    for threads in (1, 2, 5):
        for isa in ("baseline", native.isa()):
            torch.manual_seed(1)
            torch.set_num_threads(threads)
            native.set_isa(isa)
            try:
                row, sumsq, grads, segments = row_problem(torch.float32, GRADS, (100003, 17, 300000))
                ops.accumulate_(row, sumsq, grads, segments, 0.9, 0.1, None, None, "native")
            finally:
                native.set_isa(None)
            results.append((row, sumsq))
    for row, sumsq in results[1:]:
        assert torch.equal(row, results[0][0])
        assert torch.equal(sumsq, results[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", GRADS)
def test_combine(backend, state, dtype):
    for num_tasks, size in ((1, 1), (3, 31), (4, 64), (7, 70001)):
        rows = torch.randn(num_tasks, size + 5).to(state)[:, 2 : size + 2]
        weights = torch.rand(num_tasks) + 0.5
        expected = reference.combine(rows.double(), weights.double())
        out = ops.combine(rows, weights, dtype, backend)
        assert out.dtype == dtype
        eps = torch.finfo(dtype).eps if dtype != torch.float64 or state == torch.float64 else 1e-7
        tolerance = max(eps, 1e-12 if state == torch.float64 else 1e-6) * float(expected.abs().max())
        assert (out.double() - expected).abs().max() <= tolerance
        more = torch.ones(size, dtype=dtype)
        ops.combine_out(rows, weights, more, True, backend)
        assert (more.double() - expected - 1).abs().max() <= 2 * max(tolerance, eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_combine_leaves_out_rows_of_weight_zero_and_passes_nan_weights_on(backend):
    rows = torch.randn(3, 100)
    rows[1] = float("nan")
    out = ops.combine(rows, torch.tensor([1.0, 0.0, 2.0]), None, backend)
    torch.testing.assert_close(out, rows[0] + 2 * rows[2])
    rows[1] = 0
    assert ops.combine(rows, torch.tensor([1.0, float("nan"), 2.0]), None, backend).isnan().all()
    assert (ops.combine(rows, torch.zeros(3), None, backend) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", STATES)
def test_gramian(backend, state):
    for num_tasks, size in ((1, 1), (2, 33), (5, 70001), (11, 1000), (64, 40)):
        rows = torch.randn(num_tasks, size).to(state)
        gram = ops.gramian(rows, backend)
        expected = reference.gramian(rows.double())
        assert gram.dtype == (torch.float64 if state == torch.float64 else torch.float32)
        bound = (1e-12 if state == torch.float64 else 1e-5) * expected.diagonal().max()
        assert (gram.double() - expected).abs().max() <= bound
        assert torch.equal(gram, gram.T) or backend == "eager"


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_overlap(backend):
    rows = torch.randn(1, 50).expand(4, 50)
    torch.testing.assert_close(ops.combine(rows, torch.ones(4), None, backend), 4 * rows[0])
    torch.testing.assert_close(ops.gramian(rows, backend), reference.gramian(rows))


def test_gramian_same_bits_for_any_thread_count_and_instruction_set():
    rows = torch.randn(7, 600001)
    first = ops.gramian(rows, "native")
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(first, ops.gramian(rows, "native"))
    try:
        native.set_isa("baseline")
        assert torch.equal(first, ops.gramian(rows, "native"))
    finally:
        native.set_isa(None)


CHECKS = {
    "balance_": lambda b: (torch.randn(3, 40), torch.randn(3, 40), 0.9, 1e-8, "max", 0.0, None, b),
    "accumulate_": lambda b: (
        torch.randn(40),
        torch.zeros(1, dtype=torch.float64),
        [torch.randn(4), None, torch.randn(2, 3)],
        torch.tensor([[0, 4], [8, 5], [32, 6]]),
        0.9,
        0.1,
        torch.tensor(2.0),
        None,
        b,
    ),
    "balance_rows_": lambda b: (
        torch.randn(3, 40),
        torch.rand(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        [torch.zeros(32), torch.zeros(8, dtype=torch.bfloat16)],
        [0, 32],
        torch.tensor([True, False, True]),
        torch.tensor(2.0),
        1e-8,
        "max",
        0.0,
        True,
        False,
        b,
    ),
    "combine_out": lambda b: (torch.randn(3, 40), torch.rand(3), torch.zeros(40), True, b),
    "combine": lambda b: (torch.randn(3, 40), torch.rand(3), torch.bfloat16, b),
    "gramian": lambda b: (torch.randn(3, 40), b),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKS)
def test_opcheck(name, backend):
    results = opcheck(getattr(OPS, name).default, CHECKS[name](backend))
    assert results
    assert set(results.values()) == {"SUCCESS"}, results


def test_compile_fullgraph():
    def step(grads, ema):
        grad, norms = dbk.balance_(grads * 2, ema, beta=0.5)
        return grad + 1, norms

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    for size in (64, 64, 100):
        grads, ema = torch.randn(3, size), torch.randn(3, size)
        eager_ema = ema.clone()
        expected = step(grads, eager_ema)
        actual = compiled(grads, ema)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(ema, eager_ema)


@pytest.mark.parametrize("scale", ["max", "mean", "median", "min", 0.5])
def test_weights_agree_with_the_reference(scale):
    for norms in (
        [1.0],
        [0.0],
        [3.0, 0.0, 1.0],
        [4.0, 1.0, 2.0, 8.0],
        [1.0, float("inf"), 3.0],
        [float("nan")] * 2,
    ):
        x = torch.tensor(norms, dtype=torch.float64)
        ours = dbk.weighting.max_norm_weights(x, 1e-8, scale)
        torch.testing.assert_close(ours, reference.weights(x, 1e-8, scale), rtol=1e-12, atol=0)
    active = torch.tensor([True, False, True])
    partial = dbk.weighting.max_norm_weights(torch.tensor([2.0, 100.0, 4.0]), 1e-8, scale, active)
    torch.testing.assert_close(partial[active], reference.weights(torch.tensor([2.0, 4.0]), 1e-8, scale))
    assert partial[1] == 0
