"""What is done under the capture of a CUDA graph; there is none: CPU tensors are said to be on a GPU."""

from contextlib import nullcontext
from importlib import import_module
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import new_stats
from dbmtl_kernels import backends, ops
from dbmtl_kernels.backends import memory
from dbmtl_kernels.backends.arguments import Gradients
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytestmark = pytest.mark.interpreter
CPU, F64 = torch.device("cpu"), torch.float64
CLEARED = {"zero", "zeros", "fill", "new_zeros", "zeros_like", "full", "ones", "pin_memory"}


class Gpu:
    """Streams, captures, and how much memory was pinned."""

    def __init__(self):
        self.stream, self.capturing, self.pinned = 7, False, 0

    def pin(self, x):
        self.pinned += 1
        return x.clone()


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(memory, "on_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: gpu.stream, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: gpu.pin(x))
    block = lambda num_bytes: gpu.pin(torch.empty(num_bytes, dtype=torch.uint8))  # noqa: E731
    monkeypatch.setattr(memory, "_staging", memory.Arena(block, 1 << 20))
    monkeypatch.setattr(memory, "_held", {})
    memory._by_stream.cache_clear()
    memory.zeros_of.cache_clear()
    yield gpu
    memory._by_stream.cache_clear()
    memory.zeros_of.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    backends.resolve("triton", CPU)
    launches = import_module("dbmtl_kernels.backends.triton.launches")
    monkeypatch.setattr(launches, "_workspaces", {})
    return launches


class Seen(TorchDispatchMode):
    """What PyTorch itself does, beside views and empty memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket._qualified_op_name.split("::")[1])
        return func(*args, **(kwargs or {}))


class Step:
    """All ops, as a step calls them; the same gradients in every step."""

    def __init__(self, backend):
        self.backend, self.grads = backend, torch.randn(3, 6000)
        self.given = [list(row.split([5000, 1000])) for row in self.grads]
        self.segments = torch.tensor([[0, 5000], [5024, 1000]])
        self.rows, self.ema, self.out = torch.ones(3, 6048), torch.ones(3, 6000), torch.ones(6048)
        self.stats, self.weights = new_stats(3), torch.ones(3)
        self.state = [self.rows, self.ema, self.out, *self.stats]
        self.before = [x.clone() for x in self.state]

    def __call__(self):
        backend, rows, sums = self.backend, self.rows, self.stats.sumsq
        results = list(ops.balance_(self.grads, self.ema, 0.9, 1e-8, "max", 0.0, backend))
        for task in range(3):
            given = self.given[task]
            ops.accumulate_(rows[task], sums[task : task + 1], given, self.segments, (0.9, 0.1), None, backend)
        mask = ops.upload((True, False, True), torch.bool, CPU)
        ending = mask, None, 1.0, 1e-8, "max", 0.0, True, False
        ops.balance_rows_(ops.BalanceRows(rows, self.stats, [self.out], [0], *ending), backend)
        return [*results, ops.combine(rows, self.weights, backend=backend), ops.gramian(rows, backend)]

    def anew(self):
        """The results of a step from the same state, and what it left there."""
        for x, before in zip(self.state, self.before, strict=True):
            x.copy_(before)
        return [x.clone() for x in (*self(), *self.state)]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def taken(monkeypatch):
    """What captured launches got of memory that was made before."""
    found, take = [], memory.Arena.take
    monkeypatch.setattr(memory.Arena, "take", lambda arena, n: (found.append(take(arena, n)), found[-1])[1])
    return found


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_captured_step_clears_pins_and_uploads_nothing(gpu, launches, taken, monkeypatch, request, backend):
    """After one step before it; and each launch has counters of its own, which are zeros again after it."""
    if backend == "cuda":
        request.getfixturevalue("emulated_cuda")
    made, launch, step, seen = [], launches._launch, Step(backend), Seen()
    for name in ("address_table", "chunk_table", "numbers_table"):
        make = getattr(launches.tables, name)
        monkeypatch.setattr(launches.tables, name, lambda *key, make=make: (made.append(make), make(*key))[1])
    first = step.anew()
    pinned, known = gpu.pinned, len(made)
    assert pinned > 0
    assert taken == []
    gpu.capturing, gpu.stream = True, 8

    def launched(*args, **options):
        with _disable_current_modes():  # what the interpreter does with tensors is its own affair
            launch(*args, **options)

    monkeypatch.setattr(launches, "_launch", launched)
    assert same(first, step.anew())
    assert (gpu.pinned, len(made)) == (pinned, known)
    assert len(taken) == 7
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in taken)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    with seen:
        step()
    assert not {name.strip("_") for name in seen.names} & CLEARED
    assert gpu.pinned == pinned
    assert memory._held  # the tables that were there: for good, as a graph reads them
    held = [table.data_ptr() for table in memory._held.values()]
    memory._by_stream.cache_clear()
    gpu.capturing = False
    step.anew()
    assert [table.data_ptr() for table in memory._held.values()] == held


def test_a_captured_step_without_one_before_is_right(gpu, launches):
    expected = Step("triton")
    before = expected.anew()
    launches._workspaces.clear()
    memory._by_stream.cache_clear()
    memory.zeros_of.cache_clear()
    gpu.capturing = True
    assert same(before, expected.anew())


def test_addresses_within_a_graph_take_memory_that_was_pinned_before(gpu, launches):
    """Of a ViT-L with four tasks, whose chunk table is larger than all staging memory at first; graph after graph."""
    tables = launches.tables
    sizes = [1 << 20] * 290 + [1000] * 6
    ends = np.cumsum(sizes)
    segments = torch.tensor([[int(end) - size, size] for end, size in zip(ends, sizes, strict=True)])

    def gradients(start):
        return Gradients([None] * 296, [start + 16 * i for i in range(296)], bytes(296))

    chunks, _ = tables.chunks(segments, 1 << 13, CPU)
    assert chunks.nbytes > 1 << 20
    for task in range(4):
        tables.addresses(gradients(1 << 30 + task), CPU)
    for graph in range(50):
        pinned, gpu.capturing = gpu.pinned, True
        staged = [tables.addresses(gradients((1 << 40) + (graph << 20) + (task << 16)), CPU)[0] for task in range(4)]
        assert tables.chunks(segments, 1 << 13, CPU)[0] is chunks
        assert gpu.pinned == pinned
        assert len({table.data_ptr() for table in staged}) == 4
        for task, table in enumerate(staged):
            assert table[5].tolist() == [(1 << 40) + (graph << 20) + (task << 16) + 80, 0]
        gpu.capturing = False
        tables.addresses(gradients(1 << 30), CPU)


def test_a_stream_uploads_for_itself(gpu):
    """Another stream may be ahead of the copy."""
    first = ops.upload((1.0, 2.0), F64, CPU)
    assert ops.upload((1.0, 2.0), F64, CPU) is first
    gpu.stream = 9
    second = ops.upload((1.0, 2.0), F64, CPU)
    assert second is not first
    assert ops.upload((1.0, 2.0), torch.float32, CPU).dtype == torch.float32
    gpu.capturing = True
    assert ops.upload((1.0, 2.0), F64, CPU) in (first, second)
    pinned = gpu.pinned
    assert pinned == 4  # three tables and the room for more, which takes what is first made within the capture
    flags = ops.upload((True, False, True), torch.bool, CPU)
    more = ops.upload((False, True, True), torch.bool, CPU)
    assert gpu.pinned == pinned
    assert (flags.tolist(), more.tolist()) == ([True, False, True], [False, True, True])
    assert ops.upload((True, False, True), torch.bool, CPU) is not flags  # part of that graph alone


def test_an_arena_gives_nothing_twice():
    """Also where a block cannot be had, and where there is none."""
    asked = []

    def make(num_bytes):
        asked.append(num_bytes)
        if num_bytes > 1000:
            raise MemoryError
        return torch.zeros(num_bytes, dtype=torch.uint8)

    arena = memory.Arena(make, 64)
    given = [arena.take(3)]
    arena.prepare(20)
    given += [arena.take(20), arena.take(1)]
    with pytest.raises(MemoryError):
        arena.prepare(2000)
    given += [arena.take(16), arena.take(40)]
    arena.prepare(100)
    given += [arena.take(100), arena.take(90)]
    assert asked == [3, 64, 4000, 40, 200, 90]
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in given)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(x.data_ptr() % 16 == 0 for x in given)
