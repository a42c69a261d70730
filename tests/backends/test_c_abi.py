"""Every entry point of the C ABI, of both libraries: what it refuses, and that nothing is written then.

The GPU library is the emulated one. Each case changes one argument of a call that works.
"""

import ctypes
import math
import re
import subprocess

import pytest
import torch
from dbmtl_kernels.backends import c_library as c
from dbmtl_kernels.backends.c_library import cuda, native

CPU = torch.device("cpu")
BACKENDS = ("native", "cuda")
INVALID, UNSUPPORTED, NO_MEMORY = 1, 2, 3
RAISED = {INVALID: ValueError, UNSUPPORTED: TypeError, NO_MEMORY: MemoryError}
F32, F64, BF16, F16 = range(4)
LAST = 2**63 - 1
NEGATIVE, OVERLAPPING, ENDLESS, OVERFLOWING, LARGE = (
    (ctypes.c_int64 * 4)(0, 8, *second) for second in ((8, -4), (4, 4), (8, LAST), (LAST - 3, 4), (2**45, 4))
)


@pytest.fixture(autouse=True)
def _emulated(emulated_cuda):
    pass


class Call:
    """A call that works: its arguments, and all memory that it may write."""

    def __init__(self, backend, entry):
        self.serve = cuda if backend == "cuda" else native
        self.memory, self.kept = [], []
        self.where = c.Where(*self.serve._where(CPU, 256))
        self.args = getattr(self, entry)()
        self._function = getattr(self.serve.library(), f"dbmtl_{entry}")

    def __call__(self):
        return self._function(ctypes.byref(self.args))

    def set(self, paths, value):
        for path in paths.split():
            self.set_one(path, value)

    def set_one(self, path, value):
        self.kept.append(value)
        *path, last = path.split(".")
        at = self.args
        for name in path:
            at = at[int(name)] if name.isdigit() else getattr(at, name)
        by_address = last == "segments" and value is not None
        setattr(at, last, ctypes.addressof(value) if by_address else value)

    def tensor(self, *values, dtype=torch.float32):
        self.memory.append(torch.tensor(values, dtype=dtype))
        return self.memory[-1]

    def rows(self):
        return c.Rows(*c._rows(self.tensor([1.0] * 8, [3.0] * 8)))

    def numbers(self, count, dtype=torch.float32):
        return c.Array(*c._array(self.tensor(*[5.0] * count, dtype=dtype)))

    def balance(self):
        norms = self.numbers(2).data
        weighting = c.Weighting(1e-8, 0.0, 0)
        return c.BalanceArgs(self.rows(), self.rows(), self.numbers(8), norms, 0.5, weighting, self.where)

    def accumulate(self):
        segments = self.tensor([0, 8], [8, 4], dtype=torch.int64).data_ptr()
        grads = (ctypes.c_void_p * 2)(self.numbers(8).data, self.numbers(4).data)
        sumsq, coefficients = self.numbers(1, torch.float64).data, self.numbers(2, torch.float64).data
        row, scale = self.numbers(16), self.numbers(1)
        return c.AccumulateArgs(row, sumsq, coefficients, scale, 2, segments, grads, bytes(2), self.where)

    def combine(self):
        return c.CombineArgs(self.rows(), self.numbers(2), self.numbers(8), 0, self.where)

    def balance_rows(self):
        sumsq = self.tensor(8.0, torch.inf, dtype=torch.float64).data_ptr()
        norms, weights = self.numbers(2, torch.float64).data, self.numbers(2, torch.float64).data
        nonfinite, steps = self.tensor(0, 0, dtype=torch.bool), self.tensor(0, 0, dtype=torch.int64)
        outs = [c.Out(self.numbers(4).data, F32, start, 4) for start in (0, 4)]
        return c.BalanceRowsArgs(
            self.rows(), sumsq, norms, weights, nonfinite.data_ptr(), steps.data_ptr(), None, self.numbers(1), 1.0,
            (c.Out * c.MAX_OUTS)(*outs), 2, 1, 0, c.Weighting(1e-8, 0.0, 0), self.where,
        )  # fmt: skip

    def gramian(self):
        return c.GramianArgs(self.rows(), self.numbers(4), self.where)


ENTRIES = ("balance", "accumulate", "combine", "balance_rows", "gramian")
SIZE = "size or stride"
LARGEST = "no memory is so large"
CASES = [
    ("balance", "grads.data", None, INVALID, "grads is null"),
    ("balance", "ema.dtype", F16, UNSUPPORTED, "ema: dtype"),
    ("balance", "grads.stride", 7, INVALID, f"grads: {SIZE}"),
    ("balance", "grads.num_tasks", 1, INVALID, "grads: not the size of ema"),
    ("balance", "norms", None, INVALID, "norms is null"),
    ("accumulate", "num_segments", -1, INVALID, "num_segments is negative"),
    ("accumulate", "segments", None, INVALID, "segments, grads or grad_dtypes is null"),
    ("accumulate", "segments", NEGATIVE, INVALID, "segments: negative"),
    ("accumulate", "grad_dtypes", b"\0\4", UNSUPPORTED, "grads: dtype"),
    ("accumulate", "coefficients", None, INVALID, "sumsq or coefficients is null"),
    ("combine", "rows.num_params", -1, INVALID, f"rows: {SIZE}"),
    ("combine", "rows.num_tasks", -1, INVALID, f"rows: {SIZE}"),
    ("combine", "weights.dtype", 4, UNSUPPORTED, "weights: dtype"),
    ("combine", "out.data", None, INVALID, "out is null"),
    ("balance_rows", "num_outs", 5, INVALID, "num_outs"),
    ("balance_rows", "outs.1.start", 5, INVALID, "outs: outside the rows"),
    ("balance_rows", "nonfinite", None, INVALID, "nonfinite or nonfinite_steps is null"),
    ("gramian", "gramian.dtype", BF16, UNSUPPORTED, "gramian: dtype"),
    # Sizes of which a product, a sum or a number of bytes is beyond int64, or beyond any memory.
    ("balance", "grads.num_tasks ema.num_tasks", 2**60, INVALID, "grads: num_tasks is too large"),
    ("balance", "grads.num_tasks ema.num_tasks", 2**62, INVALID, "grads: num_tasks is too large"),
    ("balance", "grads.num_params grads.stride ema.num_params ema.stride", LAST, INVALID, f"grads: {LARGEST}"),
    ("balance", "grads.stride", LAST, INVALID, f"grads: {LARGEST}"),
    ("balance", "ema.stride", 2**46, INVALID, f"ema: {LARGEST}"),
    ("accumulate", "num_segments", 2**60, INVALID, "num_segments is too large"),
    ("accumulate", "segments", ENDLESS, INVALID, f"segments: {LARGEST}"),
    ("accumulate", "segments", OVERFLOWING, INVALID, f"segments: {LARGEST}"),
    ("accumulate", "segments", LARGE, INVALID, f"segments: {LARGEST}"),
    ("accumulate", "segments", OVERLAPPING, INVALID, "segments: two overlap"),
    ("combine", "rows.num_tasks", 2**60, INVALID, "rows: num_tasks is too large"),
    ("combine", "rows.num_params rows.stride", LAST, INVALID, f"rows: {LARGEST}"),
    ("combine", "rows.num_params rows.stride", 2**62, INVALID, f"rows: {LARGEST}"),
    ("balance_rows", "rows.num_tasks", 2**60, INVALID, "rows: num_tasks is too large"),
    ("balance_rows", "num_outs", -(2**63), INVALID, "num_outs"),
    ("balance_rows", "outs.1.start", LAST, INVALID, "outs: outside the rows"),
    ("balance_rows", "outs.1.numel", LAST, INVALID, "outs: outside the rows"),
    ("gramian", "rows.num_tasks", 2**60, INVALID, "rows: num_tasks is too large"),
    ("gramian", "rows.num_tasks", 2**24, INVALID, f"gramian: {LARGEST}"),
    ("gramian", "rows.num_params rows.stride", 2**46, INVALID, f"rows: {LARGEST}"),
    # Numbers that are none, or that Python would refuse too.
    *(("balance", "beta", x, INVALID, "beta: not in [0, 1)") for x in (math.nan, 1.0, -0.1, math.inf)),
    *(
        (entry, f"weighting.{name}", x, INVALID, f"{name}: not ")
        for entry in ("balance", "balance_rows")
        for name, values in (("eps", (math.nan, 0.0, -1.0, math.inf)), ("constant", (math.nan, math.inf, -math.inf)))
        for x in values
    ),
    *((entry, "weighting.scale", x, INVALID, "scale") for entry in ("balance", "balance_rows") for x in (-1, 5, 2**32)),
    ("balance_rows", "propagate_above", math.nan, INVALID, "propagate_above: NaN"),
]
ON_CPU = [("gramian", "rows.num_tasks", 2**22, NO_MEMORY, "scratch")]  # 2^47 bytes for sums
ON_CUDA = [
    ("combine", "where.workspace", None, INVALID, "workspace is null"),
    ("combine", "rows.num_tasks", 257, INVALID, "num_tasks: the CUDA kernels take at most 256"),
    ("gramian", "rows.num_tasks", 65, INVALID, "num_tasks: the Gramian takes at most 64"),
    ("balance", "grads.dtype", F64, UNSUPPORTED, "out: dtype is not that of grads"),
]
TABLE = [(backend, *case) for backend in BACKENDS for case in CASES]
TABLE += [("cuda", *case) for case in ON_CUDA] + [("native", *case) for case in ON_CPU]


@pytest.mark.parametrize(("backend", "entry", "path", "value", "status", "message"), TABLE)
def test_it_is_refused_by_name_and_nothing_is_written(backend, entry, path, value, status, message):
    call = Call(backend, entry)
    call.set(path, value)
    before = [x.clone() for x in call.memory]
    assert call() == status
    assert all(map(torch.equal, call.memory, before))
    with pytest.raises(RAISED[status], match=re.escape(f"dbmtl ({backend}): ") + ".*" + re.escape(message)):
        call.serve.check(status)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_call_without_a_struct_is_refused(entry, backend):
    call = Call(backend, entry)
    with pytest.raises(ValueError, match="args is null"):
        call.serve.check(call._function(None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_and_orders_that_stay_legal(backend):
    for entry, path, values in (
        ("balance", "beta", (0.0, -0.0, 1 - 2**-53)),
        ("balance", "weighting.eps", (5e-324, 1.7e308)),
        ("balance", "weighting.constant", (-1.7e308, -0.0, 1.7e308)),
        ("balance", "where.num_threads", (-(2**63), 0, LAST)),
        ("accumulate", "segments", ((8, 8, 0, 4), (0, 8, 12, 4), (5, 8, 0, 4))),
    ):
        for value in values:
            call = Call(backend, entry)
            call.set(path, (ctypes.c_int64 * 4)(*value) if isinstance(value, tuple) else value)
            assert call() == 0, (path, value)
    # In no order, and an empty segment within another.
    call = Call(backend, "accumulate")
    numels = (0, 4, 8, 2)
    segments = (ctypes.c_int64 * 8)(*(x for pair in zip((9, 12, 4, 0), numels, strict=True) for x in pair))
    call.set("segments", segments)
    call.set("grads", (ctypes.c_void_p * 4)(*(call.numbers(n).data for n in numels)))
    call.set("grad_dtypes", bytes(4))
    call.set("num_segments", 4)
    assert call() == 0
    segments[0:2] = (9, 1)
    assert call() == INVALID


def test_any_number_of_threads_gives_the_same_bits():
    rows = torch.randn(3, 50000)
    grams = []
    for threads in (1, 3, LAST):
        grams.append(torch.empty(3, 3))
        args = c.GramianArgs(c.Rows(*c._rows(rows)), c.Array(*c._array(grams[-1])), c.Where(threads, None, None))
        native.check(native.library().dbmtl_gramian(ctypes.byref(args)))
    assert torch.equal(grams[0], grams[1])
    assert torch.equal(grams[0], grams[2])


def test_nothing_in_the_library_throws():
    """What an exception would begin with is not called: none can cross the boundary."""
    symbols = subprocess.run(["nm", "-D", "-C", native.path], capture_output=True, text=True, check=True).stdout
    assert "dbmtl_gramian" in symbols
    assert re.findall(r"U (__cxa_throw|std::__throw\w*|operator new.*)", symbols) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_call_that_the_cases_change_works_and_writes(entry, backend):
    call = Call(backend, entry)
    before = [x.clone() for x in call.memory]
    assert call() == 0
    assert not all(map(torch.equal, call.memory, before))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_may_be_null_and_sizes_that_may_be_zero(backend):
    def call(entry, **changes):
        made = Call(backend, entry)
        for path, value in changes.items():
            made.set(path.replace("__", "."), value)
        assert made() == 0
        return made

    call("accumulate", loss_scale__data=None, grads=(ctypes.c_void_p * 2)(None, None))
    nothing = call("accumulate", row__data=None, num_segments=0, segments=None, grads=None, grad_dtypes=None)
    assert any(torch.equal(x, torch.zeros(1).double()) for x in nothing.memory)  # sumsq
    measured = call("accumulate", row__data=None, loss_scale__data=None)
    assert any(torch.equal(x, torch.full((1,), 12.0 * 625).double()) for x in measured.memory)
    call("balance_rows", loss_scale__data=None, rows__data=None, rows__num_params=0, num_outs=0)
    empty = {"grads__data": None, "grads__num_params": 0, "ema__data": None, "ema__num_params": 0, "out__data": None}
    assert any(torch.equal(x, torch.zeros(2)) for x in call("balance", **empty).memory)  # norms
    alone = call("combine", rows__data=None, rows__num_tasks=0, weights__data=None)
    assert any(torch.equal(x, torch.zeros(8)) for x in alone.memory)  # out
    call("combine", rows__data=None, rows__num_params=0, out__data=None)
    call("gramian", rows__data=None, rows__num_tasks=0, gramian__data=None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("above", "passed_on"), [(4.0, True), (5.0, False), (float("inf"), False), (-1.0, True)])
def test_a_task_that_is_not_finite_is_passed_on_above_a_factor(above, passed_on, backend):
    """The loss scale of the call is 5."""
    call = Call(backend, "balance_rows")
    call.set("propagate_above", above)
    assert call() == 0
    outs = [x for x in call.memory if x.numel() == 4]
    assert [bool(out.isnan().all()) for out in outs] == [passed_on] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entry_points_that_take_no_tensors(backend):
    library = (cuda if backend == "cuda" else native).library()
    assert library.dbmtl_abi_version() == c.ABI_VERSION
    assert library.dbmtl_available() == 0
    sizes = [library.dbmtl_workspace_bytes(n) for n in (-1, 0, 1, 64, 256, 2**40)]
    assert sizes[:3] == [sizes[2]] * 3
    assert sizes == sorted(sizes)
    assert (sizes[0] > 0) == (backend == "cuda")


@pytest.mark.parametrize("status", range(1, 7))
def test_every_status_is_an_error(status):
    kind = {1: ValueError, 2: TypeError, 3: MemoryError}.get(status, RuntimeError)
    with pytest.raises(kind, match=r"^dbmtl \(native\): "):
        native.check(status)


def test_instruction_sets():
    before = native.isa()
    native.set_isa("baseline")
    assert native.isa() == "baseline"
    for name in ("sse9", ""):
        with pytest.raises(ValueError, match="name: no such instruction set"):
            native.set_isa(name)
    assert native.isa() == "baseline"
    native.set_isa(None)
    assert native.isa() == before


def test_huge_pages_of_a_buffer_that_is_not_there():
    for size in (-1, 0, 2**40):
        native.library().dbmtl_advise_huge_pages(None, size)
    ones = torch.ones(4)
    native.library().dbmtl_advise_huge_pages(ones.data_ptr(), -1)
    assert (ones == 1).all()


def test_a_library_that_is_not_there_broken_or_of_another_version(tmp_path, monkeypatch):
    library = c.CLibrary("native", "libdbmtl_none", False, "get one")
    assert re.search("libdbmtl_none.* was not built: get one", library.missing(CPU))
    assert library.missing(torch.device("meta")) == "it serves CPU tensors only"
    with pytest.raises(RuntimeError, match="was not built"):
        library.isa()
    library.advise_huge_pages(torch.empty(1 << 22))  # a hint
    library.path = tmp_path / "junk.so"
    library.path.write_bytes(b"junk")
    assert "was not built" in library.missing(CPU)  # as it is remembered
    library.forget()
    assert "junk.so could not be loaded" in library.missing(CPU)
    library.path = native.path
    library.forget()
    monkeypatch.setattr(c, "ABI_VERSION", 99)
    assert "ABI version 7, this package needs 99" in library.missing(CPU)
