"""Stochastic rounding to bfloat16: the specified bits on every backend, random numbers that are random, no bias."""

import ctypes

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from dbmtl_kernels import ops, rounding
from dbmtl_kernels.backends import native

ISAS = ("baseline", "avx2", "avx512")
BACKENDS = ("native", "triton", "cuda", "eager")
GRADS = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = (0, 1, -1, 2**63 - 1, 123456789123456789)
CPU = torch.device("cpu")
DRAWS = 1_000_000


def mix64(z):
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_bits(seed, row, columns):
    """As `rounding` specifies them, in integers that wrap by themselves."""
    u32 = np.uint32
    key = mix64(mix64(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(row))
    columns = np.asarray(columns, dtype=np.uint64)
    x = columns.astype(u32) ^ key.astype(u32)
    x = (x ^ (x >> u32(16))) * u32(0x7FEB352D)
    x = x ^ ((key >> np.uint64(32)).astype(u32) + (columns >> np.uint64(32)).astype(u32) * u32(0x9E3779B1))
    return ((x ^ (x >> u32(15))) * u32(0x846CA68B)) >> u32(16)


def rounded(x, seed, row=0, column=0):
    """(n,) float32, none of them NaN, to the 16 bits of each bfloat16."""
    random = random_bits(seed, row, np.arange(column, column + len(x)))
    return ((x.view(np.uint32) + random) >> np.uint32(16)).astype(np.uint16)


def bits(x):
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


def updated(state, grad, decay, gain):
    """The new state before it is rounded, in float32."""
    old = np.float32(decay) * state.float().numpy()
    if grad is None:
        return old
    new = np.float32(gain) * grad.float().numpy().reshape(-1)
    return old + new if decay else new


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_dtype", GRADS)
@pytest.mark.parametrize("size", [1, 15, 16, 33, 1003, 40001])
def test_balance_gives_the_specified_bits(size, grad_dtype, backend):
    for seed, beta in zip(SEEDS, (0.0, 0.3, 0.5, 0.9, 0.999), strict=True):
        grads, ema = torch.randn(3, size).to(grad_dtype), torch.randn(3, size).bfloat16()
        if beta == 0.0:
            ema.fill_(float("nan"))  # must not be read
        expected = np.stack([rounded(updated(ema[t], grads[t], beta, 1 - beta), seed, t) for t in range(3)])
        grad, norms = dbk.balance_(grads, ema, beta, backend=backend, seed=seed)
        assert np.array_equal(bits(ema), expected)
        stored = ema.double().numpy()  # norms and result are those of what was stored
        combined, _, exact_norms = oracle.balance(stored, stored, 0.0, 1e-8, "max")
        np.testing.assert_allclose(norms.numpy(), exact_norms, rtol=1e-6)
        ulp = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[grad_dtype]
        np.testing.assert_allclose(grad.double().numpy(), combined, rtol=ulp, atol=1e-5 * np.abs(combined).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", [0.0, 0.4, 0.9, 1.0])
def test_accumulate_gives_the_specified_bits(decay, backend):
    sizes = (5, 33, 1, 16385, 0, 64, 40)
    dtypes = (*GRADS, torch.float64)
    for seed, loss_scale in zip(SEEDS, (None, 1024.0, 0.125, None, 0.0), strict=True):
        segments, grads, end = [], [], 3
        for i, size in enumerate(sizes):
            segments.append([end, size])
            grads.append(None if i == 5 else torch.randn(size).to(dtypes[i % 4]).reshape(1, size))
            end += size + 7 * i
        row, sumsq = torch.randn(end).bfloat16(), torch.zeros(1, dtype=torch.float64)
        gain = 0.7 if loss_scale is None else 0.7 / loss_scale if loss_scale else 0.0
        expected = bits(row).copy()
        for grad, (begin, size) in zip(grads, segments, strict=True):
            part = slice(begin, begin + size)
            if grad is None and decay == 0.0:
                expected[part] = 0
            elif size:
                expected[part] = rounded(updated(row[part], grad, decay, gain), seed, 0, begin)
        scale = None if loss_scale is None else torch.tensor(loss_scale)
        ops.accumulate_(row, sumsq, grads, torch.tensor(segments), decay, 0.7, scale, seed, backend)
        assert np.array_equal(bits(row), expected)
        total = sum(float(row[begin : begin + size].double().square().sum()) for begin, size in segments)
        assert float(sumsq) == pytest.approx(total, rel=1e-6)


def test_same_bits_for_any_thread_count_and_instruction_set():
    def run():
        torch.manual_seed(1)
        ema = torch.randn(3, 100003).bfloat16()
        grad, norms = dbk.balance_(torch.randn(3, 100003), ema, 0.9, backend="native", seed=42)
        row, sumsq = ema[1], torch.zeros(1, dtype=torch.float64)
        grads, segments = [torch.randn(20000), torch.randn(70003)], torch.tensor([[5, 20000], [30000, 70003]])
        ops.accumulate_(row, sumsq, grads, segments, 0.9, 0.1, None, 43, "native")
        return b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in (grad, norms, ema, sumsq))

    first, best = run(), native.isa()
    try:
        for isa in ISAS[: ISAS.index(best) + 1]:
            native.set_isa(isa)
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                assert run() == first, (isa, threads)
    finally:
        native.set_isa(None)


@pytest.mark.parametrize("isa", ISAS[: ISAS.index(native.isa()) + 1])
@pytest.mark.parametrize("column", [2**32 - 24, 2**32 - 16, 2**32 - 3, 2**32 + 1, 5 * 2**32 - 40])
def test_columns_beyond_32_bits(column, isa):
    x = torch.randn(77)
    expected = rounded(x.numpy(), 9, 0, column)
    assert np.array_equal(bits(rounding.to_bfloat16(x, rounding.row_key(9, 0), column)), expected)
    columns = np.arange(column, column + 77)
    assert np.corrcoef(random_bits(9, 0, columns), random_bits(9, 0, columns % 2**32))[0, 1] < 0.99
    out, sumsq = torch.zeros(77, dtype=torch.bfloat16), ctypes.c_double()
    row = (out.data_ptr() - 2 * column) % 2**64  # a row whose first columns nobody has allocated, nor touches
    segments, grads = (ctypes.c_int64 * 2)(column, 77), (ctypes.c_void_p * 1)(x.data_ptr())
    try:
        native.set_isa(isa)
        status = native._library().dbmtl_accumulate(
            row, 2, 1, segments, grads, bytes(1), 0.0, 1.0, None, 0, ctypes.byref(sumsq), 1, 9, None, 1, None, None
        )
    finally:
        native.set_isa(None)
    assert status == 0
    assert np.array_equal(bits(out), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("fraction", [0.03, 0.3, 0.5, 0.97])
def test_the_mean_is_the_number_itself(fraction, sign, backend):
    ulp = 2.0**-7
    x = float(np.float32(sign * (1.0 + fraction * ulp)))
    ema = torch.zeros(1, DRAWS, dtype=torch.bfloat16)
    dbk.balance_(torch.full((1, DRAWS), x), ema, 0.0, backend=backend, seed=11)
    assert set(ema.unique().tolist()) == {sign, sign * (1.0 + ulp)}
    error = ulp * (fraction * (1 - fraction) / DRAWS) ** 0.5
    assert abs(float(ema.double().mean()) - x) <= 4 * error


@pytest.mark.parametrize("seed", SEEDS)
def test_the_random_numbers_are_uniform_and_independent(seed):
    def draw(seed, row):
        return rounding.random_bits(rounding.row_key(seed, row), 0, DRAWS, CPU).numpy()

    x = draw(seed, 2)
    assert np.array_equal(x, random_bits(seed, 2, np.arange(DRAWS)))
    for byte in (x >> 8, x & 255):
        counts = np.bincount(byte, minlength=256)
        chi_square = ((counts - DRAWS / 256) ** 2).sum() / (DRAWS / 256)
        assert abs(chi_square - 255) <= 4 * (2 * 255) ** 0.5
    others = {
        "column": np.roll(x, 1),
        "group": np.roll(x, 16),
        "row": draw(seed, 3),
        "seed": draw(seed + 1, 2),
        "step": draw(rounding.update_seed(seed, 1), 2),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(x, other)[0, 1]) <= 4 / DRAWS**0.5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_bfloat16_can_hold_is_never_changed(backend):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    row, sumsq, segments = every.clone(), torch.zeros(1, dtype=torch.float64), torch.tensor([[0, 2**16]])
    for seed in range(5):
        ops.accumulate_(row, sumsq, [None], segments, 1.0, 0.0, None, seed, backend)  # inf and both zeros among them
        nan = every.isnan()
        assert np.array_equal(bits(row[~nan]), bits(every[~nan]))
        assert row[nan].isnan().all()
        fresh = torch.full_like(every, float("nan"))
        ops.accumulate_(fresh, sumsq, [every.float()], segments, 0.0, 1.0, None, seed, backend)
        assert torch.equal(fresh[~nan], every[~nan])
        assert fresh[nan].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan_whatever_is_added_to_its_bits(backend):
    grad = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000] * 50).to(torch.int32).view(torch.float32)
    row, sumsq = torch.zeros(200, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float64)
    for decay in (0.0, 0.5):
        row.zero_()
        ops.accumulate_(row, sumsq, [grad], torch.tensor([[0, 200]]), decay, 1.0, None, 3, backend)
        assert row.isnan().all()
        assert sumsq.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_to_nearest_without_a_seed(backend):
    grads = torch.randn(2, 5003)
    nearest, stochastic = torch.zeros(2, 2, 5003, dtype=torch.bfloat16)
    dbk.balance_(grads, nearest, 0.0, backend=backend)
    assert np.array_equal(bits(nearest), bits(grads.bfloat16()))
    dbk.balance_(grads, stochastic, 0.0, backend=backend, seed=0)
    differ = (nearest != stochastic).double().mean()
    assert abs(float(differ) - 0.25) <= 4 * (0.25 * 0.75 / 10006) ** 0.5  # min(f, 1 - f) of a uniform fraction


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_seed_needs_a_bfloat16_state(dtype, backend):
    state, sumsq = torch.ones(2, 40, dtype=dtype), torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"seed=17 .*bfloat16 ema.*float"):
        dbk.balance_(torch.zeros(2, 40, dtype=dtype), state, backend=backend, seed=17)
    with pytest.raises(ValueError, match=r"seed=17 .*bfloat16 row.*float"):
        ops.accumulate_(state[0], sumsq, [None], torch.tensor([[0, 40]]), 0.5, 0.5, None, 17, backend)
    assert (state == 1).all()
    assert sumsq == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_c_abi_rounds_nothing_but_bfloat16_stochastically(dtype):
    library, code = native._library(), native.abi.DTYPES[dtype]
    state, out, norms, sumsq = (torch.ones(40, dtype=dtype) for _ in range(4))
    grads, segments = torch.zeros(40, dtype=dtype), torch.tensor([[0, 40]])
    status = library.dbmtl_balance(
        grads.data_ptr(), code, 40, state.data_ptr(), code, 40, out.data_ptr(), code, norms.data_ptr(),
        1, 40, 0.5, 1e-8, 0, 0.0, 1, 17, 1, None, None,
    )  # fmt: skip
    assert (status, library.dbmtl_last_error()[:11]) == (1, b"stochastic:")
    assert library.dbmtl_set_isa(b"none") == 1  # another message
    addresses = (ctypes.c_void_p * 1)(grads.data_ptr())
    status = library.dbmtl_accumulate(
        state.data_ptr(), code, 1, segments.data_ptr(), addresses, bytes([code]), 0.5, 0.5, None, 0,
        sumsq.data_ptr(), 1, 17, None, 1, None, None,
    )  # fmt: skip
    assert (status, library.dbmtl_last_error()[:11]) == (1, b"stochastic:")
    for tensor in (state, out, norms, sumsq):
        assert (tensor == 1).all()


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_slow_average_moves_only_when_rounded_stochastically(backend):
    steps, size, beta = 500, 4096, 0.999
    grads = torch.full((1, size), 1.5)  # a step adds 0.0005, half a unit in the last place is 0.0039
    nearest, stochastic = torch.ones(2, 1, size, dtype=torch.bfloat16)
    exact = 1.0
    for step in range(steps):
        dbk.balance_(grads, nearest, beta, backend=backend)
        dbk.balance_(grads, stochastic, beta, backend=backend, seed=rounding.update_seed(5, step))
        exact = beta * exact + (1 - beta) * 1.5
    assert (nearest == 1).all()
    followed = stochastic.double()
    assert exact > 1.19
    assert abs(float(followed.mean()) - exact) <= 4 * float(followed.std()) / size**0.5
