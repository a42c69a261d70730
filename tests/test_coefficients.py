"""accumulate_ with its numbers in memory: the bits of the call that has them as arguments, read anew by every call."""

import math

import pytest
import torch
from dbmtl_kernels import ops, rounding
from test_triton import Operations
from torch.library import opcheck
from torch.utils._python_dispatch import _disable_current_modes

BACKENDS = ("native", "triton", "cuda", "eager")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# A state and the seed of its rounding; two of the seeds are bits of a NaN, one of which a conversion would change.
STATES = [(F32, None), (F64, None), (BF16, None), (BF16, 0), (BF16, -1), (BF16, 0x7FF0000000000001), (BF16, -(2**63))]
DECAYS = (0.9, 0.0, 1.0, -0.0, 1e-50)
SCALES = (None, 1024.0, 0.0)
NONSENSE = (math.nan, math.inf)  # what stands in the arguments that do not count


def coefficients(decay, gain, seed):
    numbers = torch.empty(3, dtype=F64)
    numbers[:2] = torch.tensor([decay, gain], dtype=F64)
    numbers[2:].view(torch.int64).fill_(seed or 0)
    return numbers


def problem(state):
    """A row with gaps, gradients of every dtype, one of them missing and one empty."""
    sizes, segments, end = (5, 33, 1, 20000, 0, 64, 8193), [], 3
    for size in sizes:
        segments.append([end, size])
        end += size + 7
    grads = [torch.randn(n, dtype=F64).to((F32, BF16, F16, F64)[i % 4]) for i, n in enumerate(sizes)]
    grads[5] = None
    row = torch.randn(end, dtype=F64).to(state)
    row[3:8] = -0.0  # 0 * -0 + g is g, but for a g of -0
    grads[0][:3] = -0.0
    return row, grads, torch.tensor(segments)


def bits(*tensors):
    return [x.contiguous().view(torch.uint8) for x in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("state", "seed"), STATES)
def test_the_bits_of_the_call_with_numbers(state, seed, backend):
    for decay in DECAYS:
        row, grads, segments = problem(state)
        for scale in SCALES:
            loss_scale = None if scale is None else torch.tensor(scale)
            rows, sums = torch.stack([row, row]), torch.full((2, 1), 5.0, dtype=F64)
            ops.accumulate_(rows[0], sums[0], grads, segments, decay, 0.7, loss_scale, seed, backend)
            given = coefficients(decay, 0.7, seed)
            another = None if seed is None else 12345  # only says that rounding is stochastic
            ops.accumulate_(rows[1], sums[1], grads, segments, *NONSENSE, loss_scale, another, backend, given)
            for (expected, actual), what in zip((rows, sums), ("row", "sumsq"), strict=True):
                assert torch.equal(*bits(expected, actual)), (what, decay, scale)
            assert torch.equal(*bits(given, coefficients(decay, 0.7, seed)))
            assert not torch.equal(rows[1], row) or decay in (1.0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_call_reads_them_anew(backend):
    """What a replayed graph does: the same call, other numbers in the same place."""
    row, grads, segments = problem(BF16)
    expected, sums, numbers = row.clone(), torch.zeros(2, 1, dtype=F64), coefficients(0.0, 0.0, 0)
    for step in range(4):
        decay, gain, seed = 0.9 / step if step else 0.0, 0.1 * step, rounding.update_seed(7, step)
        numbers.copy_(coefficients(decay, gain, seed))
        ops.accumulate_(row, sums[0], grads, segments, *NONSENSE, None, 0, backend, numbers)
        ops.accumulate_(expected, sums[1], grads, segments, decay, gain, None, seed, "native")
        assert torch.equal(*bits(row, expected))
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-12 if backend != "eager" else 1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_decay_what_the_row_holds_does_not_matter(backend):
    row, grads, segments = problem(F32)
    expected, sums = torch.zeros_like(row), torch.zeros(2, 1, dtype=F64)
    for offset, numel in segments.tolist():
        row[offset : offset + numel] = math.nan
        expected[offset : offset + numel] = math.inf
    for mine, sumsq in ((row, sums[0]), (expected, sums[1])):
        ops.accumulate_(mine, sumsq, grads, segments, *NONSENSE, None, None, backend, coefficients(0.0, 1.0, 0))
    for offset, numel in segments.tolist():
        assert torch.equal(row[offset : offset + numel], expected[offset : offset + numel])
    assert torch.equal(*sums)
    assert sums.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [None, 3])
def test_the_host_does_not_look_at_them(seed, backend, monkeypatch):
    """Nor does anything but the kernel run, on a backend that has one."""
    if backend == "triton":
        from dbmtl_kernels.backends.triton import launches

        launch = launches._launch

        def unseen(*args, **options):
            with _disable_current_modes():  # what the interpreter does with tensors is its own affair
                launch(*args, **options)

        monkeypatch.setattr(launches, "_launch", unseen)
    row, grads, segments = problem(BF16)
    numbers, sumsq = coefficients(0.9, 0.1, 3), torch.zeros(1, dtype=F64)
    arguments = (row, sumsq, grads, segments, *NONSENSE, None, seed, backend, numbers)
    ops.accumulate_(*arguments)
    own = Operations()
    with own:
        ops.accumulate_(*arguments)
    assert "local_scalar_dense" not in own.seen
    assert (own.seen == []) == (backend != "eager")


def test_the_key_of_a_seed_on_a_device():
    for seed in (0, 1, -1, 7, 2**63 - 1, -(2**63), 0x7FF0000000000001):
        for row in (0, 3):
            key = rounding.row_key_of(torch.tensor(seed), row)
            assert key.dtype == torch.int64
            assert int(key) % 2**64 == rounding.row_key(seed, row)
    x, keys = torch.randn(1000), (rounding.row_key(9, 0), rounding.row_key_of(torch.tensor(9), 0))
    assert torch.equal(*(rounding.to_bfloat16(x, key, 2**32 - 500) for key in keys))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    arguments = (
        torch.randn(40), torch.zeros(1, dtype=F64), [torch.randn(4), None], torch.tensor([[0, 4], [8, 5]]), 0.9, 0.1,
        torch.tensor(2.0), None, backend, coefficients(0.5, 0.5, 0),
    )  # fmt: skip
    results = opcheck(torch.ops.dbmtl_kernels.accumulate_.default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


REFUSED = {
    "dtype": (torch.ones(3), TypeError, "coefficients must be one of torch.float64, got torch.float32"),
    "integers": (torch.ones(3, dtype=torch.int64), TypeError, "coefficients.*torch.int64"),
    "two": (torch.ones(2, dtype=F64), ValueError, r"coefficients.*\(3,\), got shape \(2,\)"),
    "a matrix": (torch.ones(1, 3, dtype=F64), ValueError, r"coefficients.*got shape \(1, 3\)"),
    "strided": (torch.ones(6, dtype=F64)[::2], ValueError, r"coefficients must be contiguous.*strides \(2,\)"),
    "device": (torch.ones(3, dtype=F64, device="meta"), RuntimeError, "coefficients is on meta but row is on cpu"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, backend):
    given, kind, message = REFUSED[name]
    row, sumsq = torch.ones(4), torch.full((1,), 7.0, dtype=F64)
    arguments = ([torch.ones(4)], torch.tensor([[0, 4]]), 0.5, 0.5, None, None, backend, given)
    with pytest.raises(kind, match=message):
        ops.accumulate_(row, sumsq, *arguments)
    with pytest.raises(ValueError, match=r"seed=5 .*bfloat16 row"):  # a seed still asks for something
        ops.accumulate_(row, sumsq, *arguments[:5], 5, backend, torch.zeros(3, dtype=F64))
    assert (row == 1).all()
    assert sumsq == 7
