"""The Triton and CUDA kernels on a GPU: parity with the CPU kernels, sizes past 2^31, training."""

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from dbmtl_kernels import backends, ops
from device import (
    BF16,
    DEVICE,
    F32,
    F64,
    GRADS,
    LARGE,
    MARKS,
    ON_GPU,
    PAIRS,
    STATES,
    EngineStep,
    Net,
    assert_accumulates_as_native,
    assert_dense_as_native,
    assert_near,
    assert_same_bits,
    dense,
    numbers,
    row_problem,
    stats,
    there,
)  # fmt: skip

pytestmark = MARKS
SIZES = (1, 7, 33, 1000, 4096, 100003, 1 << 20, (1 << 22) + 16) if ON_GPU else (1, 33, 1000, 4096)
TASKS = (1, 2, 3, 5, 11, 16, 33)
SCALES = ("max", "mean", "median", "min", 0.5)
spell = lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes)  # noqa: E731


# --- The dense op ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", PAIRS, ids=spell)
@pytest.mark.parametrize("size", SIZES)
def test_dense(form, size, dtypes):
    i, j = SIZES.index(size), PAIRS.index(dtypes)
    tasks = TASKS if size < 1 << 20 else TASKS[:4]
    num_tasks, scale = tasks[(i + j) % len(tasks)], SCALES[(2 * i + j) % len(SCALES)]
    for beta in (0.0, 0.5, 0.9) if size <= 100003 else (0.9,):
        grads, ema = (torch.randn(num_tasks, size).to(dtype) for dtype in dtypes)
        assert_dense_as_native(form, grads, ema, beta, scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("num_tasks", TASKS)
def test_dense_every_number_of_tasks_and_scale(gpu, num_tasks, scale):
    assert_dense_as_native(gpu, *torch.randn(2, num_tasks, 1000), 0.5, scale)


def test_the_most_tasks_and_one_more(gpu):
    most = backends.get(gpu).most_tasks(gramian=False)
    assert_dense_as_native(gpu, *torch.randn(2, most, 40), 0.5)
    with pytest.raises(ValueError, match=f"at most {most} tasks, got {most + 1}"):
        dense(gpu, *torch.randn(2, most + 1, 40))
    with pytest.raises(ValueError, match="at most 64"):
        ops.gramian(there(torch.randn(65, 40)), gpu)


@pytest.mark.parametrize("size", [LARGE, SIZES[-2]])
def test_dense_has_the_same_bits_run_after_run(form, size):
    grads, ema = torch.randn(5, size), torch.randn(5, size).bfloat16()
    first = dense(form, grads, ema)
    for _ in range(5 if ON_GPU else 1):
        assert_same_bits(first, dense(form, grads, ema))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_dense_leaves_out_a_nonfinite_task_which_starts_afresh(form, poison):
    grads, ema = torch.randn(2, 3, LARGE)
    grad, _, _ = dense(form, grads[[0, 2]], ema[[0, 2]])
    grads[1, LARGE // 2] = poison
    actual, new, norms = dense(form, grads, ema)
    assert not torch.isfinite(norms[1])
    assert (new[1] == 0).all()
    assert_near(actual, grad, 2e-6)
    healthy = torch.randn(3, LARGE)
    torch.testing.assert_close(dense(form, healthy, new)[1][1], 0.1 * healthy[1])


def test_hundreds_of_dense_calls_of_random_sizes(form):
    rng, waiting = np.random.default_rng(4), []
    for _ in range(300 if ON_GPU else 6):
        num_tasks, size = int(rng.choice([1, 2, 3, 5])), int(rng.integers(1, 30000 if ON_GPU else 300))
        grads, ema = torch.randn(2, num_tasks, size)
        state = there(ema)
        waiting.append((dbk.balance_(there(grads), state, backend=form)[0], state, ema))
        dbk.balance_(grads, ema, backend="native")
        if len(waiting) == 30:  # so many are in line for the barrier
            for grad, state, ema in waiting:
                assert grad.isfinite().all()
                assert_same_bits([state], [ema])
            waiting.clear()


# --- The rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unaligned", [False, True], ids=["aligned", "off by one"])
@pytest.mark.parametrize("step", [32, 7])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("grad_dtypes", [*[(g,) for g in GRADS], GRADS], ids=spell)
def test_accumulate(gpu, grad_dtypes, state, step, unaligned):
    problem = row_problem(state, grad_dtypes, step)
    for decay, gain, scale in ((0.9, 0.1, None), (0.0, 1.0, None), (1.0, 0.3, 1024.0), (0.5, 0.5, 0.0)):
        for in_memory in (False, True):
            assert_accumulates_as_native(gpu, *problem, decay, gain, scale, in_memory, unaligned)


@pytest.mark.parametrize("grad_dtypes", [*[(g,) for g in GRADS], GRADS], ids=spell)
def test_any_nonzero(gpu, grad_dtypes):
    sizes = (1, 7, 33 * LARGE, 5) if ON_GPU else (1, 7, LARGE, 5)
    grads = [torch.zeros(n, dtype=grad_dtypes[i % len(grad_dtypes)], device=DEVICE) for i, n in enumerate(sizes)]
    for grad in grads:
        for _ in range(3 if ON_GPU else 1):  # whoever finds it
            assert not ops.any_nonzero(grads, gpu)
            grad[-1] = torch.finfo(grad.dtype).tiny
            assert ops.any_nonzero(grads, gpu)
            grad[-1] = -0.0
    for grad in grads:
        grad.normal_()
    for _ in range(100 if ON_GPU else 1):
        assert ops.any_nonzero(grads, gpu)


def test_accumulate_many_parameters_and_tables_used_again(gpu):
    sizes = np.random.default_rng(5).integers(1, 300, 1500 if ON_GPU else 40).tolist()
    row, segments, grads = row_problem(F32, (F32,), sizes=sizes)
    actual, sumsq, expected, total = there(row), there(torch.zeros(1).double()), row.clone(), torch.zeros(1).double()
    on_device = [there(g) for g in grads]
    for round_ in range(4):
        if round_ == 2:  # the same addresses, other numbers
            for x in (x for x in (*on_device, *grads) if x is not None):
                x.mul_(-2)
        if round_ == 3:  # other addresses, and another one missing
            grads[7] = None
            on_device = [there(g) for g in reversed(grads)][::-1]
        ops.accumulate_(actual, sumsq, on_device, segments, (0.9, 0.1), None, gpu)
        ops.accumulate_(expected, total, grads, segments, (0.9, 0.1), None, "native")
        assert_same_bits([actual], [expected])
        torch.testing.assert_close(sumsq.cpu(), total, rtol=1e-12, atol=0)


def test_accumulate_nothing(gpu):
    row, sumsq = there(torch.ones(40)), there(torch.ones(1, dtype=F64))
    ops.accumulate_(row, sumsq, [there(torch.empty(0))], torch.tensor([[3, 0]]), (0.9, 0.1), None, gpu)
    assert (row == 1).all()
    assert sumsq.item() == 0


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", GRADS)
def test_combine(gpu, dtype, state):
    for num_tasks, size in ((1, 1), (3, 31), (4, 4096), (11, LARGE)):
        rows = there(torch.randn(num_tasks, size + 5).to(state))[:, 2 : size + 2]
        weights = there(torch.rand(num_tasks, dtype=F64))
        weights[num_tasks // 2] = 0
        rows[num_tasks // 2, 0] = torch.nan  # left out
        for accumulate in (False, True):
            actual, expected = there(torch.ones(2, size, dtype=dtype))
            ops.combine_out(rows, weights, actual, accumulate, gpu)
            ops.combine_out(rows, weights, expected, accumulate, "eager")
            scale = max(1.0, float(expected.abs().max()))
            assert (actual.double() - expected.double()).abs().max() <= scale * max(torch.finfo(dtype).eps, 1e-6)


VARIANTS = (
    "plain", "partial and nonfinite", "scaled and nonfinite", "later in a step", "scaled, nonfinite and inactive",
    "scaled, nonfinite and never passed on", "nonfinite and always passed on",
)  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("state", STATES)
def test_balance_rows(gpu, state, variant):
    num_tasks, size = 5, LARGE + 61  # a multiple of 8
    first = size - size // 2 // 8 * 8
    rows, sumsq = torch.randn(num_tasks, size, dtype=F64).to(state), torch.rand(num_tasks, dtype=F64) * size
    later = variant == "later in a step"
    if "nonfinite" in variant:
        sumsq[1] = rows[1, 3] = torch.inf
    active = torch.arange(num_tasks) != (1 if "inactive" in variant else 2)
    active = active if "partial" in variant or "inactive" in variant else None
    above = torch.inf if "never" in variant else -1.0 if "always" in variant else 1.0
    loss_scale = torch.tensor(1024.0) if "scaled" in variant else None
    found = {}
    for backend in (gpu, "eager"):
        known = stats(num_tasks)
        known.sumsq.copy_(sumsq)
        known.nonfinite.copy_(torch.tensor([later, False, False, True, False]))
        known.nonfinite_steps.copy_(torch.arange(num_tasks))
        outs = [there(torch.ones(first, dtype=F32)), there(torch.ones(size - first, dtype=BF16))]
        mine, ending = there(rows), (there(active), there(loss_scale), above, 1e-8, "max", 0.0, not later, later)
        ops.balance_rows_(ops.BalanceRows(mine, known, outs, [0, first], *ending), backend)
        found[backend] = {**known._asdict(), "rows": mine, "first": outs[0], "second": outs[1]}
    passed_on = variant in ("scaled and nonfinite", "nonfinite and always passed on")
    assert bool(found["eager"]["first"].isnan().all()) == passed_on
    for name, expected in found["eager"].items():
        rtol = {"first": 1e-5, "second": 2.0**-7}.get(name, 1e-12)
        atol = rtol * float(expected.nan_to_num(0).abs().max()) if name in ("first", "second") else 0.0
        torch.testing.assert_close(
            found[gpu][name], expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("num_tasks", [1, 3, 11, 33, 64] if ON_GPU else [1, 3, 17])
def test_gramian(gpu, num_tasks, state):
    for size in (1, 33, LARGE):
        rows = torch.randn(num_tasks, size).to(state)
        gram = ops.gramian(there(rows), gpu).cpu()
        expected = rows.double() @ rows.double().T
        bound = (1e-12 if state == F64 else 1e-5) * float(expected.diagonal().max())
        assert (gram.double() - expected).abs().max() <= bound
        assert torch.equal(gram, gram.T)


def test_memory_and_scratch_may_hold_anything(form):
    grads, ema = torch.randn(2, 5, LARGE)
    step = EngineStep(form)

    def everything():
        for x in (step.rows, *step.stats):
            x.zero_()
        step()
        return [*dense(form, grads, ema), *step.results(), ops.gramian(step.rows, form)]

    first = everything()
    for _ in range(2 if ON_GPU else 0):
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):  # a stream has scratch of its own, allocated then
            sizes = [2**n for n in range(4, 23)] + [LARGE, 5 * LARGE, len(step.out)]
            blocks = [torch.full((n,), torch.nan, device=DEVICE) for n in sizes for _ in range(3)]
            del blocks
            assert_same_bits(first, everything())
            torch.cuda.synchronize()


def test_a_gradient_of_another_device_is_refused_and_the_state_untouched(gpu):
    other = torch.device("cpu" if ON_GPU else "meta")
    row, sumsq, ema = there(torch.ones(40)), there(torch.ones(1, dtype=F64)), there(torch.ones(2, 40))
    named = rf"(?=.*{other.type})(?=.*{DEVICE.type})"
    grads = [there(torch.ones(8)), torch.ones(8, device=other)]
    with pytest.raises(RuntimeError, match=named):
        ops.accumulate_(row, sumsq, grads, torch.tensor([[0, 8], [8, 8]]), (0.5, 0.5), None, gpu)
    with pytest.raises(RuntimeError, match=named):
        dbk.balance_(torch.ones(2, 40, device=other), ema, backend=gpu)
    assert all((x == 1).all() for x in (row, sumsq, ema))


# --- Sizes past 2^31 ------------------------------------------------------------------------------------------


def test_more_than_two_to_the_31_elements(form):
    size, width = (1 << 30, 4096) if ON_GPU else (1 << 12, 64)
    grads, ema, out = (torch.empty(k, size, dtype=BF16, device=DEVICE).normal_() for k in (3, 3, 1))
    looked_at = [slice(start, start + width) for start in (0, size // 3, size // 2 + 5, size - width)]
    before = [[x[:, part].contiguous().cpu() for x in (grads, ema)] for part in looked_at]
    grad, norms = dbk.balance_(grads, ema, backend=form)
    exact = [sum(float(part.double().square().sum()) for part in row.split(1 << 26)) ** 0.5 for row in ema]
    np.testing.assert_allclose(numbers(norms), exact, rtol=1e-6)
    weights = there(torch.tensor(max(exact) / (np.array(exact) + 1e-8)))
    ops.combine_out(ema, weights, out[0], False, form)
    for part, (old_grads, state) in zip(looked_at, before, strict=True):
        dbk.balance_(old_grads, state, backend="native")
        assert_same_bits([ema[:, part]], [state])
        expected = weights.cpu() @ state.double()
        for actual in (grad[part], out[0, part]):
            torch.testing.assert_close(actual.cpu().double(), expected, rtol=2.0**-7, atol=1e-5)
    np.testing.assert_allclose(np.diag(numbers(ops.gramian(ema, form))), np.square(exact), rtol=1e-4)


def test_a_row_of_more_than_two_to_the_31_elements(gpu):
    far = (1 << 31) + 64 if ON_GPU else 1 << 12
    segments = torch.tensor([[0, 1000], [far, 70001], [far + 70016, 333]])
    grads = [there(torch.randn(n)) for n in segments[:, 1].tolist()]
    actual, expected = torch.zeros(2, far + 70400, dtype=BF16, device=DEVICE)
    sums = there(torch.zeros(2, 1, dtype=F64))
    for decay in (0.0, 0.9):
        ops.accumulate_(actual, sums[0], grads, segments, (decay, 0.3), None, gpu)
        ops.accumulate_(expected, sums[1], grads, segments, (decay, 0.3), None, "eager")
    assert torch.equal(actual, expected)
    assert actual[far:].count_nonzero() > 60000
    exact = sum(float(actual[at : at + n].double().square().sum()) for at, n in segments.tolist())
    np.testing.assert_allclose(sums[0].item(), exact, rtol=1e-12)


# --- The engine -----------------------------------------------------------------------------------------------


def flat(grads):
    return torch.cat([grad.detach().double().cpu().reshape(-1) for grad in grads if grad is not None])


@pytest.mark.parametrize("mode", ["plain", "scaled", "partial"])
@pytest.mark.parametrize(("dtype", "beta"), [(F64, 0.9), (F32, 0.9), (F64, 0.0), (F32, 0.0)], ids=str)
def test_training_as_on_the_cpu(gpu, dtype, beta, mode):
    """With a beta of 0, one row against rows."""
    ours, exact = Net().to(DEVICE, dtype), Net().double()
    balancer = dbk.DBMTL(ours.trunk.parameters(), 3, state_dtype=dtype, backend=gpu, beta=beta)
    reference = dbk.DBMTL(exact.trunk.parameters(), 3, state_dtype=F64, beta=beta, keep_rows=True)
    optimizer = torch.optim.SGD(exact.parameters(), lr=0.1 / 1024 if mode == "scaled" else 0.1)
    tolerance = 1e-9 if dtype == F64 else 1e-2  # cuDNN multiplies float32 as TF32
    for _ in range(20 if ON_GPU else 3):
        with torch.no_grad():
            for mine, other in zip(ours.parameters(), exact.parameters(), strict=True):
                mine.copy_(other)
        x, y = torch.randn(16, 2, 8, 8).double(), torch.randn(3, 16, 4).double()
        exact.backward(mode, reference, x, y)
        ours.backward(mode, balancer, x.to(DEVICE, dtype), y.to(DEVICE, dtype))
        for part, other in ((ours.trunk, exact.trunk), (ours.heads, exact.heads)):
            pairs = [(p.grad, q.grad) for p, q in zip(part.parameters(), other.parameters(), strict=True)]
            assert all((mine is None) == (wanted is None) for mine, wanted in pairs)
            assert_near(*(flat(side) for side in zip(*pairs, strict=True)), tolerance)
        np.testing.assert_allclose(numbers(balancer.norms), numbers(reference.norms), rtol=tolerance)
        optimizer.step()
    assert balancer.nonfinite_steps.tolist() == [0, 0, 0]


@pytest.mark.parametrize("form", ["rows", "one row", "one pass"])
@pytest.mark.parametrize("kept", [True, False], ids=["float32 losses", "losses of its dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_mixed_precision_as_float64_on_the_cpu(gpu, dtype, kept, form):
    """Autocast, and a GradScaler; rows take a scale that float16 does not hold."""
    ours, exact = Net().to(DEVICE), Net().double()
    options = {"beta": 0.9 if form == "rows" else 0.0}
    reference = dbk.DBMTL(exact.trunk.parameters(), 3, state_dtype=F64, keep_rows=True, **options)
    make, options = (dbk.OnePassDBMTL, {}) if form == "one pass" else (dbk.DBMTL, {**options, "backend": gpu})
    balancer, optimizer = make(ours.trunk.parameters(), 3, **options), torch.optim.SGD(ours.parameters(), lr=0.0)
    scale = 2.0**10 if form == "one pass" else 2.0**17
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
    for _ in range(1 if form == "one pass" else 3):  # later, its norms are those of earlier steps
        with torch.no_grad():
            for mine, other in zip(ours.parameters(), exact.parameters(), strict=True):
                mine.copy_(other)
        x, y = torch.randn(16, 2, 8, 8).double(), torch.randn(3, 16, 4).double()
        exact.backward("plain", reference, x, y)
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype):
            losses = ours.losses(x.float().to(DEVICE), y.float().to(DEVICE))
        losses = losses if kept else [loss.to(dtype) for loss in losses]
        scaler.scale(balancer(losses)).backward()
        scaler.unscale_(optimizer)
        for part, other in ((ours.trunk, exact.trunk), (ours.heads, exact.heads)):
            mine, wanted = (flat(p.grad for p in net.parameters()) for net in (part, other))
            assert torch.linalg.vector_norm(mine - wanted) < 0.03 * torch.linalg.vector_norm(wanted)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == scale
    assert balancer.nonfinite_steps.tolist() == [0, 0, 0]
