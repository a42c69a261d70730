"""Sums of squares of the Triton kernels: their accuracy, and the same bits whoever took which tile."""

from fractions import Fraction
from importlib import import_module

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from dbmtl_kernels import backends, ops

pytestmark = pytest.mark.interpreter
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
BOUND = 2.0**-43  # of `add_squares` where fp64 is slow


@pytest.fixture
def launches():
    backends.resolve("triton", torch.device("cpu"))
    return import_module("dbmtl_kernels.backends.triton.launches")


@pytest.fixture(params=[True, False], ids=["fp64", "pairs of fp32"])
def fast_fp64(request, launches, monkeypatch):
    """Either kind of chip. The interpreter of some versions of Triton rounds an fp32 ``fma`` twice, a GPU does not."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    fma = InterpreterBuilder.create_fma

    def round_once(builder, x, y, z):
        if x.data.dtype != np.float32:
            return fma(builder, x, y, z)
        a, b, c = (part.data.astype(np.float64) for part in (x, y, z))  # a difference of an exact product is exact here
        return TensorHandle((a * b + c).astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", round_once)
    monkeypatch.setattr(launches, "fast_fp64", lambda capability: request.param)
    launches._dense_plan.cache_clear()
    yield request.param
    launches._dense_plan.cache_clear()


def sum_of_squares(x, decay=0.0):
    sumsq = torch.zeros(1, dtype=F64)
    row = torch.zeros_like(x)
    ops.accumulate_(row, sumsq, [x], torch.tensor([[0, len(x)]]), (decay, 1.0), None, "triton")
    assert torch.equal(row, x) or not torch.isfinite(x).all()
    return float(sumsq)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("exponent", range(-148, 128, 25))
def test_the_sum_is_exact_within_its_bound(fast_fp64, dtype, exponent):
    """From subnormal numbers to the largest, of like and of unlike sizes."""
    random = np.random.default_rng(exponent + 200)
    for spread in (0, 3, 12, 60, 200):
        exponents = np.clip(exponent + random.uniform(-spread, spread, 5000), -149, 126)
        x = torch.from_numpy(random.choice([-1, 1], 5000) * random.uniform(1, 2, 5000) * 2.0**exponents).to(dtype)
        x[::7] = 0
        exact = float((x.double() ** 2).sum())
        assert abs(sum_of_squares(x) - exact) <= BOUND * exact


# Found by a search: the worst known, 1.13 * 2**-44.
WORST = "1.001p+0 1.2808a6p-5 1.5a6e08p-4 1.7853cap-6 1.9c8260p-5 1.1597a6p-7 1.cf9b30p-13 1.733492p-12"


def test_the_worst_sum_known_is_within_the_bound(fast_fp64):
    x = torch.zeros(1023)
    x[::128] = torch.tensor([float.fromhex("0x" + number) for number in WORST.split()])
    exact = sum(Fraction(float(number)) ** 2 for number in x)
    error = abs(Fraction(sum_of_squares(x)) - exact) / exact
    assert error <= (2.0**-52 if fast_fp64 else BOUND)
    assert fast_fp64 or error > 2.0**-44


def test_what_is_not_finite_stays_so(fast_fp64):
    for bad, expected in ((np.inf, np.inf), (-np.inf, np.inf), (np.nan, np.nan)):
        x = torch.full((5000,), 3e38)
        x[77] = bad
        np.testing.assert_equal(sum_of_squares(x), expected)
    assert sum_of_squares(torch.zeros(5000)) == 0.0
    x = torch.zeros(3, 5000)
    x[0, 77], x[1, :99] = float("nan"), 3e38
    norms = dbk.balance_(x, torch.zeros(3, 5000), 0.0, backend="triton")[1]
    assert norms[0] != norms[0]
    assert norms[2] == 0
    assert norms[1] == torch.finfo(torch.float32).max < x[1].double().norm()  # finite: inf is for who sits out


def deal(monkeypatch, launches, owner):
    """Gives the tiles that are handed out to the program that ``owner(tile)`` names, not to whoever comes first."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    atomic, drawn = InterpreterBuilder.create_atomic_rmw, {}

    def draw(builder, operation, pointer, value, mask, *rest):
        space = launches.workspace(torch.device("cpu")).counters
        which = (int(pointer.data.ravel()[0]) - space.data_ptr()) // 4
        if not 1 <= which <= 4 or "ADD" not in str(operation):
            return atomic(builder, operation, pointer, value, mask, *rest)
        program = builder.grid_idx[0]
        ticket = next((t for t in range(drawn.get(program, -1) + 1, 1000) if owner(t) == program), 1000)
        drawn[program] = ticket
        asked.append((program, ticket))
        return TensorHandle(np.full_like(value.data, ticket), value.dtype)

    def launch_anew(*args, launch=launches._launch, **options):
        drawn.clear()
        launch(*args, **options)

    asked = []
    monkeypatch.setattr(launches, "_launch", launch_anew)
    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", draw)
    return asked


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bits_do_not_depend_on_who_took_which_tile(launches, monkeypatch, dtype):
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", "2")
    size = 150000
    grads = torch.randn(3, size).to(dtype)
    results = []
    for owner in (lambda t: 0, lambda t: 2, lambda t: t % 3, lambda t: 2 - t % 2):
        with monkeypatch.context() as patch:
            asked = deal(patch, launches, owner)
            ema, row, sumsq = (
                torch.ones(3, size, dtype=dtype),
                torch.zeros(size, dtype=dtype),
                torch.zeros(1, dtype=F64),
            )
            out, norms = dbk.balance_(grads, ema, 0.9, backend="triton")
            ops.accumulate_(row, sumsq, [grads[0]], torch.tensor([[0, size]]), (0.0, 1.0), None, "triton")
            results.append((out, norms, ema, row, sumsq, ops.combine(grads, torch.ones(3), F32, "triton")))
            given = [(program, ticket) for program, ticket in asked if ticket < 1000]
            assert len(given) >= 4  # both phases, the row, the sum of rows
            assert {program for program, ticket in given} == {owner(ticket) for _, ticket in given}
    for other in results[1:]:
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(results[0], other, strict=True)
        )
