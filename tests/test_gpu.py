"""The GPU kernels of a backend against the CPU kernels: `bash benchmarks/gpu_suite.sh OUT_DIR` runs these."""

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from dbmtl_kernels import backends, ops
from device import (
    BACKEND,
    DEVICE,
    FORMS,
    GRADS,
    LARGE,
    ON_GPU,
    SEEDS,
    SIZES,
    STATES,
    TASKS,
    assert_accumulates_as_native,
    assert_like_the_oracle,
    assert_nobody_waits,
    both_forms,
    dense,
    in_memory,
    row_problem,
    there,
    workspace,
)
from test_balance import DTYPES, SCALES, assert_same_bits, problem

pytestmark = pytest.mark.gpu


# --- The dense op ---------------------------------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x).removeprefix("torch.") for x in d))
@pytest.mark.parametrize("size", SIZES)
def test_dense_parity_with_the_oracle(size, dtypes, form, monkeypatch):
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", form)
    i, j = SIZES.index(size), DTYPES.index(dtypes)
    tasks = TASKS if size < 1 << 20 else TASKS[:4]
    num_tasks, scale = tasks[(i + j) % len(tasks)], SCALES[(2 * i + j) % len(SCALES)]
    for beta in (0.0, 0.5, 0.9) if size <= 100003 else (0.9,):
        grads, ema = problem(num_tasks, size, *dtypes)
        assert_like_the_oracle(grads, ema, dense(grads, ema, beta, scale), beta, scale)
    assert_nobody_waits()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("num_tasks", TASKS)
def test_every_number_of_tasks_and_scale(num_tasks, scale, monkeypatch):
    forms = list(FORMS)
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", forms[(TASKS.index(num_tasks) + SCALES.index(scale)) % len(forms)])
    grads, ema = problem(num_tasks, 1000, torch.float32, torch.float32)
    assert_like_the_oracle(grads, ema, dense(grads, ema, 0.5, scale), 0.5, scale)


@both_forms
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x).removeprefix("torch.") for x in d))
@pytest.mark.parametrize("size", (33, 100003, 1 << 20) if ON_GPU else (33, 4096))
def test_state_has_the_bits_of_the_cpu_kernels(size, dtypes, form, monkeypatch):
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", form)
    for beta, seed in zip((0.0, 0.5, 0.9), SEEDS if dtypes[1] == torch.bfloat16 else (None,) * 3, strict=True):
        for used in {seed, None}:
            grads, ema = problem(3, size, *dtypes)
            actual = dense(grads, ema, beta, seed=used)
            grad, norms = dbk.balance_(grads, ema, beta, backend="native", seed=used)
            assert_same_bits([actual[1]], [ema])
            # Norms of float32 come in float32: sums that agree to 1e-12 may still be rounded apart.
            rounding = 1e-12 if norms.dtype == torch.float64 else 1.2e-7
            torch.testing.assert_close(actual[2], norms, rtol=rounding, atol=0)
            eps = torch.finfo(grad.dtype).eps
            torch.testing.assert_close(actual[0], grad, rtol=2 * eps, atol=2e-6 * float(grad.abs().max()))


@both_forms
@pytest.mark.parametrize("size", [LARGE, SIZES[-2]])
def test_the_same_bits_run_after_run(size, form, monkeypatch):
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", form)
    grads, ema = problem(5, size, torch.float32, torch.bfloat16)
    first = dense(grads, ema, seed=7)
    for _ in range(5 if ON_GPU else 1):
        assert_same_bits(first, dense(grads, ema, seed=7))


@both_forms
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_nonfinite_task_is_left_out_and_starts_afresh(poison, form, monkeypatch):
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", form)
    grads, ema = torch.randn(3, LARGE), torch.randn(3, LARGE)
    others, others_ema = grads[[0, 2]].clone(), ema[[0, 2]].clone()
    grads[1, LARGE // 2] = poison
    grad, new, norms = dense(grads, ema)
    assert not torch.isfinite(norms[1])
    assert (new[1] == 0).all()
    assert_like_the_oracle(others, others_ema, (grad, new[[0, 2]], norms[[0, 2]]), 0.9, "max")
    healthy = torch.randn(3, LARGE)
    torch.testing.assert_close(dense(healthy, new)[1][1], 0.1 * healthy[1])


@both_forms
def test_hundreds_of_calls_of_random_sizes(form, monkeypatch):
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", form)
    rng, waiting = np.random.default_rng(4), []
    for call in range(300 if ON_GPU else 6):
        num_tasks, size = int(rng.choice([1, 2, 3, 5])), int(rng.integers(1, 30000 if ON_GPU else 300))
        grads, ema = torch.randn(num_tasks, size), torch.randn(num_tasks, size)
        state = there(ema)
        grad, _ = dbk.balance_(there(grads), state, backend=BACKEND)
        dbk.balance_(grads, ema, backend="native")
        waiting.append((grad, state, ema))
        if call % 30 == 29 or not ON_GPU:  # so many wait in line for the barrier
            assert_nobody_waits()
            for grad, state, ema in waiting:
                assert grad.isfinite().all()
                assert_same_bits([state.cpu()], [ema])
            waiting.clear()


# --- The task-gradient buffer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unaligned", [False, True], ids=["aligned", "off by one"])
@pytest.mark.parametrize("step", [32, 7])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("grad_dtypes", [*[(g,) for g in GRADS], GRADS], ids=lambda g: f"{len(g)}-{g[0]}")
def test_accumulate_as_native(grad_dtypes, state, step, unaligned):
    for index, (decay, gain, scale) in enumerate(
        ((0.9, 0.1, None), (0.0, 1.0, None), (1.0, 0.3, 1024.0), (0.5, 0.5, 0.0))
    ):
        row, segments, bases, shift = row_problem(state, grad_dtypes, step, unaligned)
        seed = (*SEEDS, None)[index] if state == torch.bfloat16 else None
        assert_accumulates_as_native(row, segments, bases, shift, decay, gain, scale, seed)


@pytest.mark.parametrize("state", STATES)
def test_accumulate_with_coefficients_in_memory(state):
    for index, (decay, gain, scale) in enumerate(((0.9, 0.1, None), (0.0, 1.0, 8.0), (1.0, 0.3, 1024.0))):
        row, segments, bases, shift = row_problem(state, GRADS, 32)
        seed = SEEDS[index] if state == torch.bfloat16 else None
        given = in_memory(decay, gain, seed)
        assert_accumulates_as_native(row, segments, bases, shift, decay, gain, scale, seed, given)


def test_accumulate_many_parameters_and_tables_used_again():
    sizes = np.random.default_rng(5).integers(1, 300, 1500 if ON_GPU else 40).tolist()
    row, segments, bases, _ = row_problem(torch.float32, (torch.float32,), 32, sizes=sizes)
    actual, sumsq, expected, total = there(row), there(torch.zeros(1).double()), row.clone(), torch.zeros(1).double()
    on_device = [there(b) for b in bases]
    for round_ in range(4):
        if round_ == 2:  # the same addresses, other numbers
            for mine, other in zip(on_device, bases, strict=True):
                if mine is not None:
                    mine.mul_(-2)
                    other.mul_(-2)
        if round_ == 3:  # other addresses, and another one missing
            bases[7] = None
            on_device = [there(b) for b in reversed(bases)][::-1]
        ops.accumulate_(actual, sumsq, on_device, segments, 0.9, 0.1, None, None, BACKEND)
        ops.accumulate_(expected, total, bases, segments, 0.9, 0.1, None, None, "native")
        assert_same_bits([actual.cpu()], [expected])
        torch.testing.assert_close(sumsq.cpu(), total, rtol=1e-12, atol=0)


def test_accumulate_nothing():
    row, sumsq = there(torch.ones(40)), there(torch.ones(1, dtype=torch.float64))
    ops.accumulate_(row, sumsq, [there(torch.empty(0))], torch.tensor([[3, 0]]), 0.9, 0.1, None, None, BACKEND)
    assert (row == 1).all()
    assert sumsq.item() == 0


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", GRADS)
def test_combine_as_eager(dtype, state):
    for num_tasks, size in ((1, 1), (3, 31), (4, 4096), (11, LARGE)):
        rows = there(torch.randn(num_tasks, size + 5).to(state))[:, 2 : size + 2]
        weights = there(torch.rand(num_tasks, dtype=torch.float64))
        weights[num_tasks // 2] = 0
        rows[num_tasks // 2, 0] = torch.nan  # left out
        for accumulate in (False, True):
            actual, expected = there(torch.ones(2, size, dtype=dtype))
            ops.combine_out(rows, weights, actual, accumulate, BACKEND)
            ops.combine_out(rows, weights, expected, accumulate, "eager")
            scale = max(1.0, float(expected.abs().max()))
            assert (actual.double() - expected.double()).abs().max() <= scale * max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("variant", ["plain", "partial and broken", "scaled and broken", "later in a step"])
@pytest.mark.parametrize("state", STATES)
def test_balance_rows_as_eager(state, variant):
    num_tasks, size = 5, LARGE + 61  # a multiple of 8
    sizes = (size - size // 2 // 8 * 8, size // 2 // 8 * 8)
    books = {
        "rows": torch.randn(num_tasks, size, dtype=torch.float64).to(state),
        "sumsq": torch.rand(num_tasks, dtype=torch.float64) * size,
        "broken": torch.tensor([variant == "later in a step", False, False, True, False]),
        "nonfinite_steps": torch.arange(num_tasks),
        "norms": torch.full((num_tasks,), torch.nan, dtype=torch.float64),
        "weights": torch.full((num_tasks,), torch.nan, dtype=torch.float64),
    }
    if "broken" in variant:
        books["sumsq"][1] = torch.inf
        books["rows"][1, 3] = torch.inf
    active = torch.tensor([True, True, False, True, True]) if variant == "partial and broken" else None
    loss_scale = torch.tensor(1024.0) if "scaled" in variant else None
    found = {}
    for backend in (BACKEND, "eager"):
        mine = {name: there(tensor) for name, tensor in books.items()}
        outs = [
            there(torch.ones(n, dtype=dtype)) for n, dtype in zip(sizes, (torch.float32, torch.bfloat16), strict=True)
        ]
        later = variant == "later in a step"
        ops.balance_rows_(
            *mine.values(), outs, [0, sizes[0]], there(active), there(loss_scale), 1e-8, "max", 0.0, not later, later,
            backend,
        )  # fmt: skip
        found[backend] = {**mine, "first": outs[0], "second": outs[1]}
    assert_nobody_waits()
    for name, expected in found["eager"].items():
        rtol = 2.0**-7 if name == "second" else 1e-5 if name == "first" else 1e-12
        atol = rtol * float(expected.nan_to_num(0).abs().max()) if name in ("first", "second") else 0.0
        torch.testing.assert_close(
            found[BACKEND][name], expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("num_tasks", [1, 3, 11, 33, 64] if ON_GPU else [1, 3, 17])
def test_gramian(num_tasks, state):
    for size in (1, 33, LARGE):
        rows = torch.randn(num_tasks, size).to(state)
        gram = ops.gramian(there(rows), BACKEND).cpu()
        expected = rows.double() @ rows.double().T
        bound = (1e-12 if state == torch.float64 else 1e-5) * float(expected.diagonal().max())
        assert (gram.double() - expected).abs().max() <= bound
        assert torch.equal(gram, gram.T)


def test_the_most_tasks_and_one_more():
    most = backends.get(BACKEND).most_tasks(gramian=False)
    grads, ema = problem(most, 40, torch.float32, torch.float32)
    assert_like_the_oracle(grads, ema, dense(grads, ema, 0.5, "max"), 0.5, "max")
    with pytest.raises(ValueError, match=f"at most {most} tasks, got {most + 1}"):
        dense(*problem(most + 1, 40, torch.float32, torch.float32))


def test_gramian_of_too_many_tasks():
    with pytest.raises(ValueError, match="at most 64"):
        ops.gramian(there(torch.randn(65, 40)), BACKEND)


@both_forms
def test_scratch_may_hold_anything(form, monkeypatch):
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", form)
    grads, ema = problem(5, LARGE, torch.float32, torch.float32)
    row, segments, bases, _ = row_problem(torch.float32, (torch.float32,), 32)

    def everything():
        rows, sumsq = there(torch.stack([row, 2 * row])), there(torch.zeros(2, dtype=torch.float64))
        for task in (0, 1):
            on_device = [there(b) for b in bases]
            ops.accumulate_(rows[task], sumsq[task : task + 1], on_device, segments, 0.9, 0.1, None, None, BACKEND)
        books = [there(torch.zeros(2, dtype=d)) for d in (torch.bool, torch.int64, torch.float64, torch.float64)]
        out = there(torch.full((len(row),), torch.nan))
        ops.balance_rows_(rows, sumsq, *books, [out], [0], None, None, 1e-8, "max", 0.0, True, False, BACKEND)
        gram = ops.gramian(rows, BACKEND)
        return [*dense(grads, ema), *(x.cpu() for x in (rows, sumsq, *books, out, gram))]

    first = everything()
    for _ in range(2):
        for scratch in workspace()[1]:
            scratch.fill_(torch.nan)
        if ON_GPU:  # and so may the memory that results are allocated from
            blocks = [torch.full((n,), torch.nan, device=DEVICE) for n in (2, 4, 5, 10, 25, LARGE, len(row), 5 * LARGE)]
            del blocks
        assert_same_bits(first, everything())
        assert_nobody_waits()


def test_a_gradient_of_another_device_is_refused_and_the_state_untouched():
    other = torch.device("cpu" if ON_GPU else "meta")
    row, sumsq = there(torch.ones(40)), there(torch.ones(1, dtype=torch.float64))
    named = rf"(?=.*{other.type})(?=.*{DEVICE.type})"
    with pytest.raises(RuntimeError, match=named):
        ops.accumulate_(
            row, sumsq, [there(torch.ones(8)), torch.ones(8, device=other)], torch.tensor([[0, 8], [8, 8]]), 0.5, 0.5,
            None, None, BACKEND,
        )  # fmt: skip
    ema = there(torch.ones(2, 40))
    with pytest.raises(RuntimeError, match=named):
        dbk.balance_(torch.ones(2, 40, device=other), ema, backend=BACKEND)
    for tensor in (row, sumsq, ema):
        assert (tensor == 1).all()
