"""The Triton backend where it differs from the others: launches, bytes, workspaces, tables. No GPU is needed.

That its numbers are right is tested beside the other backends (test_balance, test_ops, test_rounding, ...).
"""

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from dbmtl_kernels import backends, ops
from dbmtl_kernels.backends import native
from dbmtl_kernels.backends import triton as backend
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytestmark = pytest.mark.interpreter
CUDA = torch.device("cuda", 0)
LAUNCHES = "DBMTL_TRITON_LAUNCHES"


@pytest.fixture
def launches():
    backends.resolve("triton", torch.device("cpu"))
    from dbmtl_kernels.backends.triton import launches

    return launches


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
    """Bytes that kernels read and write, told apart by whose memory it is."""

    def __init__(self, monkeypatch, **tensors):
        self.tensors = tensors
        self.watch = None  # called with the dictionary and the addresses of every access
        self.read = dict.fromkeys([*tensors, "other"], 0)
        self.written = dict(self.read)
        from triton.runtime import interpreter

        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def count(into, pointers, mask):
            at = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].ravel()
            size = pointers.get_element_ty().primitive_bitwidth // 8
            if self.watch is not None and len(at):
                self.watch(into, at)
            rest = len(at)
            for name, tensor in self.tensors.items():
                begin = tensor.data_ptr()
                inside = int(((at >= begin) & (at < begin + tensor.nbytes)).sum())
                into[name] += inside * size
                rest -= inside
            into["other"] += rest * size

        def counted_load(builder, pointers, mask, *rest):
            count(self.read, pointers, mask)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder, pointers, value, mask, *rest):
            count(self.written, pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)


# --- launches -------------------------------------------------------------------------------------------------


def test_the_dense_op_is_one_launch_or_two(launched, monkeypatch):
    grads = torch.randn(3, 5000)
    results = []
    for form, kernels in (("", ["balance_kernel"]), ("2", ["update_kernel", "combine_kernel"])):
        monkeypatch.setenv(LAUNCHES, form)
        ema = torch.ones(3, 5000)
        results.append((*dbk.balance_(grads, ema, backend="triton"), ema))
        assert [name for name, _ in launched] == kernels
        assert all(grid > 1 for _, grid in launched) or form == ""
        launched.clear()
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_an_engine_step_is_one_launch_a_task_and_one_more(launched, mixed, scale, monkeypatch):
    trunk = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    if mixed:
        trunk[2].to(torch.bfloat16)
    balancer = dbk.DBMTL(trunk.parameters(), 3, backend="triton")
    own = Operations()
    monkeypatch.setattr(dbk.losses, "is_zero", lambda factor: False)  # looks at values on a CPU only

    def watched(function):
        def run(*args, **kwargs):
            with own:
                return function(*args, **kwargs)

        return run

    monkeypatch.setattr(balancer._grads, "hand_over", watched(balancer._grads.hand_over))
    monkeypatch.setattr(balancer, "_write", watched(balancer._write))
    for _ in range(3):
        for p in trunk.parameters():
            p.grad = None
        hidden = trunk[1](trunk[0](torch.randn(5, 8)))
        out = trunk[2](hidden.to(trunk[2].weight.dtype)).float()
        loss = balancer([(out - t).square().mean() for t in range(3)])
        (loss if scale is None else loss * scale).backward()
        assert [name for name, _ in launched] == ["accumulate_kernel"] * 3 + ["balance_rows_kernel"]
        assert own.seen == []
        launched.clear()
    assert all(torch.isfinite(p.grad).all() for p in trunk.parameters())


def test_one_launch_whatever_the_driver_can_hold(launches, monkeypatch):
    """The cooperative grid is bounded by what the device says is resident, and by the tiles there are."""
    grids = []
    monkeypatch.setattr(launches, "INTERPRETED", False)
    launches._dense_plan.cache_clear()
    monkeypatch.setattr(launches, "_launch", lambda kernel, grid, *args, **options: grids.append(grid))
    monkeypatch.setattr(launches.driver, "multiprocessors", lambda device: 10)
    for resident, size in ((1, 1 << 22), (2, 1 << 22), (9, 1 << 22), (9, 5000)):
        monkeypatch.setattr(launches, "_resident_programs", lambda *args, resident=resident: resident)
        launches.balance_(torch.zeros(2, size), torch.zeros(2, size), 0.9, 1e-8, "max", 0.0, None)
    launches._dense_plan.cache_clear()
    assert grids == [10, 20, 20, 5]


# --- bytes: the budget of docs/backends.md, to the byte --------------------------------------------------------


@pytest.mark.parametrize("form", ["1", "2"])
@pytest.mark.parametrize(("grad", "state"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("beta", [0.9, 0.0])
def test_bytes_of_the_dense_op(launches, form, grad, state, beta, monkeypatch):
    monkeypatch.setenv(LAUNCHES, form)
    grads, ema = torch.randn(3, 50001).to(grad), torch.randn(3, 50001).to(state)
    out = torch.empty(50001, dtype=grad)
    norms = torch.empty(3)
    made = iter([out, norms])
    monkeypatch.setattr(launches.torch, "empty", lambda *args, **options: next(made))
    traffic = Traffic(monkeypatch, grads=grads, ema=ema, out=out)
    launches.balance_(grads, ema, beta, 1e-8, "max", 0.0, None)
    assert traffic.read["grads"] == grads.nbytes
    assert traffic.read["ema"] == (2 if beta else 1) * ema.nbytes  # a state that does not count is not read
    assert traffic.written["ema"] == ema.nbytes
    assert traffic.written["out"] == out.nbytes
    assert traffic.read["out"] == traffic.written["grads"] == 0
    small = traffic.read["other"] + traffic.written["other"]
    assert small <= 0.01 * (grads.nbytes + 2 * ema.nbytes)


def test_bytes_of_an_engine_step(launches, monkeypatch):
    params = [torch.zeros(n, requires_grad=True) for n in (40000, 77, 9000, 1)]
    layout = dbk.ParameterLayout(params)
    buffer = dbk.TaskGradientBuffer(layout, 3, "triton")
    flats = buffer.new_flats()
    grads = [[torch.randn_like(p) for p in params] for _ in range(3)]
    one = sum(g.nbytes for g in grads[0])
    row = buffer.rows[0].nbytes  # with its padding, which combining reads too
    traffic = Traffic(monkeypatch, rows=buffer.rows, out=flats[torch.float32])
    for task in range(3):
        buffer.accumulate(task, grads[task], 0.9, 0.1)
    assert traffic.read["rows"] == traffic.written["rows"] == 3 * one
    assert one * 3 <= traffic.read["other"] <= 1.02 * one * 3  # the gradients, each once, and the tables
    assert traffic.written["other"] <= 0.01 * one
    buffer.balance(flats, 1e-8, "max")
    assert traffic.read["rows"] == 3 * one + 3 * row
    assert traffic.written["rows"] == 3 * one
    assert traffic.written["out"] == row
    assert traffic.read["out"] == 0
    assert row <= 1.01 * one


def test_the_second_phase_walks_backwards(monkeypatch):
    """So that it finds in the cache what the first touched last. Without decay only the second reads the state."""
    ema, seen = torch.zeros(2, 60000), []
    traffic = Traffic(monkeypatch, ema=ema)
    traffic.watch = lambda into, at: seen.append(int(at.min())) if into is traffic.read and len(at) > 100 else None
    dbk.balance_(torch.randn(2, 60000), ema, 0.0, backend="triton")
    columns = [
        (address - ema.data_ptr()) // 4 % 60000 for address in seen if 0 <= address - ema.data_ptr() < ema.nbytes
    ]
    tiles = columns[::2]  # two tasks each
    assert len(tiles) > 8
    assert tiles == sorted(tiles, reverse=True)


@pytest.mark.parametrize("kernel", ["dense", "rows"])
def test_every_program_keeps_its_weights_to_itself(launches, launched, kernel, monkeypatch):
    monkeypatch.setenv(LAUNCHES, "2")
    rows = torch.randn(3, 60000)
    dbk.balance_(rows, torch.zeros(3, 60000), backend="triton")  # makes the workspace large enough
    weights = launches.workspace(torch.device("cpu")).weights(0)
    seen = set()
    traffic = Traffic(monkeypatch, weights=weights)
    traffic.watch = lambda into, at: seen.update(at.tolist()) if into is traffic.written else None
    if kernel == "dense":
        dbk.balance_(rows, torch.zeros(3, 60000), backend="triton")
    else:
        buffer = dbk.TaskGradientBuffer(dbk.ParameterLayout([torch.zeros(60000, requires_grad=True)]), 3, "triton")
        buffer.balance(buffer.new_flats(), 1e-8, "max")
    begin = weights.data_ptr()
    programs = launched[-1][1]
    assert programs > 1
    assert len([a for a in seen if begin <= a < begin + weights.nbytes]) == programs * 2 * 3


# --- the same bits as the CPU kernels -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["1", "2"])
@pytest.mark.parametrize("size", [1, 31, 4096, 20011])
def test_state_has_the_bits_of_the_native_backend(form, size, monkeypatch):
    monkeypatch.setenv(LAUNCHES, form)
    for grad in (torch.float32, torch.bfloat16, torch.float16):
        for state in (torch.float32, torch.bfloat16):
            grads, ema = torch.randn(4, size).to(grad), torch.randn(4, size).to(state)
            grads[0, 0], other = -0.0, ema.clone()
            for beta in (0.9, 0.0):
                out, norms = dbk.balance_(grads, ema, beta, backend="triton")
                expected, exact = dbk.balance_(grads, other, beta, backend="native")
                assert torch.equal(ema.view(torch.uint8), other.view(torch.uint8))
                torch.testing.assert_close(norms, exact, rtol=2e-7, atol=0)
                torch.testing.assert_close(out.float(), expected.float(), rtol=2**-7, atol=1e-6)


def test_rows_further_apart_than_they_are_long():
    """A row length that divides by 8 in a matrix whose stride does not."""
    grads, ema, other = torch.randn(3, 4001)[:, :4000], torch.randn(3, 4000), torch.empty(3, 4000)
    other.copy_(ema)
    out, _ = dbk.balance_(grads, ema, backend="triton")
    expected, _ = dbk.balance_(grads, other, backend="native")
    assert torch.equal(ema, other)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(ops.combine(grads, torch.ones(3), None, "triton"), grads.sum(0))
    torch.testing.assert_close(ops.gramian(grads, "triton"), dbk.reference.gramian(grads))


@pytest.mark.parametrize("off", [0, 1])
def test_a_row_has_the_bits_of_the_native_backend(off):
    sizes = (3, 0, 1, 1030, 20000, 8)
    for state in (torch.float32, torch.bfloat16):
        seed = 5 if state == torch.bfloat16 else None
        starts = np.cumsum([0, *(s + 7 * off if off else -(-s // 32) * 32 for s in sizes)])
        segments = torch.tensor([[int(a), s] for a, s in zip(starts, sizes, strict=False)])
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        # Cut off by an element, so that the first does not lie on 16 bytes.
        grads = [torch.randn(n + off).to(dtypes[i % 4])[off:] for i, n in enumerate(sizes)]
        grads[2] = None
        rows = torch.randn(int(starts[-1])).to(state).expand(2, -1).clone()
        sums = torch.zeros(2, 1, dtype=torch.float64)
        for decay, scale in ((0.9, None), (0.0, 7.0), (1.0, 0.0)):
            loss_scale = None if scale is None else torch.tensor(scale)
            for row, sumsq, name in zip(rows, sums, ("triton", "native"), strict=True):
                ops.accumulate_(row, sumsq, grads, segments, decay, 0.3, loss_scale, seed, name)
            assert torch.equal(rows[0].view(torch.uint8), rows[1].view(torch.uint8))
            torch.testing.assert_close(sums[0], sums[1], rtol=1e-12, atol=0)


def test_offsets_beyond_31_bits():
    """Rows that far apart, in memory that is reserved and never touched in between."""
    far, size = 2**31 + 64, 1000
    store = torch.empty(far + size, dtype=torch.bfloat16)
    rows = store.as_strided((2, size), (far, 1))
    rows.copy_(torch.randn(2, size))
    out = ops.combine(rows, torch.tensor([2.0, 3.0]), torch.float32, "triton")
    torch.testing.assert_close(out, 2 * rows[0].float() + 3 * rows[1].float())
    torch.testing.assert_close(ops.gramian(rows, "triton"), dbk.reference.gramian(rows))
    ema = torch.zeros(2, size)
    dbk.balance_(rows, ema, 0.0, backend="triton")
    assert torch.equal(ema, rows.float())
    grad, sumsq = torch.randn(size), torch.zeros(1, dtype=torch.float64)
    ops.accumulate_(store, sumsq, [grad], torch.tensor([[far, size]]), 0.0, 1.0, None, None, "triton")
    assert torch.equal(rows[1], grad.bfloat16())


# --- workspaces and tables ------------------------------------------------------------------------------------------


def test_scratch_may_hold_anything_and_counters_come_back_to_zero(launches, monkeypatch):
    cpu = torch.device("cpu")
    space = launches.workspace(cpu)
    assert space is launches.workspace(cpu)
    rows, grads = torch.randn(3, 6000), [torch.randn(6000)]

    def everything():
        ema, row, sumsq = torch.ones(3, 6000), torch.ones(6000), torch.zeros(1, dtype=torch.float64)
        results = [*dbk.balance_(rows, ema, backend="triton"), ema]
        ops.accumulate_(row, sumsq, grads, torch.tensor([[0, 6000]]), 0.9, 0.1, None, None, "triton")
        return [*results, row, sumsq, ops.gramian(rows, "triton")]

    for form in ("1", "2"):
        monkeypatch.setenv(LAUNCHES, form)
        first = everything()
        space.slots(0).fill_(float("nan"))
        space.weights(0).fill_(float("nan"))
        for a, b in zip(first, everything(), strict=True):
            assert torch.equal(a, b)
        assert space.counters[[0, 2, 3]].tolist() == [0, 0, 0]
    assert space.counters[1] > 0  # how often the barrier has opened


def test_chunk_table():
    from dbmtl_kernels.backends.triton.tables import chunk_table

    segments = np.array([[3, 0], [3, 25], [100, 10], [200, 7]])
    table = chunk_table(segments, 10)
    assert table.tolist() == [
        [1, 0, 3, 10], [1, 10, 13, 10], [1, 20, 23, 5], [2, 0, 100, 10], [3, 0, 200, 7]
    ]  # fmt: skip
    assert chunk_table(segments[:1], 10).shape == (0, 4)


def test_address_table():
    from dbmtl_kernels.backends.triton.tables import addresses

    grads = [torch.zeros(3, dtype=torch.float16), None, torch.zeros(0), torch.zeros(2, dtype=torch.bfloat16)]
    table, codes = addresses(grads, torch.device("cpu"))
    assert codes == {0, 1, 2}
    assert table.tolist() == [[grads[0].data_ptr(), 2], [0, 0], [0, 0], [grads[3].data_ptr(), 1]]
    table, codes = addresses([None, grads[0]], torch.device("cpu"))
    assert codes == {2}
    assert table[0].tolist() == [0, 2]  # of a dtype that is compiled in


def test_broken_tasks_partial_steps_and_loss_scales_as_on_the_eager_backend():
    for trial in range(24):
        torch.manual_seed(trial)
        num_tasks = 1 + trial % 5
        rows = torch.randn(num_tasks, 20096).to((torch.float32, torch.bfloat16, torch.float64)[trial % 3])
        sumsq = rows.double().square().sum(1)
        if trial % 2:
            rows[-1, 3] = float("nan")
            sumsq[-1] = float("nan")
        books = [
            rows, sumsq, torch.rand(num_tasks) < 0.2, torch.randint(5, (num_tasks,)),
            *torch.full((2, num_tasks), float("nan"), dtype=torch.float64),
        ]  # fmt: skip
        outs = [torch.randn(20032), torch.randn(40).bfloat16()]  # several programs, and a gap between
        active = torch.rand(num_tasks) < 0.7 if trial % 4 else None
        scale = (None, torch.tensor(8.0), torch.tensor(0.5))[trial % 3]
        alpha = ("max", "mean", "median", "min", "constant")[trial % 5]
        states = []
        for name in ("triton", "eager"):
            mine, flats = [b.clone() for b in books], [o.clone() for o in outs]
            ops.balance_rows_(
                *mine, flats, [0, 20048], active, scale, 1e-8, alpha, 0.7, bool(trial & 1), bool(trial & 2), name
            )
            states.append([*mine, *flats])
        for ours, theirs in zip(*states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-5,
                                       equal_nan=True)  # fmt: skip


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_more_tasks_than_the_gramian_takes():
    with pytest.raises(ValueError, match=r"backend='triton'.*Gramian takes at most 64 tasks, got 65"):
        ops.gramian(torch.zeros(65, 4), "triton")


@pytest.mark.parametrize(
    ("version", "message"), [(None, r"not installed.*triton >= 3.3"), ("3.2.1", r"3\.2\.1 is too old.*>= 3.3")]
)
def test_triton_absent_or_too_old(monkeypatch, version, message):
    monkeypatch.setattr(backend, "_version", lambda: version)
    backends.clear_cache()
    try:
        assert backend.missing(CUDA)
        ema = torch.ones(2, 4)
        with pytest.raises(RuntimeError, match=f"backend='triton'.*{message}"):
            dbk.balance_(torch.ones(2, 4), ema, backend="triton")
        assert (ema == 1).all()
        match = f"triton backend is not available for cuda.*{message}.*cuda backend is not available.*eager"
        with pytest.warns(RuntimeWarning, match=match):
            assert backends.resolve("auto", CUDA) is backends.get("eager")
    finally:
        backends.clear_cache()


def test_where_it_serves(monkeypatch):
    backends.clear_cache()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(backend._launches(), "INTERPRETED", False)
            assert backends.resolve("auto", CUDA) is backend
        assert backends.resolve("auto", torch.device("cpu")) is native
        assert "CUDA tensors only" in backend.missing(torch.device("meta"))
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert "TRITON_INTERPRET=1" in backend.missing(torch.device("cpu"))
        assert "TRITON_INTERPRET=1 is set" in backend.missing(CUDA)
        monkeypatch.setattr(backend._launches(), "INTERPRETED", False)
        assert backend.missing(CUDA) is None
    finally:
        backends.clear_cache()


def test_an_interpreter_that_does_not_run_is_a_reason(launches, monkeypatch):
    monkeypatch.setattr(launches, "combine_out", lambda *args: 1 / 0)
    assert "division by zero" in backend.missing(torch.device("cpu"))


def test_tensors_on_two_devices():
    row, sumsq = torch.ones(4), torch.ones(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"grads\[0\] is on meta but row is on cpu"):
        ops.accumulate_(
            row, sumsq, [torch.ones(4, device="meta")], torch.tensor([[0, 4]]), 0.5, 0.5, None, None, "triton"
        )
    assert (row == 1).all()
    assert sumsq == 1


class Driver:
    """Stands for libcuda: a device whose attribute and occupancy are given."""

    def __init__(self, cooperative, resident=3, status=0):
        self.cooperative, self.resident, self.status, self.calls = cooperative, resident, status, []

    def cuDeviceGet(self, handle, index):  # noqa: N802
        handle._obj.value = 40 + index.value
        return self.status

    def cuDeviceGetAttribute(self, value, attribute, handle):  # noqa: N802
        self.calls.append((attribute.value, handle.value))
        value._obj.value = self.cooperative
        return self.status

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, count, function, threads, shared):  # noqa: N802
        self.calls.append((function.value, threads.value, shared.value))
        count._obj.value = self.resident
        return self.status


def test_what_the_driver_is_asked(launches, monkeypatch):
    device = launches.driver
    able, unable = Driver(1), Driver(0)
    monkeypatch.setattr(device, "_driver", lambda: able)
    device._launches.cache_clear()
    try:
        assert device.launches(torch.device("cuda", 2)) == (1, "cooperative launch")
        assert able.calls == [(95, 42)]
        assert device.resident_programs(77, 256, 1024) == 3
        assert able.calls[-1] == (77, 256, 1024)
        monkeypatch.setattr(device, "_driver", lambda: unable)
        assert device.launches(CUDA)[0] == 2
        assert "cannot launch cooperatively" in device.launches(CUDA)[1]
        monkeypatch.setenv(LAUNCHES, "1")
        with pytest.raises(RuntimeError, match=r"DBMTL_TRITON_LAUNCHES=1.*cuda:0 cannot launch cooperatively"):
            device.launches(CUDA)
        monkeypatch.setenv(LAUNCHES, "2")
        assert device.launches(CUDA)[0] == 2
        monkeypatch.setenv(LAUNCHES, "three")
        with pytest.raises(ValueError, match="must be 1 or 2, got 'three'"):
            device.launches(CUDA)
        monkeypatch.setattr(device, "_driver", lambda: Driver(1, status=100))
        with pytest.raises(RuntimeError, match="cuDeviceGet failed with CUDA error 100"):
            device.has_cooperative_launch(CUDA)
    finally:
        device._launches.cache_clear()
