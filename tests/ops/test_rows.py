"""The ops on rows: accumulate_, balance_rows_, combine and gramian, against float64."""

import functools
import itertools
import math

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import BACKENDS, BF16, F16, F32, F64, GRADS, REAL, SIMULATED, STATES, assert_same_bits, numpy
from dbmtl_kernels import ops, reference
from dbmtl_kernels.backends import native


def expect_row(row, grads, segments, decay, gain):
    new, total = row.double().clone(), 0.0
    for grad, (offset, numel) in zip(grads, segments.tolist(), strict=True):
        part = slice(offset, offset + numel)
        update = 0.0 if grad is None else gain * grad.double().reshape(-1)
        new[part] = decay * row[part].double() + update
        total += float(new[part].square().sum())
    return new, total


@pytest.mark.parametrize("backend", REAL)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("grad_dtypes", [*[(g,) for g in GRADS], GRADS], ids=lambda g: f"{len(g)}-{g[0]}")
def test_accumulate(backend, state, grad_dtypes):
    for decay, gain, scale in ((0.9, 0.1, None), (0.0, 1.0, None), (1.0, 0.3, 1024.0), (0.5, 0.5, 0.0)):
        row, sumsq, grads, segments = cases.row_problem(state, grad_dtypes)
        loss_scale = None if scale is None else torch.tensor(scale)
        exact_gain = gain if scale is None else (gain / scale if scale else 0.0)
        expected, total = expect_row(row, grads, segments, decay, exact_gain)
        before = row.clone()
        ops.accumulate_(row, sumsq, grads, segments, (decay, gain), loss_scale, backend)
        tolerance = {F64: 1e-12, F32: 1e-6, BF16: 2.0**-8 + 1e-6}[state]
        assert (row.double() - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
        gaps = torch.ones(len(row), dtype=torch.bool)
        for offset, numel in segments.tolist():
            gaps[offset : offset + numel] = False
        assert torch.equal(row[gaps], before[gaps])
        stored = row.double()[~gaps].square().sum()
        assert float(sumsq) == pytest.approx(float(stored), rel=1e-6 if backend == "eager" else 1e-12)
        assert float(sumsq) == pytest.approx(total, rel=2.0**-7 if state == BF16 else 1e-5)


@pytest.mark.parametrize("backend", [*REAL, *SIMULATED])
@pytest.mark.parametrize("dtypes", [*((g,) for g in GRADS), GRADS], ids=lambda g: f"{len(g)}-{g[0]}")
def test_any_nonzero(dtypes, backend):
    """A single element, wherever it is; NaN is not zero, -0.0 is."""
    sizes = (5, 40001, 64)
    grads = [torch.full((n,), -0.0 if i % 2 else 0.0, dtype=dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]
    grads.append(torch.zeros(2, 3, 4, 5, dtype=dtypes[0]).to(memory_format=torch.channels_last))
    grads.append(torch.zeros(6, 8, dtype=dtypes[0]).T)
    assert ops.any_nonzero(grads, backend).tolist() == [False]
    for grad in grads:
        values = torch.finfo(grad.dtype).tiny, math.nan, -math.inf
        for value, index in zip(values, (0, grad.numel() // 2, grad.numel() - 1), strict=True):
            at = np.unravel_index(index, grad.shape)
            grad[at] = value
            assert ops.any_nonzero(grads, backend).tolist() == [True], (grad.shape, at, value)
            grad[at] = 0.0
    assert ops.any_nonzero(grads, backend).tolist() == [False]


# (state, dtypes of the gradients, decay, loss scale); segments begin at odd columns
ROWS = [(F32, GRADS, 0.9, None), (BF16, (BF16, F16), 0.0, 1024.0), (BF16, GRADS, 0.9, None), (F64, (F64,), 0.5, 0.0)]


@pytest.mark.parametrize("backend", SIMULATED)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_accumulate_has_the_bits_of_the_native_backend(case, backend):
    state, grad_dtypes, decay, scale = case
    row, _, grads, segments = cases.row_problem(state, grad_dtypes, (5, 33, 1, 8193, 0, 64))
    loss_scale = None if scale is None else torch.tensor(scale)
    rows, sums = torch.stack([row, row]), torch.full((2, 1), 5.0, dtype=F64)
    for mine, sumsq, name in zip(rows, sums, ("native", backend), strict=True):
        ops.accumulate_(mine, sumsq, grads, segments, (decay, 0.7), loss_scale, name)
    assert_same_bits(rows[:1], rows[1:])
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("state", "backend"), [*itertools.product(STATES, REAL), *((BF16, name) for name in SIMULATED)]
)
def test_coefficients_in_memory_give_the_bits_of_two_numbers(state, backend):
    """Read anew by every call, as a replayed graph does; and not changed."""
    row, _, grads, segments = cases.row_problem(state, sizes=(5, 33, 1, 2000, 0, 64))
    row[3:8] = -0.0  # 0 * -0 + g is g, but for a g of -0
    grads[0][:3] = -0.0
    scales = (None, 1024.0, 0.0)
    given = torch.full((2,), math.nan, dtype=F64)
    for decay, scale in itertools.product((0.9, 0.0, 1.0, -0.0, 1e-50), scales if backend in REAL else (None,)):
        loss_scale = None if scale is None else torch.tensor(scale)
        given.copy_(torch.tensor([decay, 0.7], dtype=F64))
        rows, sums = torch.stack([row, row]), torch.full((2, 1), 5.0, dtype=F64)
        for mine, sumsq, coefficients in zip(rows, sums, ((decay, 0.7), given), strict=True):
            ops.accumulate_(mine, sumsq, grads, segments, coefficients, loss_scale, backend)
        assert_same_bits([rows[0], sums[0]], [rows[1], sums[1]])
        assert given.tolist() == [decay, 0.7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulate_reads_any_strides_in_logical_order(backend):
    segments = torch.tensor([[0, 12], [12, 12], [24, 8]])
    grads = [torch.randn(4, 3).T, torch.randn(3, 8)[:, ::2], torch.randn(1, 1).expand(2, 4)]
    row, sumsq = torch.zeros(32), torch.zeros(1, dtype=F64)
    ops.accumulate_(row, sumsq, grads, segments, (0.0, 1.0), None, backend)
    torch.testing.assert_close(row, torch.cat([g.reshape(-1) for g in grads]))


@pytest.mark.parametrize("coefficients", [(0.0, 1.0), torch.tensor([0.0, 1.0], dtype=F64)], ids=["two", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulate_without_decay_reads_nothing_of_the_row(backend, coefficients):
    row, sumsq = torch.full((40,), float("nan")), torch.zeros(1, dtype=F64)
    negative = torch.randn(20, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    ops.accumulate_(row, sumsq, [negative, None], torch.tensor([[0, 20], [20, 20]]), coefficients, None, backend)
    torch.testing.assert_close(row, torch.cat([negative, torch.zeros(20)]))
    assert sumsq.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("grad_dtypes", "scale"), [((F32, BF16, F16), None), ((F32,), 1024.0), (GRADS, 0.3), ((F16,), 0.0)]
)
def test_without_a_row_only_the_sum_of_squares_is_computed(grad_dtypes, scale, backend):
    """To the bits of what `accumulate_` tells of a row that keeps nothing, on a kernel; gradients stay as they are."""
    state = F64 if F64 in grad_dtypes else F32
    row, _, grads, segments = cases.row_problem(state, grad_dtypes, (5, 33, 1, 8193, 0, 64))
    before = [None if grad is None else grad.clone() for grad in grads]
    loss_scale = None if scale is None else torch.tensor(scale)
    sums = torch.full((3, 1), math.nan, dtype=F64)
    ops.accumulate_(row, sums[0], grads, segments, (0.0, 0.7), loss_scale, backend)
    ops.accumulate_(None, sums[1], grads, segments, (0.9, 0.7), loss_scale, backend)
    ops.accumulate_(None, sums[2], grads, segments, torch.tensor([math.nan, 0.7], dtype=F64), loss_scale, backend)
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-12 if backend in (*SIMULATED, "eager") else 0, atol=0)
    assert_same_bits(sums[1:2], sums[2:])
    assert_same_bits([x for x in grads if x is not None], [x for x in before if x is not None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_of_squares_of_nothing_of_large_numbers_and_of_what_is_not_finite(backend):
    def measure(*grads):
        sumsq = torch.full((1,), 5.0, dtype=F64)
        segments = torch.tensor([[0, 40]] * len(grads), dtype=torch.int64).reshape(-1, 2)
        ops.accumulate_(None, sumsq, list(grads), segments, (0.0, 1.0), None, backend)
        return float(sumsq)

    large = torch.full((40,), 2.0**100)
    assert [measure(), measure(None)] == [0, 0]
    assert [measure(None, large), measure(large, large)] == pytest.approx([40 * 2.0**200, 80 * 2.0**200], rel=1e-12)
    assert measure(torch.full((40,), math.inf)) == math.inf
    large[17] = math.nan
    assert math.isnan(measure(large))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_do_not_count_may_be_nan(backend):
    for numbers, scale in (((1.0, 0.0), None), (torch.tensor([1.0, 0.0], dtype=F64), None), ((1.0, 0.5), 0.0)):
        row, sumsq = torch.arange(80.0), torch.zeros(2, 1, dtype=F64)
        grads, segments = [torch.full((40,), math.nan), torch.full((40,), math.inf)], torch.tensor([[0, 40], [40, 40]])
        loss_scale = None if scale is None else torch.tensor(scale)
        ops.accumulate_(row, sumsq[0], grads, segments, numbers, loss_scale, backend)
        ops.accumulate_(None, sumsq[1], grads, segments, numbers, loss_scale, backend)
        assert torch.equal(row, torch.arange(80.0))
        assert float(sumsq[0]) == pytest.approx(float(row.double().square().sum()), rel=1e-12)
        assert float(sumsq[1]) == 0


PLAIN = {
    "num_tasks": 3, "state": F32, "outs": ((0, 1003, F32),), "bad": (), "before": (), "active": None, "scale": 1.0,
    "above": 1.0,
}  # fmt: skip
WITHOUT_1 = {"num_tasks": 4, "active": (True, False, True, True)}
STEPS = {
    "plain": {},
    "one task": {"num_tasks": 1},
    "eleven tasks": {"num_tasks": 11, "options": {"scale": "median"}},
    "outs of several dtypes": {"outs": ((0, 500, F32), (512, 64, BF16), (576, 427, F64)), "scale": 0.25},
    "a bfloat16 state": {"state": BF16, "outs": ((0, 1003, BF16),)},
    "a float64 state": {"state": F64, "outs": ((0, 1003, F64),)},
    "not finite": {"bad": (1,)},
    "not finite earlier in the step": {"before": (2,), "options": {"fresh": False}},
    "not finite in an earlier step": {"before": (2,), "options": {"fresh": True}},
    "all not finite": {"bad": (0, 1, 2)},
    "not finite under a loss scale": {"bad": (1,), "scale": 1024.0},
    "not finite under a small loss scale": {"bad": (1,), "scale": 0.5},
    "not finite and never passed on": {"bad": (1,), "scale": 1024.0, "above": math.inf},
    "not finite and always passed on": {"bad": (1,), "above": -1.0},
    "not finite and always passed on, scaled": {"bad": (1,), "scale": 0.5, "above": -1.0},
    "finite where it would be passed on": {"above": -1.0},
    "some active": {**WITHOUT_1, "bad": (3,)},
    "not active and not finite": {**WITHOUT_1, "bad": (1,), "scale": 1024.0, "options": {"scale": "mean"}},
    "not active, not finite earlier": {
        **WITHOUT_1,
        "bad": (1,),
        "before": (1,),
        "scale": 2.0,
        "options": {"scale": "median", "fresh": False},
    },
    "not active, not finite and not passed on": {**WITHOUT_1, "bad": (1,), "above": -1.0, "options": {"scale": "min"}},
    "one of each, passed on": {**WITHOUT_1, "bad": (1, 3), "above": -1.0},
    "added to what is there": {"options": {"accumulate": True}, "scale": 64.0},
    **{f"scale {scale}": {"options": {"scale": scale}} for scale in ("mean", "min")},
    "scale constant": {"options": {"scale": "constant", "constant": 0.7}},
    "one task, constant": {"num_tasks": 1, "options": {"scale": "constant", "constant": 0.7}},
}
SIMULATED_STEPS = (
    "outs of several dtypes", "a bfloat16 state", "some active", "not finite under a loss scale",
    "not active and not finite", "not active, not finite and not passed on", "not finite and never passed on",
    "not finite and always passed on", "not finite and always passed on, scaled",
)  # fmt: skip


def expect_step(rows, before, norms, active, factor, above, options):
    """In NumPy: (rows, weights, nonfinite, what is added to each column)."""
    bad = ~np.isfinite(norms) | (np.zeros_like(before) if options.get("fresh", True) else before)
    used = active & ~bad
    name = options.get("scale", "max")
    scale = options["constant"] if name == "constant" else name
    weights = np.zeros(len(rows))
    if used.any():
        weights[used] = oracle.alpha(norms[used], scale) / (norms[used] + 1e-8)
        if len(rows) == 1 and isinstance(scale, str):
            weights[used] = 1.0
    rows = np.where(bad[:, None], 0.0, rows)
    added = np.full(rows.shape[1], np.nan) if (bad & active).any() and factor > above else factor * (weights @ rows)
    return rows, weights, bad, added


@pytest.mark.parametrize(
    ("name", "backend"), [*itertools.product(STEPS, REAL), *itertools.product(SIMULATED_STEPS, SIMULATED)]
)
def test_balance_rows(name, backend):
    case = PLAIN | STEPS[name]
    options, num_tasks = case.get("options", {}), case["num_tasks"]
    rows = (torch.randn(num_tasks, 1003, dtype=F64) * torch.logspace(-2, 2, num_tasks, dtype=F64)[:, None]).to(
        case["state"]
    )
    sumsq = rows.double().square().sum(1)
    for task in case["bad"]:
        rows[task, 5 * task], sumsq[task] = math.inf, math.nan
    stats = cases.new_stats(num_tasks, sumsq)
    stats.nonfinite[list(case["before"])] = True
    stats.nonfinite_steps[0] = 3
    active = None if case["active"] is None else torch.tensor(case["active"])
    everyone = np.ones(num_tasks, dtype=bool) if active is None else active.numpy()
    expected, weights, bad, added = expect_step(
        numpy(rows), stats.nonfinite.numpy(), sumsq.sqrt().numpy(), everyone, case["scale"], case["above"], options
    )
    known = stats.nonfinite.numpy() & (not options.get("fresh", True))
    counted = (np.isnan(sumsq.numpy()) & ~known).astype(int) + np.eye(num_tasks, dtype=int)[0] * 3
    outs = [torch.full((numel,), 2.0, dtype=dtype) for _, numel, dtype in case["outs"]]
    loss_scale = None if case["scale"] == 1.0 else torch.tensor(case["scale"])
    starts = [start for start, *_ in case["outs"]]
    options = {"active": active, "loss_scale": loss_scale, "propagate_above": case["above"], **options}
    ops.balance_rows_(cases.step_of(rows, stats, outs, starts, **options), backend)

    covered = np.concatenate([np.arange(start, start + numel) for start, numel, _ in case["outs"]])
    assert np.array_equal(numpy(rows)[:, covered], expected[:, covered])
    assert np.array_equal(stats.nonfinite.numpy(), bad)
    assert stats.nonfinite_steps.tolist() == counted.tolist()
    assert np.array_equal(stats.sumsq.numpy(), np.where(bad, 0.0, sumsq.numpy()))
    np.testing.assert_allclose(stats.norms, sumsq.sqrt(), rtol=1e-12)
    np.testing.assert_allclose(stats.weights, weights, rtol=1e-12)
    for out, (start, numel, dtype) in zip(outs, case["outs"], strict=True):
        exact = added[start : start + numel] + (2.0 if options.get("accumulate") else 0.0)
        tolerance = {F64: 1e-12 if case["state"] == F64 else 1e-6, F32: 1e-6, BF16: 2.0**-8 + 1e-6}[dtype]
        bound = tolerance * max(1.0, case["scale"] * np.abs(weights[:, None] * expected).sum(0).max())
        np.testing.assert_allclose(numpy(out), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("backend", REAL)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", GRADS)
def test_combine(backend, state, dtype):
    for num_tasks, size in ((1, 1), (3, 31), (4, 64), (7, 70001)):
        rows = torch.randn(num_tasks, size + 5).to(state)[:, 2 : size + 2]
        weights = torch.rand(num_tasks) + 0.5
        expected = reference.combine(rows.double(), weights.double())
        out = ops.combine(rows, weights, dtype, backend)
        assert out.dtype == dtype
        eps = torch.finfo(dtype).eps if dtype != F64 or state == F64 else 1e-7
        tolerance = max(eps, 1e-12 if state == F64 else 1e-6) * float(expected.abs().max())
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


SHAPES = ((1, 1), (2, 33), (5, 70001), (11, 1000), (64, 40))


@pytest.mark.parametrize(
    ("state", "backend"), [*itertools.product(STATES, REAL), *((BF16, name) for name in SIMULATED)]
)
def test_gramian(backend, state):
    for num_tasks, size in SHAPES if backend in REAL else ((1, 1), (5, 4099), (11, 1000)):
        rows = torch.randn(num_tasks, size).to(state)
        gram = ops.gramian(rows, backend)
        expected = reference.gramian(rows.double())
        assert gram.dtype == (F64 if state == F64 else F32)
        bound = (1e-12 if state == F64 else 1e-5) * expected.diagonal().max()
        assert (gram.double() - expected).abs().max() <= bound
        assert torch.equal(gram, gram.T) or backend == "eager"


@pytest.mark.parametrize("backend", REAL)
def test_rows_that_overlap(backend):
    rows = torch.randn(1, 50).expand(4, 50)
    torch.testing.assert_close(ops.combine(rows, torch.ones(4), None, backend), 4 * rows[0])
    torch.testing.assert_close(ops.gramian(rows, backend), reference.gramian(rows))


def dense_op(size, *dtypes):
    grads, ema = cases.problem(5, size, *dtypes)
    return lambda: cases.dense(grads, ema, 0.9, "max", "native")


def accumulate_op():
    row, sumsq, grads, segments = cases.row_problem(F32, sizes=(100003, 17, 300000))

    def run():
        mine, total = row.clone(), sumsq.clone()
        ops.accumulate_(mine, total, grads, segments, (0.9, 0.1), None, "native")
        return mine, total

    return run


def gramian_op():
    rows = torch.randn(7, 600001)
    return lambda: [ops.gramian(rows, "native")]


@pytest.mark.parametrize(
    "make",
    [
        *(functools.partial(dense_op, n, *dtypes) for n in (33, 100003) for dtypes in cases.DTYPES),
        *(pytest.param(functools.partial(dense_op, 1 << 20, *d), marks=pytest.mark.slow) for d in cases.DTYPES),
        accumulate_op,
        gramian_op,
    ],
)
def test_same_bits_for_any_run_thread_count_and_instruction_set(make):
    run = make()
    first, best, names = run(), native.isa(), ("baseline", "avx2", "avx512")
    try:
        for threads in (1, 2, 3, 5, 7):
            torch.set_num_threads(threads)
            assert_same_bits(first, run())
            for isa in names[: names.index(best) + 1]:
                native.set_isa(isa)
                assert native.isa() == isa
                assert_same_bits(first, run())
            native.set_isa(None)
    finally:
        native.set_isa(None)
    assert native.isa() == best
