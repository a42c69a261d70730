"""The CUDA C++ kernels, emulated on this CPU, against the native ones."""

import math
import warnings
from ctypes import byref
from functools import partial

import emulator
import numpy as np
import pytest
import torch
from dbmtl_kernels.backends import c_library as c
from dbmtl_kernels.backends.arguments import BalanceRows, Stats
from dbmtl_kernels.backends.c_library import cuda, native
from dbmtl_kernels.ops.arguments import check_accumulate

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
BOTH = (cuda, native)


def same_bits(a, b):
    """Of numbers: a device may make another NaN."""
    assert a.dtype == b.dtype
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def dense(grads, ema, beta=0.9, scale="max"):
    """One step on both; the states have the same bits."""
    states = [ema.clone() for _ in BOTH]
    (out, norms), (expected, exact) = (
        serve.balance_(grads, state, beta, 1e-8, scale, 0.5) for serve, state in zip(BOTH, states, strict=True)
    )
    same_bits(*states)
    torch.testing.assert_close(norms, exact, rtol=1e-7, atol=0, equal_nan=True)
    tolerance = {BF16: 2**-7, F16: 2**-10}.get(out.dtype, 1e-6)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=1e-6)


def accumulate(serve, row, sumsq, grads, segments, coefficients, loss_scale=None):
    given = check_accumulate(row, sumsq, grads, segments, coefficients, loss_scale)
    serve.accumulate_(row, sumsq, given, segments, coefficients, loss_scale)


def gathered(row, grads, segments, coefficients, loss_scale=None):
    """One row on both, with the same bits."""
    rows, sums = [row.clone() for _ in BOTH], [torch.full((1,), 5.0, dtype=F64) for _ in BOTH]
    for serve, state, sumsq in zip(BOTH, rows, sums, strict=True):
        accumulate(serve, state, sumsq, grads, segments, coefficients, loss_scale)
    same_bits(*rows)
    torch.testing.assert_close(*sums, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1, 8, 4097, 12288, 70000])
@pytest.mark.usefixtures("emulated_cuda")
def test_the_dense_op(size):
    """Up to 24,000 columns of fp32 all tiles stay in shared memory, beyond that only some."""
    for grad, state, beta, scale in ((F32, F32, 0.9, "max"), (BF16, BF16, 0.0, "mean"), (F64, F64, 0.5, "median")):
        dense(torch.randn(3, size).to(grad), torch.randn(3, size).to(state), beta, scale)
    grads = torch.randn(3, size, dtype=F16)
    grads[1, 0] = torch.nan
    dense(grads, torch.randn(3, size), 0.9, "constant")


@pytest.mark.parametrize("state", [F32, F64, BF16])
@pytest.mark.usefixtures("emulated_cuda")
def test_a_gathered_row(state):
    segments = torch.tensor([[0, 1000], [1000, 0], [1008, 500], [1520, 3]])
    row = torch.randn(1536, dtype=F64).to(state)
    for grad, coefficients, scale in zip(
        DTYPES,
        ((0.9, 0.1), torch.tensor([0.0, 1.0], dtype=F64), (1.0, 0.5), (0.3, 2.0)),
        (None, torch.tensor(4.0), torch.tensor(0.0), torch.tensor(7)),
        strict=True,
    ):
        grads = [torch.randn(n, dtype=F64).to(grad) for n in (1000, 0, 500)]
        grads[0][7] = torch.inf
        gathered(row, [*grads, torch.ones(3, dtype=F16)], segments, coefficients, scale)
        gathered(row, [grads[0], None, None, None], segments, coefficients, scale)
    gathered(row, [None] * 4, segments, (0.0, -1.0), torch.tensor(torch.nan))


EXTREMES = {
    "all magnitudes": lambda x: x * 2.0 ** torch.randint(-149, 125, x.shape),
    "subnormal": lambda x: x * 2.0**-140,
    "large": lambda x: 3e38 * x.sign(),
    "ordinary": lambda x: x,
    "zeros": lambda x: 0.0 * x,
    "one": lambda x: torch.where(torch.arange(x.numel()) == 4000, 2.0**-149, 0.0),
    "inf": lambda x: torch.where(torch.arange(x.numel()) == 77, -torch.inf, x),
    "nan": lambda x: torch.where(torch.arange(x.numel()) == 78, torch.nan, x * 1e38),
    "inf and nan": lambda x: torch.where(torch.arange(x.numel()) == 5, torch.inf, x / (x > 0)),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("pairs", ["0", "1"])
@pytest.mark.usefixtures("emulated_cuda")
def test_squares_in_doubles_and_in_pairs_of_floats(pairs, case, monkeypatch):
    """The bound of csrc/common/squares.h for 16 numbers of a thread, and for a warp what a norm of float32 shows."""
    monkeypatch.setenv("DBMTL_EMULATED_FLOAT_PAIRS", pairs)
    values = EXTREMES[case](torch.randn(20003).double()).float()
    assert values.isfinite().all() or case in ("inf", "nan", "inf and nan")
    exact = (
        math.fsum(x * x for x in values.tolist()) if values.isfinite().all() else values.double().square().sum().item()
    )
    sumsq = torch.zeros(1, dtype=F64)
    accumulate(cuda, torch.zeros(20003), sumsq, [values], torch.tensor([[0, 20003]]), (0.0, 1.0))
    torch.testing.assert_close(sumsq.item(), exact, rtol=2**-38 if pairs == "1" else 1e-14, atol=0, equal_nan=True)
    values = values[:20000].expand(3, -1)
    exact = values.double().square().sum(dim=1).sqrt()
    ema = torch.zeros(3, 20000)
    _, norms = cuda.balance_(values.contiguous(), ema, 0.0, 1e-8, "constant", 1.0)
    exact = torch.where(exact.isfinite(), exact.clamp(max=torch.finfo(torch.float32).max), exact).float()
    torch.testing.assert_close(norms, exact, rtol=2**-23, atol=0, equal_nan=True)
    dense(values.contiguous(), torch.randn(3, 20000), 0.5)


@pytest.mark.parametrize("state", [F32, F64, BF16])
@pytest.mark.usefixtures("emulated_cuda")
def test_combined_rows(state):
    rows, weights = torch.randn(3, 1003, dtype=F64).to(state), torch.tensor([-2.0, 0.0, 0.3])
    for out in DTYPES:
        for accumulate in (False, True):
            outs = [torch.ones(1003, dtype=out) for _ in BOTH]
            for serve, result in zip(BOTH, outs, strict=True):
                serve.combine_out(rows, weights.to(F64 if accumulate else BF16), result, accumulate)
            same_bits(*outs)


ENDINGS = {  # loss scale, propagate_above, the task that is not active, the one that is not finite
    "plain": (None, 1.0, None, None),
    "nan": (16.0, 1.0, None, 0),
    "inactive": (None, 1.0, 2, None),
    "again": (16.0, 1.0, None, None),
    "inactive nan": (16.0, 1.0, 2, 2),
    "nan, never passed on": (1024.0, math.inf, None, 0),
    "nan, always passed on": (None, -1.0, 2, 0),
}


@pytest.mark.parametrize("case", ENDINGS)
@pytest.mark.usefixtures("emulated_cuda")
def test_the_end_of_a_step(case):
    for state in (F32, F64, BF16):
        rows = torch.randn(4, 2000, dtype=F64).to(state)
        sumsq = rows.double().square().sum(dim=1)
        scale, above, inactive, nonfinite = ENDINGS[case]
        if nonfinite is not None:
            sumsq[nonfinite] = torch.nan
        found = []
        for serve in BOTH:
            norms, weights = torch.zeros(2, 4, dtype=F64)
            stats = Stats(sumsq.clone(), norms, weights, torch.arange(4) == 1, torch.arange(4))
            outs, state_rows = [torch.ones(997), torch.ones(1000, dtype=BF16)], rows.clone()
            active = None if inactive is None else torch.arange(4) != inactive
            factor = None if scale is None else torch.tensor(scale)
            fresh, accumulate = case != "again", case == "inactive"
            step = (state_rows, stats, outs, [0, 1000], active, factor, above, 1e-8, "mean", 0.0, fresh, accumulate)
            serve.balance_rows_(BalanceRows(*step))
            found.append([state_rows, *stats, *outs])
            assert outs[0].isnan().all() == (case in ("nan", "again", "nan, always passed on"))
        for ours, theirs in zip(*found, strict=True):
            same_bits(ours, theirs)


def moved(monkeypatch, num_tasks, size, dtype, shared=227 * 1024):
    """Elements read and written by the dense op on 4 multiprocessors, of an H200 unless said otherwise."""
    monkeypatch.setenv("DBMTL_EMULATED_MULTIPROCESSORS", "4")
    monkeypatch.setenv("DBMTL_EMULATED_SHARED_BYTES", str(shared))
    grads, ema = torch.randn(num_tasks, size).to(dtype), torch.zeros(num_tasks, size, dtype=dtype)
    emulator.traffic(cuda.library())
    cuda.balance_(grads, ema, 0.9, 1e-8, "max", 0.0)
    read, written, *_ = emulator.traffic(cuda.library())
    return read // dtype.itemsize, written // dtype.itemsize


@pytest.mark.parametrize(
    ("num_tasks", "megabytes", "state"),
    [*((k, 25, F32) for k in (1, 3, 11, 16, 64)), (3, 30, F32), (5, 25, BF16)],
)
@pytest.mark.usefixtures("emulated_cuda")
def test_what_fits_on_an_h200_moves_once(num_tasks, megabytes, state, monkeypatch):
    """3 K P + P elements: 4 of its 132 multiprocessors, with their part of the columns."""
    size = megabytes * 10**6 // (num_tasks * state.itemsize) // 33 // 8 * 8
    assert moved(monkeypatch, num_tasks, size, state) == (2 * num_tasks * size, (num_tasks + 1) * size)


@pytest.mark.usefixtures("emulated_cuda")
def test_40_mb_move_in_part_twice(monkeypatch):
    size = 40_000_000 // 12 // 33 // 8 * 8
    read, written = moved(monkeypatch, 3, size, F32)
    assert 6.5 * size < read < 7.5 * size
    assert written == 4 * size


@pytest.mark.parametrize(("rounds", "kept"), [(10, 2), (11, 0)])
@pytest.mark.usefixtures("emulated_cuda")
def test_a_state_far_larger_than_what_fits_leaves_the_room_to_the_cache(rounds, kept, monkeypatch):
    """Two pieces of 4,096 numbers fit: the most that is worth it is 16 times as many, 10 tiles of 3 tasks."""
    size = 4 * 4096 * rounds
    read, _ = moved(monkeypatch, 3, size, F32, shared=40000)
    assert read == 9 * size - kept * 4 * 4096


@pytest.mark.parametrize("error", [720, 801])
@pytest.mark.usefixtures("emulated_cuda")
def test_a_refused_cooperative_launch_becomes_two(error, monkeypatch):
    """Too large for what is left of the device, or not supported at all: it is said once, and the state is the same."""
    grads, states = torch.randn(3, 70000), [torch.randn(3, 70000)]
    states += [states[0].clone() for _ in range(2)]
    one = cuda.balance_(grads, states[0], 0.9, 1e-8, "max", 0.0)
    monkeypatch.setenv("DBMTL_EMULATED_REFUSAL", str(error))
    emulator.traffic(cuda.library())
    with pytest.warns(RuntimeWarning, match="refuses cooperative launches here: the dense op takes two launches"):
        two = cuda.balance_(grads, states[1], 0.9, 1e-8, "max", 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = cuda.balance_(grads, states[2], 0.9, 1e-8, "max", 0.0)
    assert emulator.traffic(cuda.library())[4] == 4
    for found in ((states[1], *two), (states[2], *again)):
        for ours, theirs in zip(found, (states[0], *one), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        same_bits(found[0], states[0])
    dense(grads, states[0])


@pytest.mark.usefixtures("emulated_cuda")
def test_squares_of_a_warp_in_pairs_of_floats(monkeypatch):
    """To the bound, which a norm of float32 does not show: the sums that the last block leaves in the workspace."""
    monkeypatch.setenv("DBMTL_EMULATED_FLOAT_PAIRS", "1")
    monkeypatch.setenv("DBMTL_EMULATED_MULTIPROCESSORS", "1")
    grads, ema = torch.randn(2, 20000), torch.zeros(2, 20000)
    for _ in range(2):  # the first call makes the workspace
        cuda.balance_(grads, ema, 0.0, 1e-8, "max", 0.0)
        (workspace,) = cuda._workspaces.values()
        numbers = workspace.view(F64)[32:]  # after the counters: five slots for each task of the one block, sums
    exact = [math.fsum(x * x for x in row) for row in ema.tolist()]
    for found in (numbers[10:12], numbers[:10].view(2, 5).nan_to_num().sum(1)):
        torch.testing.assert_close(found.tolist(), exact, rtol=2**-36, atol=0)


@pytest.mark.usefixtures("emulated_cuda")
def test_another_error_is_an_error(monkeypatch):
    monkeypatch.setenv("DBMTL_EMULATED_REFUSAL", "716")
    with pytest.raises(RuntimeError, match="misaligned address"):
        cuda.balance_(torch.ones(2, 8), torch.ones(2, 8), 0.9, 1e-8, "max", 0.0)


@pytest.mark.usefixtures("emulated_cuda")
def test_the_bits_are_the_same_however_tiles_are_dealt(monkeypatch):
    """A block that is slow to ask gets none of the tiles that are drawn; which block that is must not be seen."""
    grads, state, ones = torch.randn(3, 1 << 18, dtype=F64), torch.randn(3, 1 << 18, dtype=F64), torch.ones(3)
    grads *= torch.logspace(-3, 3, 1 << 18, dtype=F64)  # tiles whose sums are unlike: their order would show
    monkeypatch.setenv("DBMTL_EMULATED_SHARED_BYTES", "40000")
    monkeypatch.setenv("DBMTL_EMULATED_MULTIPROCESSORS", "2")
    found, asked = [], []
    for slow in ("-1", "0", "1"):
        monkeypatch.setenv("DBMTL_EMULATED_SLOW_BLOCK", slow)
        ema, row, sumsq, out = state.clone(), state[0].float(), torch.zeros(1, dtype=F64), torch.empty(1 << 18)
        emulator.draws(cuda.library(), 6)
        results = cuda.balance_(grads, ema, 0.9, 1e-8, "max", 0.0)
        accumulate(cuda, row, sumsq, [grads[0]], torch.tensor([[0, 1 << 18]]), (0.9, 0.1))
        asked.append(emulator.draws(cuda.library(), 6))
        cuda.combine_out(state, ones, out, False)
        found.append((ema, *results, row, sumsq, out))
    assert asked[1] != asked[2]
    assert asked[1][0] < asked[2][0]
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            same_bits(ours, theirs)


@pytest.mark.parametrize("shared", ["40000", "100000", "150000"])
@pytest.mark.parametrize("num_tasks", [1, 8, 16])
@pytest.mark.usefixtures("emulated_cuda")
def test_tiles_cached_in_part(num_tasks, shared, monkeypatch):
    """All, some or none of a tile's tasks in shared memory."""
    monkeypatch.setenv("DBMTL_EMULATED_SHARED_BYTES", shared)
    for state in (F32, BF16):
        dense(torch.randn(num_tasks, 20000), torch.randn(num_tasks, 20000).to(state))


@pytest.mark.usefixtures("emulated_cuda")
def test_a_device_that_says_nothing(monkeypatch):
    monkeypatch.setenv("DBMTL_EMULATED_MULTIPROCESSORS", "0")
    with pytest.raises(RuntimeError, match="does not say what it is"):
        cuda.balance_(torch.ones(2, 4), torch.ones(2, 4), 0.9, 1e-8, "max", 0.0)


@pytest.mark.parametrize("multiprocessors", ["1", "2", "5"])
@pytest.mark.usefixtures("emulated_cuda")
def test_any_number_of_blocks(multiprocessors, monkeypatch):
    monkeypatch.setenv("DBMTL_EMULATED_MULTIPROCESSORS", multiprocessors)
    grads = torch.randn(4, 50000)
    for _ in range(3):  # the counters come back to zero
        dense(grads, torch.zeros(4, 50000), 0.5)
        torch.testing.assert_close(cuda.gramian(grads), native.gramian(grads), rtol=1e-5, atol=1e-2)
    (workspace,) = cuda._workspaces.values()
    assert workspace[:20].view(torch.int32)[[0, 2, 3, 4]].tolist() == [0] * 4


@pytest.mark.parametrize("large", ["0", "1"])
@pytest.mark.usefixtures("emulated_cuda")
def test_pointer_lists_of_any_length(large, monkeypatch):
    """125 gradients a launch, or 1,021 where the driver takes 32 KB of arguments; all launches count."""
    monkeypatch.setenv("DBMTL_EMULATED_LARGE_ARGUMENTS", large)
    rng = np.random.default_rng(0)
    for count in (0, 1, 124, 126, 1002, 2100):
        sizes = rng.integers(0, 40, count)
        starts = np.cumsum([0, *(-(-sizes // 32) * 32)])
        segments = torch.tensor(np.stack([starts[:-1], sizes], axis=1).reshape(-1, 2))
        grads = [torch.randn(int(n)).to(DTYPES[i % 4]) for i, n in enumerate(sizes)]
        gathered(torch.ones(int(starts[-1])), grads, segments, (0.9, 0.1), torch.tensor(4.0))


@pytest.mark.usefixtures("emulated_cuda")
def test_misaligned_addresses_take_the_slow_path():
    segments = torch.tensor([[1, 1000], [1004, 999], [2048, 4096]])
    store = torch.randn(3, 4097)
    for shift in (0, 1):
        grads = [store[i, shift : shift + n] for i, n in enumerate((1000, 999, 4096))]
        gathered(torch.ones(6144), grads, segments, (0.5, 2.0))
    ema = torch.zeros(8193)[1:].view(2, 4096)  # 4 bytes off
    out, _ = cuda.balance_(store[:2, 1:], ema, 0.0, 1e-8, "max", 0.0)
    same_bits(ema, store[:2, 1:])
    torch.testing.assert_close(out, native.balance_(store[:2, 1:], ema, 0.0, 1e-8, "max", 0.0)[0])


@pytest.mark.parametrize("state", [F32, F64, BF16])
@pytest.mark.usefixtures("emulated_cuda")
def test_the_gramian_loads_128_bits_where_rows_are_aligned(state):
    """And the same numbers one by one where they are not: the same bits, whatever the number of columns."""
    per_vector = 16 // state.itemsize
    for size in (1, 63, 64, 1000, 6401):
        values, found = torch.randn(5, size).to(state), []
        even = -(-size // 8) * 8
        for first, stride in ((0, even), (1, even), (0, even + 1), (per_vector, even + 16)):
            rows = torch.empty(5 * stride + 8, dtype=state)[first:].as_strided((5, size), (stride, 1)).copy_(values)
            emulator.traffic(cuda.library())
            found.append(cuda.gramian(rows))
            read, written, vectors, *_ = emulator.traffic(cuda.library())
            aligned = (first % per_vector, stride % per_vector) == (0, 0)
            assert (read, written) == (values.nbytes, 0)
            assert vectors == (5 * (size // per_vector) if aligned else 0)
        for gram in found:
            same_bits(gram, found[0])
        torch.testing.assert_close(found[0], native.gramian(values), rtol=1e-5, atol=1e-3)


def sectors_are_full(call):
    """All that the warps' accesses touch they use; matched by their order, so that all threads must have as many."""
    emulator.traffic(cuda.library())
    call()
    read, written, _, sectors, *_ = emulator.traffic(cuda.library())
    assert read + written == 32 * sectors


@pytest.mark.parametrize("state", [F32, F64, BF16])
@pytest.mark.usefixtures("emulated_cuda")
def test_a_warps_access_is_one_stretch(state, monkeypatch):
    """Of whole tiles on aligned addresses; the last of a tile, and what is left of it, may touch a sector twice."""
    size = 3 * 8192  # whole tiles of every dtype on 3 multiprocessors
    row = torch.randn(3, size).to(state)
    for other in DTYPES:
        grads, out = torch.randn(3, size).to(other), torch.empty(size, dtype=other)
        for shared in ("40000", "200000"):  # state on chip: none and all of it
            monkeypatch.setenv("DBMTL_EMULATED_SHARED_BYTES", shared)
            if (other == F64) == (state == F64):
                sectors_are_full(partial(cuda.balance_, grads, row, 0.9, 1e-8, "max", 0.0))
        whole = torch.tensor([[0, size]])
        sectors_are_full(partial(accumulate, cuda, row[0], torch.zeros(1, dtype=F64), [grads[0]], whole, (0.9, 0.1)))
        sectors_are_full(partial(cuda.combine_out, row, torch.ones(3), out, True))
    sectors_are_full(partial(cuda.gramian, torch.ones(4, size, dtype=state)))


@pytest.mark.usefixtures("emulated_cuda")
def test_the_emulation_counts_the_sectors_of_a_stride():
    """Rows that begin in the middle of a sector: each warp's access touches one more than it fills."""
    rows = torch.randn(2, 8208)[:, 4:8196]
    emulator.traffic(cuda.library())
    cuda.combine_out(rows, torch.ones(2), torch.empty(8192), False)
    read, written, _, sectors, *_ = emulator.traffic(cuda.library())
    assert 32 * sectors == read + written + 32 * (2 * 8192 // 128)


@pytest.mark.usefixtures("emulated_cuda")
def test_the_emulation_refuses_a_misaligned_access_as_a_device_does():
    ones, out = torch.ones(9), torch.zeros(2)
    off = c.Rows(ones.data_ptr() + 2, 0, 4, 2, 2)  # fp32 between two numbers
    arrays = [c.Array(*c._array(x)) for x in (ones, out)]
    args = c.CombineArgs(off, *arrays, 0, c.Where(*cuda._where(ones.device, 2)))
    with pytest.raises(RuntimeError, match="misaligned"):
        cuda.check(cuda.library().dbmtl_combine(byref(args)))
