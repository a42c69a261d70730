"""Every entry point of the C ABI, of both libraries: what it refuses, by which name, and that nothing is written.

The GPU library is the emulated one. Each case changes one argument of a call that works.
"""

import ctypes
import re

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels import ops
from dbmtl_kernels.backends import abi, cuda, native

BACKENDS = ("native", "cuda")
INVALID, UNSUPPORTED = 1, 2
RAISED = {INVALID: ValueError, UNSUPPORTED: TypeError}
F32, F64, BF16, F16 = range(4)
I64 = ctypes.c_int64


def array(kind, *values):
    return (kind * len(values))(*values)


def addresses(tensors):
    return array(ctypes.c_void_p, *[x.data_ptr() for x in tensors])


def balance():
    return {
        "grads": torch.ones(2, 8), "grad_dtype": F32, "grad_row_stride": 8, "ema": torch.full((2, 8), 3.0),
        "state_dtype": F32, "state_row_stride": 8, "out": torch.full((8,), 5.0), "out_dtype": F32,
        "norms": torch.full((2,), 7.0), "num_tasks": 2, "num_params": 8, "beta": 0.5, "eps": 1e-8, "scale": 0,
        "constant": 0.0, "stochastic": 0, "seed": 0,
    }, []  # fmt: skip


def accumulate():
    grads = [torch.ones(8), torch.ones(4)]
    return {
        "row": torch.full((16,), 3.0), "state_dtype": F32, "num_segments": 2, "segments": array(I64, 0, 8, 8, 4),
        "grads": addresses(grads), "grad_dtypes": bytes([F32, F32]), "decay": 0.5, "gain": 0.5,
        "loss_scale": torch.full((1,), 2.0), "loss_scale_dtype": F32, "sumsq": torch.full((1,), 7.0).double(),
        "stochastic": 0, "seed": 0, "coefficients": None,
    }, grads  # fmt: skip


def combine():
    return {
        "rows": torch.ones(2, 8), "state_dtype": F32, "row_stride": 8, "num_tasks": 2, "num_params": 8,
        "weights": torch.ones(2), "weights_dtype": F32, "out": torch.full((8,), 5.0), "out_dtype": F32, "accumulate": 0,
    }, []  # fmt: skip


def balance_rows():
    outs = [torch.full((4,), 5.0), torch.full((4,), 6.0)]
    return {
        "rows": torch.ones(2, 8), "state_dtype": F32, "row_stride": 8, "num_tasks": 2,
        "sumsq": torch.tensor([8.0, torch.inf]).double(), "broken": torch.zeros(2, dtype=torch.bool),
        "nonfinite_steps": torch.zeros(2, dtype=torch.int64), "norms": torch.full((2,), 7.0).double(),
        "weights": torch.full((2,), 9.0).double(), "num_outs": 2, "outs": addresses(outs),
        "out_dtypes": array(ctypes.c_int32, F32, F32), "starts": array(I64, 0, 4), "numels": array(I64, 4, 4),
        "active": None, "loss_scale": torch.full((1,), 2.0), "loss_scale_dtype": F32, "eps": 1e-8, "scale": 0,
        "constant": 0.0, "fresh": 1, "accumulate": 0,
    }, outs  # fmt: skip


def gramian():
    return {
        "rows": torch.ones(2, 8), "state_dtype": F32, "row_stride": 8, "num_tasks": 2, "num_params": 8,
        "gramian": torch.full((2, 2), 5.0), "out_dtype": F32,
    }, []  # fmt: skip


CALLS = {make.__name__: make for make in (balance, accumulate, combine, balance_rows, gramian)}


class Call:
    """A call that works: its arguments by name, in order, and all memory that it may write."""

    def __init__(self, library, entry):
        self._function = getattr(library, f"dbmtl_{entry}")
        self._space = torch.zeros(library.dbmtl_workspace_bytes(4), dtype=torch.uint8)
        self.arguments, self._behind = CALLS[entry]()
        workspace = self._space.data_ptr() if self._space.numel() else None
        self.arguments |= {"num_threads": 1, "workspace": workspace, "stream": None}

    def __call__(self, **changes):
        assert changes.keys() <= self.arguments.keys()
        values = {**self.arguments, **changes}.values()
        return self._function(*[v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values])

    def memory(self):
        named = [v for v in self.arguments.values() if isinstance(v, torch.Tensor)]
        return [x.clone().view(torch.uint8) for x in (*named, *self._behind, self._space)]


def null(name, message=None):
    return {name: None}, INVALID, message or f"{name} is null"


def unknown(name, *also):
    """A dtype that there is not, on either side of those there are, and others that will not do."""
    return [({name: code}, UNSUPPORTED, name) for code in (-1, 4, 2**31 - 1, *also)]


STRIDE = "row_stride is smaller than num_params"
SEGMENTS = "segments, grads or grad_dtypes is null"
BOOKS = "sumsq, broken, nonfinite_steps, norms or weights is null"
OUTS = "outs, out_dtypes, starts or numels is null"
STOCHASTIC = ({"stochastic": 1}, INVALID, "stochastic: only a bf16 state")
WEIGHING = [
    *[({"eps": eps}, INVALID, "eps must be positive") for eps in (0.0, -1.0, float("nan"))],
    *[({"scale": scale}, INVALID, "scale is unknown") for scale in (-1, 5)],
]
CASES = {
    "balance": [
        *map(null, ("grads", "ema", "out", "norms")),
        *[({"num_tasks": n}, INVALID, "num_tasks must be at least 1") for n in (0, -1)],
        ({"num_params": -1}, INVALID, "num_params is negative"),
        *unknown("grad_dtype"), *unknown("state_dtype", F16), *unknown("out_dtype"),
        *[({name: n}, INVALID, "row stride") for name in ("grad_row_stride", "state_row_stride") for n in (7, -8)],
        *[({"beta": beta}, INVALID, "beta is outside [0, 1)") for beta in (1.0, -0.1, float("nan"))],
        *WEIGHING, STOCHASTIC,
    ],
    "accumulate": [
        null("row"), null("sumsq"), *[null(name, SEGMENTS) for name in ("segments", "grads", "grad_dtypes")],
        ({"num_segments": -1}, INVALID, "num_segments is negative"),
        *[
            ({"segments": array(I64, 0, 8, *second)}, INVALID, "segments has a negative offset or size")
            for second in ((-1, 4), (8, -4))
        ],
        ({"grad_dtypes": bytes([F32, 4])}, UNSUPPORTED, "grad_dtypes"),
        *unknown("state_dtype", F16), *unknown("loss_scale_dtype"), STOCHASTIC,
    ],
    "combine": [
        *map(null, ("rows", "weights", "out")),
        *[({name: -1}, INVALID, f"{name} is negative") for name in ("num_tasks", "num_params")],
        *[({"row_stride": n}, INVALID, STRIDE) for n in (7, -8)],
        *unknown("state_dtype", F16), *unknown("weights_dtype"), *unknown("out_dtype"),
    ],
    "balance_rows": [
        null("rows"), *[null(name, BOOKS) for name in ("sumsq", "broken", "nonfinite_steps", "norms", "weights")],
        *[null(name, OUTS) for name in ("outs", "out_dtypes", "starts", "numels")],
        *[({"num_tasks": n}, INVALID, "num_tasks must be at least 1") for n in (0, -1)],
        *[({"num_outs": n}, INVALID, "num_outs must be 1 to 4") for n in (-1, 0, 5)],
        ({"outs": array(ctypes.c_void_p, None, None)}, INVALID, "outs has a null pointer"),
        ({"out_dtypes": array(ctypes.c_int32, F32, 4)}, UNSUPPORTED, "out_dtypes"),
        ({"starts": array(I64, 0, -4)}, INVALID, "starts or numels is negative"),
        ({"numels": array(I64, 4, -4)}, INVALID, "starts or numels is negative"),
        *[({"row_stride": n}, INVALID, "row_stride is smaller than a row") for n in (7, -8)],
        *unknown("state_dtype", F16), *unknown("loss_scale_dtype"), *WEIGHING,
    ],
    "gramian": [
        null("rows"), null("gramian"),
        *[({name: -1}, INVALID, f"{name} is negative") for name in ("num_tasks", "num_params")],
        *[({"row_stride": n}, INVALID, STRIDE) for n in (7, -8)],
        *unknown("state_dtype", F16), *unknown("out_dtype", BF16, F16),
    ],
}  # fmt: skip
MANY = "num_tasks: the CUDA kernels take at most 256"
ON_CUDA = {
    "balance": [
        null("workspace"), ({"num_tasks": 257}, INVALID, MANY), ({"num_tasks": 2**40}, INVALID, MANY),
        ({"out_dtype": BF16}, UNSUPPORTED, "out_dtype must be that of grads"),
        ({"grad_dtype": F64, "out_dtype": F64}, UNSUPPORTED, "grad_dtype: float64 goes with a float64 state"),
        ({"state_dtype": F64}, UNSUPPORTED, "grad_dtype: float64 goes with a float64 state"),
    ],
    "accumulate": [
        null("workspace"),
        ({"segments": array(I64, 0, 8, 8, 2**62)}, INVALID, "segments has too large a size"),
    ],
    "combine": [null("workspace"), ({"num_tasks": 257}, INVALID, MANY)],
    "balance_rows": [null("workspace"), ({"num_tasks": 257}, INVALID, MANY)],
    "gramian": [null("workspace"), ({"num_tasks": 65}, INVALID, "num_tasks: the Gramian takes at most 64")],
}  # fmt: skip
TABLE = [
    (backend, entry, *case)
    for backend, tables in (("native", [CASES]), ("cuda", [CASES, ON_CUDA]))
    for table in tables
    for entry, cases in table.items()
    for case in cases
]


def named(value):
    if isinstance(value, dict):
        name, given = next(iter(value.items()))
        return f"{name}={list(given) if isinstance(given, ctypes.Array) else given}"
    return str(value) if isinstance(value, str) and value in (*BACKENDS, *CALLS) else ""


def library_of(backend):
    return (cuda if backend == "cuda" else native)._library()


def said(library):
    return library.dbmtl_last_error().decode()


@pytest.mark.parametrize(("backend", "entry", "changes", "status", "message"), TABLE, ids=named)
def test_it_is_refused_by_name_and_nothing_is_written(backend, entry, changes, status, message):
    library = library_of(backend)
    call = Call(library, entry)
    before = call.memory()
    assert call(**changes) == status
    assert message in said(library)
    for now, then in zip(call.memory(), before, strict=True):
        assert torch.equal(now, then)
    with pytest.raises(RAISED[status], match=re.escape(f"dbmtl ({backend}): ") + ".*" + re.escape(message)):
        abi.check(library, status, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", CALLS)
def test_the_call_that_the_cases_change_works_and_writes(entry, backend):
    call = Call(library_of(backend), entry)
    before = call.memory()
    assert call() == 0
    assert any(not torch.equal(now, then) for now, then in zip(call.memory(), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_may_be_null_and_sizes_that_may_be_zero(backend):
    library = library_of(backend)
    assert Call(library, "accumulate")(loss_scale=None, loss_scale_dtype=99) == 0
    assert Call(library, "accumulate")(grads=array(ctypes.c_void_p, None, None)) == 0
    nothing = Call(library, "accumulate")
    assert nothing(row=None, num_segments=0, segments=None, grads=None, grad_dtypes=None) == 0
    assert nothing.arguments["sumsq"] == 0
    assert Call(library, "balance_rows")(loss_scale=None, loss_scale_dtype=99) == 0
    empty = Call(library, "balance")
    assert empty(grads=None, ema=None, out=None, num_params=0) == 0
    assert (empty.arguments["norms"] == 0).all()
    alone = Call(library, "combine")
    assert alone(rows=None, weights=None, num_tasks=0) == 0
    assert (alone.arguments["out"] == 0).all()
    assert Call(library, "combine")(rows=None, out=None, num_params=0) == 0
    assert Call(library, "gramian")(rows=None, gramian=None, num_tasks=0) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entry_points_that_take_no_tensors(backend):
    library = library_of(backend)
    assert library.dbmtl_abi_version() == abi.ABI_VERSION
    assert library.dbmtl_available() == 0
    sizes = [library.dbmtl_workspace_bytes(n) for n in (-1, 0, 1, 64, 256, 2**40)]
    assert sizes[:3] == [sizes[2]] * 3
    assert sizes == sorted(sizes)
    assert (sizes[0] > 0) == (backend == "cuda")


def test_an_unknown_instruction_set_and_a_buffer_that_is_not_there():
    library, before = native._library(), native.isa()
    for name in (b"sse9", b""):
        assert library.dbmtl_set_isa(name) == INVALID
        assert said(library).startswith("name: no such instruction set")
    with pytest.raises(ValueError, match="no such instruction set"):
        native.set_isa("sse9")
    assert native.isa() == before
    for size in (-1, 0, 2**40):
        library.dbmtl_advise_huge_pages(None, size)
    kept = torch.full((4,), 3.0)
    library.dbmtl_advise_huge_pages(kept.data_ptr(), -1)
    assert (kept == 3).all()


def operations(backend):
    """Of every op: the argument of its C call that holds the first float32, a call, and all that it would write."""
    x, out, sums = torch.ones(2, 8), torch.ones(8), torch.ones(2, dtype=torch.float64)
    books = [torch.zeros(2, dtype=dtype) for dtype in (torch.bool, torch.int64, torch.float64, torch.float64)]
    step = (sums, *books, [out], [0], None, None, 1e-8, "max", 0.0, True, False, backend)
    segments = torch.tensor([[0, 8]])
    return [
        ("grad_dtype", lambda: dbk.balance_(torch.ones(2, 8), x, backend=backend), [x]),
        (
            "state_dtype", lambda: ops.accumulate_(x[0], sums[:1], [out], segments, 0.5, 0.5, None, None, backend),
            [x, sums],
        ),
        ("state_dtype", lambda: ops.combine_out(x, torch.ones(2), out, False, backend), [out]),
        ("state_dtype", lambda: ops.balance_rows_(x, *step), [x, sums, *books, out]),
        ("state_dtype", lambda: ops.gramian(x, backend), []),
    ]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(len(CALLS)), ids=CALLS)
def test_every_op_turns_a_status_into_an_error_that_names_the_argument(index, backend, monkeypatch):
    name, run, memory = operations(backend)[index]
    before = [x.clone() for x in memory]
    monkeypatch.setitem(abi.DTYPES, torch.float32, 9)  # as a dtype would be that only Python knows
    with pytest.raises(TypeError, match=rf"dbmtl \({backend}\): {name}$"):
        run()
    for now, then in zip(memory, before, strict=True):
        assert torch.equal(now, then)
