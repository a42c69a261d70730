"""The Triton backend: launches, bytes, bits, workspaces. No GPU is needed."""

from importlib import import_module

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from buffers import defer
from dbmtl_kernels import backends, ops
from dbmtl_kernels.backends.arguments import BalanceRows, Stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytestmark = pytest.mark.interpreter
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAUNCHES = "DBMTL_TRITON_LAUNCHES"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture
def launches():
    backends.resolve("triton", CPU)
    return import_module("dbmtl_kernels.backends.triton.launches")


@pytest.fixture
def launched(launches, monkeypatch):
    """The (kernel, grid) of every launch, in order."""
    seen, launch = [], launches._launch

    def record(kernel, grid, *args, **options):
        seen.append((kernel.__name__, grid))
        with _disable_current_modes():  # what the interpreter does with tensors is its own affair
            launch(kernel, grid, *args, **options)

    monkeypatch.setattr(launches, "_launch", record)
    return seen


class Traffic:
    """The address and size of every element that kernels load and store, an entry for each access."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpreterBuilder

        self.loads, self.stores = [], []

        def watch(name, into, mask_at):
            access = getattr(InterpreterBuilder, name)

            def watched(builder, pointers, *rest):
                mask = np.broadcast_to(rest[mask_at].data.astype(bool), pointers.data.shape)
                into.append((pointers.data[mask].ravel(), pointers.get_element_ty().primitive_bitwidth // 8))
                return access(builder, pointers, *rest)

            monkeypatch.setattr(InterpreterBuilder, name, watched)

        watch("create_masked_load", self.loads, 0)
        watch("create_masked_store", self.stores, 1)


def inside(addresses, tensor):
    return addresses[(addresses >= tensor.data_ptr()) & (addresses < tensor.data_ptr() + tensor.nbytes)]


def nbytes(accesses, *tensors):
    """Of those in the tensors, each; then of all others."""
    counts = [sum(size * len(inside(at, tensor)) for at, size in accesses) for tensor in tensors]
    return [*counts, sum(size * len(at) for at, size in accesses) - sum(counts)]


def row_of(sizes, dtype, step=32, off=0, dtypes=(F32,)):
    """A row, segments on multiples of ``step`` elements, and a gradient of each, cut off by ``off`` elements."""
    starts = np.cumsum([0, *(-(-size // step) * step for size in sizes)])
    segments = torch.tensor([[int(start), size] for start, size in zip(starts, sizes, strict=False)])
    grads = [torch.randn(size + off).to(dtypes[i % len(dtypes)])[off:] for i, size in enumerate(sizes)]
    return torch.randn(int(starts[-1])).to(dtype), segments, grads


def balance_rows(rows, outs, starts, active=None, loss_scale=None, scale="max", **flags):
    sumsq = rows.double().square().sum(1)
    norms, weights = torch.full((2, len(rows)), float("nan"), dtype=F64)
    stats = Stats(sumsq, norms, weights, torch.zeros(len(rows), dtype=torch.bool), torch.zeros(len(rows)).long())
    flags = {"propagate_above": 1.0, "fresh": True, "accumulate": False, **flags}
    return BalanceRows(rows, stats, outs, starts, active, loss_scale, eps=1e-8, scale=scale, constant=0.7, **flags)


def same_bits(ours, theirs):
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


# --- launches ---------------------------------------------------------------------------------------------------


def test_the_dense_op_is_one_launch_or_two(launched, monkeypatch):
    for form in (1, 2):
        monkeypatch.setenv(LAUNCHES, str(form))
        dbk.balance_(torch.randn(3, 5000), torch.ones(3, 5000), backend="triton")
        assert [name for name, _ in launched] == ["balance_kernel"] * form
        assert all(grid > 1 for _, grid in launched) == (form == 2)
        launched.clear()


def test_an_engine_step_is_one_launch_a_task_and_one_more(launched):
    trunk = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    trunk[2].to(BF16)
    balancer = dbk.DBMTL(trunk.parameters(), 3, backend="triton")
    for scale in (1.0, 1.0, 1024.0):
        out = trunk[2](trunk[1](trunk[0](torch.randn(5, 8))).to(BF16)).float()
        loss = balancer([(out - t).square().mean() for t in range(3)])
        (loss * scale).backward()
        assert [name for name, _ in launched] == ["accumulate_kernel"] * 3 + ["balance_rows_kernel"]
        launched.clear()
    assert all(torch.isfinite(p.grad).all() for p in trunk.parameters())


def test_on_a_device_a_look_for_zeros_comes_before_each_task(launched):
    """Where the host must not know; unless zeros count."""
    for zeros, names in (("absent", ["any_nonzero_kernel", "accumulate_kernel"]), ("count", ["accumulate_kernel"])):
        trunk = nn.Linear(8, 4)
        balancer = dbk.DBMTL(trunk.parameters(), 3, backend="triton", zero_gradients=zeros)
        engine = balancer._engine
        engine.use(defer(engine.rows))
        for absent in (None, 1):
            out = trunk(torch.randn(5, 8))
            balancer.backward([(out - t).square().mean() * (0.0 if t == absent else 1.0) + 1.0 for t in range(3)])
            assert [name for name, _ in launched] == names * 3 + ["balance_rows_kernel"]
            launched.clear()
            assert (balancer.weights != 0).tolist() == [zeros == "count" or t != absent for t in range(3)]


class Operations(TorchDispatchMode):
    """What PyTorch itself would launch: every operation that is not a view or an allocation."""

    HARMLESS = ("detach", "view", "slice", "as_strided", "empty", "alias", "split", "select", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.split("::")[1].strip("_")
        if not name.startswith(self.HARMLESS):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_pytorch_launches_nothing_beside(launches, launched):
    launches.workspace(CPU)  # made once
    row, segments, grads = row_of((300, 77), F32, dtypes=(F32, BF16))
    sumsq, loss_scale = torch.zeros(1, dtype=F64), torch.tensor(8.0)
    step = balance_rows(torch.randn(2, 64), [torch.empty(64)], [0], loss_scale=loss_scale)
    with Operations() as operations:
        ops.accumulate_(row, sumsq, grads, segments, (0.9, 0.1), loss_scale, "triton")
        ops.balance_rows_(step, "triton")
    assert operations.seen == []
    assert len(launched) == 2


def test_the_cooperative_grid_is_what_the_driver_can_hold(launches, monkeypatch):
    """And no more than there are tiles."""
    grids = []
    monkeypatch.setattr(launches, "INTERPRETED", False)
    launches._dense_plan.cache_clear()
    monkeypatch.setattr(launches, "_launch", lambda kernel, grid, *args, **options: grids.append(grid))
    monkeypatch.setattr(launches.driver, "multiprocessors", lambda device: 10)

    def run(resident, size):
        monkeypatch.setattr(launches, "_resident", {})
        monkeypatch.setattr(launches.driver, "resident_programs", lambda *args: resident)
        launches.balance_(torch.zeros(2, size), torch.zeros(2, size), 0.9, 1e-8, "max", 0.0)

    for resident, size in ((1, 1 << 22), (2, 1 << 22), (9, 1 << 22), (9, 5000)):
        run(resident, size)
    with pytest.raises(RuntimeError, match="balance_kernel does not fit on cpu with 4 warps"):
        run(0, 64)
    launches._dense_plan.cache_clear()
    assert grids == [10, 20, 20, 3]


# --- bytes: the budget of docs/backends.md, to the byte -----------------------------------------------------------


@pytest.mark.parametrize(("form", "dtype", "beta"), [("1", F32, 0.9), ("2", BF16, 0.9), ("1", F32, 0.0)])
def test_bytes_of_the_dense_op(form, dtype, beta, monkeypatch):
    monkeypatch.setenv(LAUNCHES, form)
    grads, ema = torch.randn(2, 3, 50001).to(dtype)
    traffic = Traffic(monkeypatch)
    out, _ = ops.balance_(grads, ema, beta, 1e-8, "max", 0.0, "triton")
    read, written = (nbytes(accesses, grads, ema, out) for accesses in (traffic.loads, traffic.stores))
    assert read[:3] == [grads.nbytes, (2 if beta else 1) * ema.nbytes, 0]  # a state that does not count is not read
    assert written[:3] == [0, ema.nbytes, out.nbytes]
    assert read[3] + written[3] <= 0.01 * (grads.nbytes + 2 * ema.nbytes)


def test_bytes_of_an_engine_step(monkeypatch):
    row, segments, grads = row_of((40000, 77, 9000, 1), F32)
    rows, sumsq, one = row.expand(3, -1).clone(), torch.zeros(3, dtype=F64), sum(g.nbytes for g in grads)
    traffic = Traffic(monkeypatch)
    for task in range(3):
        ops.accumulate_(rows[task], sumsq[task : task + 1], grads, segments, (0.9, 0.1), None, "triton")
    assert nbytes(traffic.stores, rows)[0] == 3 * one
    assert nbytes(traffic.stores, rows)[1] <= 0.01 * one
    read, other = nbytes(traffic.loads, rows)
    assert read == 3 * one
    assert 3 * one <= other <= 1.02 * 3 * one  # the gradients, each once, and the tables
    traffic.loads.clear()
    traffic.stores.clear()
    out = torch.empty_like(row)
    ops.balance_rows_(balance_rows(rows, [out], [0]), "triton")
    assert nbytes(traffic.loads, rows, out)[:2] == [rows.nbytes, 0]
    assert nbytes(traffic.stores, rows, out)[:2] == [0, out.nbytes]


def test_bytes_of_a_look_for_zeros(monkeypatch):
    """A block a program of gradients without zeros; of zeros all, once."""
    grads = [torch.randn(3000000), torch.randn(5)]
    traffic = Traffic(monkeypatch)
    assert ops.any_nonzero(grads, "triton")
    assert nbytes(traffic.loads, *grads)[0] <= grads[0].nbytes / 8
    for grad in grads:
        grad.zero_()
    traffic.loads.clear()
    assert not ops.any_nonzero(grads, "triton")
    assert nbytes(traffic.loads, *grads)[:2] == [grad.nbytes for grad in grads]


def test_the_second_phase_walks_backwards(monkeypatch):
    """So that it finds in the cache what the first touched last. Without decay only the second reads the state."""
    ema = torch.zeros(2, 60000)
    traffic = Traffic(monkeypatch)
    dbk.balance_(torch.randn(2, 60000), ema, 0.0, backend="triton")
    reads = [inside(at, ema) for at, _ in traffic.loads]
    tiles = [int(at.min()) for at in reads if len(at)][::2]  # two tasks each
    assert len(tiles) > 8
    assert tiles == sorted(tiles, reverse=True)


@pytest.mark.parametrize("kernel", ["balance_kernel", "balance_rows_kernel"])
def test_weights_are_formed_once_or_by_every_program_for_itself(launches, launched, kernel, monkeypatch):
    """The dense op's by the last program of phase one, and no other writes there."""
    monkeypatch.setenv(LAUNCHES, "2")
    rows, scratch = torch.randn(3, 60000), launches.workspace(CPU).scratch("weights", 1000)
    traffic = Traffic(monkeypatch)
    if kernel == "balance_kernel":
        dbk.balance_(rows, torch.zeros(3, 60000), backend="triton")
    else:
        ops.balance_rows_(balance_rows(rows, [torch.empty(60000)], [0]), "triton")
    name, programs = launched[-1]
    assert name == kernel
    assert programs > 1
    written = np.concatenate([inside(at, scratch) for at, _ in traffic.stores])
    assert len(written) == len(set(written.tolist())) == (1 if kernel == "balance_kernel" else programs) * 2 * 3


# --- the same bits as the CPU kernels -----------------------------------------------------------------------------

DENSE = [  # launches, P, gradients, state, beta
    ("1", 4096, F32, F32, 0.9),
    ("2", 20011, F32, F32, 0.9),
    ("1", 20011, BF16, BF16, 0.9),
    ("2", 4096, F16, BF16, 0.0),
    ("1", 31, BF16, F32, 0.0),
    ("2", 1, F64, F64, 0.9),
]


@pytest.mark.parametrize(("form", "size", "grad", "state", "beta"), DENSE)
def test_state_has_the_bits_of_the_native_backend(form, size, grad, state, beta, monkeypatch):
    monkeypatch.setenv(LAUNCHES, form)
    grads, ema = torch.randn(4, size).to(grad), torch.randn(4, size).to(state)
    grads[0, 0], grads[3, -1] = -0.0, float("inf")  # the last task is not finite
    ours, theirs = ema.clone(), ema.clone()
    out, norms = dbk.balance_(grads, ours, beta, backend="triton")
    expected, exact = dbk.balance_(grads, theirs, beta, backend="native")
    assert same_bits(ours, theirs)
    torch.testing.assert_close(norms, exact, rtol=2e-7, atol=0, equal_nan=True)
    torch.testing.assert_close(out.float(), expected.float(), rtol=2**-7, atol=1e-6)


ROWS = [  # row, elements by which rows and gradients lie off 16 bytes, whether coefficients lie in memory
    (F32, 0, False),
    (BF16, 1, False),
    (F64, 1, True),
]


@pytest.mark.parametrize(("state", "off", "in_memory"), ROWS)
def test_a_row_has_the_bits_of_the_native_backend(state, off, in_memory):
    row, segments, grads = row_of((3, 0, 1, 1030, 20000, 8), state, 1 if off else 32, off, (F32, BF16, F16, F64))
    grads[2], row[int(segments[2, 0])] = None, -0.0  # and so it stays: no zero is added
    rows, sums = row.expand(2, -1).clone(), torch.zeros(2, 1, dtype=F64)
    for decay, scale in ((0.9, None), (0.0, 7.0), (1.0, 0.0)):
        coefficients = torch.tensor([decay, 0.3], dtype=F64) if in_memory else (decay, 0.3)
        loss_scale = None if scale is None else torch.tensor(scale)
        for mine, sumsq, name in zip(rows, sums, ("triton", "native"), strict=True):
            ops.accumulate_(mine, sumsq, grads, segments, coefficients, loss_scale, name)
        assert same_bits(*rows)
        torch.testing.assert_close(*sums, rtol=1e-12, atol=0)


STEPS = [  # state, scale, loss scale, whether partial, flags
    (F32, "max", None, False, {}),
    (BF16, "median", 8.0, True, {"accumulate": True}),
    (F64, "mean", 0.5, True, {"fresh": False}),
    (F32, "constant", 8.0, False, {"fresh": False, "accumulate": True}),
    (F32, "max", 1024.0, True, {"propagate_above": float("inf")}),
    (BF16, "mean", None, True, {"propagate_above": -1.0}),
    (F32, "min", 0.5, False, {"propagate_above": -1.0}),
]


@pytest.mark.parametrize(("state", "scale", "loss_scale", "partial", "flags"), STEPS)
def test_the_end_of_a_step_as_on_the_native_backend(state, scale, loss_scale, partial, flags):
    """One task is not finite now, another was before, a third is both; there is a gap between the outputs."""
    rows = torch.randn(4, 20096).to(state)
    rows[2:, 3] = float("nan")
    outs, steps = [torch.randn(20032), torch.randn(39 if partial else 40).bfloat16()], []
    active = torch.tensor([True, True, False, True]) if partial else None
    factor = None if loss_scale is None else torch.tensor(loss_scale)
    for name in ("triton", "native"):
        mine = [out.clone() for out in outs]
        step = balance_rows(rows.clone(), mine, [0, 20048], active, factor, scale, **flags)
        step.stats.nonfinite[::2] = True
        ops.balance_rows_(step, name)
        steps.append(step)
    ours, theirs = steps
    assert same_bits(ours.rows, theirs.rows)
    for name in ("sumsq", "norms", "weights", "nonfinite", "nonfinite_steps"):
        mine, expected = getattr(ours.stats, name), getattr(theirs.stats, name)
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=0, equal_nan=True)
    for mine, expected in zip(ours.outs, theirs.outs, strict=True):
        rtol = 2**-7 if mine.dtype == BF16 else 1e-5
        torch.testing.assert_close(mine, expected, rtol=rtol, atol=1e-5, equal_nan=True)


def test_rows_further_apart_than_they_are_long():
    """A row length that divides by 8 in a matrix whose stride does not."""
    grads, ema = torch.randn(3, 4001)[:, :4000], torch.randn(3, 4000)
    other = ema.clone()
    out, _ = dbk.balance_(grads, ema, backend="triton")
    expected, _ = dbk.balance_(grads, other, backend="native")
    assert torch.equal(ema, other)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(ops.combine(grads, torch.ones(3), backend="triton"), grads.sum(0))
    torch.testing.assert_close(ops.gramian(grads, "triton"), grads @ grads.T)


def test_offsets_beyond_31_bits():
    """Rows that far apart, in memory that is reserved and never touched in between."""
    far, size = 2**31 + 64, 1000
    store = torch.empty(far + size, dtype=BF16)
    rows = store.as_strided((2, size), (far, 1))
    rows.copy_(torch.randn(2, size))
    out = ops.combine(rows, torch.tensor([2.0, 3.0]), F32, "triton")
    torch.testing.assert_close(out, 2 * rows[0].float() + 3 * rows[1].float())
    torch.testing.assert_close(ops.gramian(rows, "triton"), rows.float() @ rows.float().T)
    ema = torch.zeros(2, size)
    dbk.balance_(rows, ema, 0.0, backend="triton")
    assert torch.equal(ema, rows.float())
    grad, sumsq = torch.randn(size), torch.zeros(1, dtype=F64)
    ops.accumulate_(store, sumsq, [grad], torch.tensor([[far, size]]), (0.0, 1.0), None, "triton")
    assert torch.equal(rows[1], grad.bfloat16())


def test_scratch_may_hold_anything_and_counters_come_back_to_zero(launches, monkeypatch):
    space = launches.workspace(CPU)
    assert space is launches.workspace(CPU)
    rows, (row, segments, grads) = torch.randn(3, 6000), row_of((6000,), F32)

    def everything():
        ema, mine, sumsq = torch.ones(3, 6000), row.clone(), torch.zeros(1, dtype=F64)
        results = [*dbk.balance_(rows, ema, backend="triton"), ema]
        ops.accumulate_(mine, sumsq, grads, segments, (0.9, 0.1), None, "triton")
        return [*results, mine, sumsq, ops.gramian(rows, "triton")]

    opened = int(space.counters[5])
    for form in ("1", "2"):
        monkeypatch.setenv(LAUNCHES, form)
        first = everything()
        for name in ("slots", "weights"):
            space.scratch(name, 1).fill_(float("nan"))
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))
        assert space.counters.tolist() == [0] * 5 + [opened + 2] + [0] * 2  # how often the barrier has opened
