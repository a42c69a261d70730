"""What only a GPU shows: training, launches, streams, graphs, sizes; run by `benchmarks/gpu_suite.sh`."""

import json

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from dbmtl_kernels import ops
from dbmtl_kernels.buffer import TaskGradientBuffer
from dbmtl_kernels.layout import ParameterLayout
from device import (
    BACKEND,
    DENSE_LAUNCHES,
    DEVICE,
    END_LAUNCHES,
    GRADS,
    GRAMIAN_LAUNCHES,
    LARGE,
    ON_GPU,
    ROW_LAUNCHES,
    STATES,
    assert_accumulates_as_native,
    assert_like_the_oracle,
    assert_nobody_waits,
    both_forms,
    dense,
    in_memory,
    needs_cuda,
    numpy,
    row_problem,
    short,
    there,
)
from test_balance import assert_same_bits, problem
from torch import nn

pytestmark = pytest.mark.gpu


# --- The engine -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A small trunk of convolutions, and three heads."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 5, 3, stride=2), nn.Tanh(), nn.Flatten(),
            nn.Linear(45, 17), nn.Tanh(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(17, 4) for _ in range(3))

    def losses(self, x, y):
        z = self.trunk(x)
        return [nn.functional.mse_loss(head(z), target) + 0.1 for head, target in zip(self.heads, y, strict=True)]


def backward(mode, net, balancer, x, y):
    net.zero_grad()
    if mode == "scaled":
        (balancer(net.losses(x, y)) * 1024).backward()
    elif mode == "plain":
        balancer.backward(net.losses(x, y))
    else:  # a step without task 1
        for task in (0, 2):
            with balancer.task(task):
                dbk.log_transform(net.losses(x, y)[task]).backward()
        balancer.balance()


@pytest.mark.parametrize("mode", ["plain", "scaled", "partial"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_training_as_on_the_cpu(dtype, mode):
    ours, exact = Net().to(DEVICE, dtype), Net().double()
    balancer = dbk.DBMTL(ours.trunk.parameters(), 3, state_dtype=dtype, backend=BACKEND)
    reference = dbk.DBMTL(exact.trunk.parameters(), 3, state_dtype=torch.float64)
    optimizer = torch.optim.SGD(exact.parameters(), lr=0.1 / 1024 if mode == "scaled" else 0.1)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-2  # cuDNN multiplies float32 as TF32
    for _ in range(20 if ON_GPU else 3):
        with torch.no_grad():
            for mine, other in zip(ours.parameters(), exact.parameters(), strict=True):
                mine.copy_(other)
        x, y = torch.randn(16, 2, 8, 8).double(), torch.randn(3, 16, 4).double()
        backward(mode, exact, reference, x, y)
        backward(mode, ours, balancer, x.to(DEVICE, dtype), y.to(DEVICE, dtype))
        for part, other in ((ours.trunk, exact.trunk), (ours.heads, exact.heads)):
            pairs = [(p.grad, q.grad) for p, q in zip(part.parameters(), other.parameters(), strict=True)]
            largest = max(float(q.abs().max()) for _, q in pairs if q is not None)
            for mine, wanted in pairs:
                assert (mine is None) == (wanted is None)
                assert mine is None or np.abs(numpy(mine) - numpy(wanted)).max() <= tolerance * largest
        np.testing.assert_allclose(numpy(balancer.norms), numpy(reference.norms), rtol=tolerance)
        optimizer.step()
    assert balancer.nonfinite_steps.tolist() == [0, 0, 0]


def engine(num_tasks=3):
    """A buffer, flat tensors, gradients for each task, and what an engine step does with them."""
    parameters = [there(torch.randn(n)).requires_grad_() for n in (LARGE, 7, 4096, 1)]
    buffer = TaskGradientBuffer(ParameterLayout(parameters), num_tasks, BACKEND)
    flats = buffer.new_flats()
    grads = [[there(torch.randn(p.numel())) for p in parameters] for _ in range(num_tasks)]

    def step():
        for task in range(num_tasks):
            buffer.accumulate(task, grads[task], 0.9, 0.1)
        buffer.balance(flats, 1e-8, "max")

    return buffer, flats[torch.float32], grads, step


def launched(run, path):
    """Names of what the GPU did, in order: kernels, copies and fills. Profiled twice: the first loads the profiler."""
    for _ in range(2):
        with torch.profiler.profile() as profiler:
            run()
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in DEVICE_EVENTS]
    return [short(e["name"]) for e in sorted(events, key=lambda e: e["ts"])]


DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
ENGINE_STEP = ROW_LAUNCHES * 3 + END_LAUNCHES


@needs_cuda
def test_number_of_launches(tmp_path, monkeypatch):
    grads, ema = there(torch.randn(3, LARGE)), there(torch.randn(3, LARGE))
    for form, kernels in DENSE_LAUNCHES.items():
        monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", form)
        dbk.balance_(grads, ema, backend=BACKEND)
        assert launched(lambda: dbk.balance_(grads, ema, backend=BACKEND), tmp_path / "trace.json") == kernels
    ops.gramian(ema, BACKEND)
    assert launched(lambda: ops.gramian(ema, BACKEND), tmp_path / "trace.json") == GRAMIAN_LAUNCHES
    _, _, _, step = engine()
    step()
    assert launched(step, tmp_path / "trace.json") == ENGINE_STEP
    net = Net().to(DEVICE)
    balancer = dbk.DBMTL(net.trunk.parameters(), 3, backend=BACKEND)
    x, y = torch.randn(16, 2, 8, 8, device=DEVICE), torch.randn(3, 16, 4, device=DEVICE)
    backward("plain", net, balancer, x, y)
    names = launched(lambda: backward("plain", net, balancer, x, y), tmp_path / "trace.json")
    assert [n for n in names if n in ENGINE_STEP] == ENGINE_STEP


@needs_cuda
def test_the_host_waits_for_nothing():
    net = Net().to(DEVICE)
    balancer = dbk.DBMTL(net.trunk.parameters(), 3, backend=BACKEND)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    x, y = torch.randn(16, 2, 8, 8, device=DEVICE), torch.randn(3, 16, 4, device=DEVICE)
    grads, ema = torch.randn(3, LARGE, device=DEVICE), torch.randn(3, LARGE, device=DEVICE)

    def steps():
        for mode in ("plain", "scaled", "partial"):
            backward(mode, net, balancer, x, y)
            optimizer.step()
        held = [balancer.norms, balancer.weights, dbk.balance_(grads, ema, backend=BACKEND)]
        del held

    for _ in range(3):
        steps()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- Streams, devices, sizes, graphs --------------------------------------------------------------------------


@needs_cuda
@both_forms
def test_two_streams_at_once(form, monkeypatch):
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", form)
    cases = []
    for size in (1 << 20, 300007):  # both fill the GPU: their barriers must not wait for each other
        grads, ema = torch.randn(5, 3, size), torch.randn(3, size)
        cases.append((torch.cuda.Stream(DEVICE), grads, ema, there(grads), there(ema)))
    torch.cuda.synchronize()
    results = {}
    for round_ in range(50):
        for index, (stream, _, _, grads, ema) in enumerate(cases):
            with torch.cuda.stream(stream):
                results[index] = dbk.balance_(grads[round_ % 5], ema, backend=BACKEND)
    torch.cuda.synchronize()
    for index, (_, grads, ema, _, state) in enumerate(cases):
        for round_ in range(50):
            grad, norms = dbk.balance_(grads[round_ % 5], ema, backend="native")
        assert_same_bits([state.cpu()], [ema])
        torch.testing.assert_close(results[index][1].cpu(), norms, rtol=1.2e-7, atol=0)
        torch.testing.assert_close(results[index][0].cpu(), grad, rtol=1e-6, atol=1e-6 * float(grad.abs().max()))


def test_every_device_whichever_is_current(monkeypatch):
    count = torch.cuda.device_count() if ON_GPU else 1
    row, segments, bases, shift = row_problem(torch.float32, GRADS, 32)
    for index in range(count):
        if ON_GPU:
            monkeypatch.setattr("device.DEVICE", torch.device("cuda", index))
            torch.cuda.set_device((index + 1) % count)
        try:
            grads, ema = problem(3, 1000, torch.float32, torch.float32)
            assert_like_the_oracle(grads, ema, dense(grads, ema), 0.9, "max")
            assert_accumulates_as_native(row, segments, bases, shift)
            assert ops.gramian(there(ema), BACKEND).device == there(ema).device
            assert not ON_GPU or torch.cuda.current_device() == (index + 1) % count
        finally:
            if ON_GPU:
                torch.cuda.set_device(0)


@both_forms
def test_more_than_two_to_the_31_elements(form, monkeypatch):
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", form)
    size, width = (1 << 30, 4096) if ON_GPU else (1 << 12, 64)
    grads, ema, out = (torch.empty(k, size, dtype=torch.bfloat16, device=DEVICE).normal_() for k in (3, 3, 1))
    looked_at = [slice(start, start + width) for start in (0, size // 3, size // 2 + 5, size - width)]
    before = [
        [x[:, part].clone(memory_format=torch.contiguous_format).cpu() for x in (grads, ema)] for part in looked_at
    ]
    grad, norms = dbk.balance_(grads, ema, backend=BACKEND)
    exact = [sum(float(part.double().square().sum()) for part in row.split(1 << 26)) ** 0.5 for row in ema]
    np.testing.assert_allclose(numpy(norms), exact, rtol=1e-6)
    weights = there(torch.tensor(max(exact) / (np.array(exact) + 1e-8)))
    ops.combine_out(ema, weights, out[0], False, BACKEND)
    for part, (old_grads, state) in zip(looked_at, before, strict=True):
        dbk.balance_(old_grads, state, backend="native")
        assert_same_bits([ema[:, part].cpu()], [state])
        expected = weights.cpu() @ state.double()
        for actual in (grad[part], out[0, part]):
            torch.testing.assert_close(actual.cpu().double(), expected, rtol=2.0**-7, atol=1e-5)
    gram = numpy(ops.gramian(ema, BACKEND))
    np.testing.assert_allclose(np.diag(gram), np.square(exact), rtol=1e-4)


@pytest.mark.parametrize("seed", [None, 11])
def test_a_row_of_more_than_two_to_the_31_elements(seed):
    far = (1 << 31) + 64 if ON_GPU else 1 << 12
    segments = torch.tensor([[0, 1000], [far, 70001], [far + 70016, 333]])
    grads = [there(torch.randn(n)) for n in segments[:, 1].tolist()]
    actual, expected = torch.zeros(2, far + 70400, dtype=torch.bfloat16, device=DEVICE)
    sums = there(torch.zeros(2, 1, dtype=torch.float64))
    for decay in (0.0, 0.9):
        ops.accumulate_(actual, sums[0], grads, segments, decay, 0.3, None, seed, BACKEND)
        ops.accumulate_(expected, sums[1], grads, segments, decay, 0.3, None, seed, "eager")
    assert torch.equal(actual, expected)
    assert actual[far:].count_nonzero() > 60000
    exact = sum(float(actual[at : at + n].double().square().sum()) for at, n in segments.tolist())
    np.testing.assert_allclose(sums[0].item(), exact, rtol=1e-12)


@needs_cuda
@both_forms
def test_graph_replay_of_the_dense_op(form, monkeypatch):
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", form)
    start, state = torch.randn(3, LARGE, device=DEVICE), torch.zeros(3, LARGE, device=DEVICE)
    grads, captured = torch.randn(3, LARGE, device=DEVICE), torch.zeros(3, LARGE, device=DEVICE)
    dbk.balance_(grads, captured, backend=BACKEND)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad, norms = dbk.balance_(grads, captured, backend=BACKEND)
    state.copy_(start)
    captured.copy_(start)
    for _ in range(5):
        grads.normal_()
        graph.replay()
        expected = dbk.balance_(grads, state, backend=BACKEND)
        assert_same_bits([grad.cpu(), norms.cpu(), captured.cpu()], [x.cpu() for x in (*expected, state)])
    assert_nobody_waits()


@needs_cuda
@pytest.mark.parametrize("state", STATES)
def test_graph_replay_with_other_coefficients(state):
    row, segments, bases, _ = row_problem(state, GRADS, 32)
    seed = 0 if state == torch.bfloat16 else None
    grads, numbers = [None if b is None else there(b) for b in bases], there(in_memory(0.0, 1.0, seed))
    rows, sums = there(torch.stack([row, row])), there(torch.zeros(2, 1, dtype=torch.float64))

    def update():
        ops.accumulate_(rows[0], sums[0], grads, segments, 0.5, 0.5, None, seed, BACKEND, numbers)

    update()  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    rows[0].copy_(rows[1])
    for step in range(5):
        decay, gain, other = 0.9 / (step + 1), 0.3 * step, None if seed is None else step - 3
        numbers.copy_(in_memory(decay, gain, other))
        graph.replay()
        ops.accumulate_(rows[1], sums[1], grads, segments, decay, gain, None, other, BACKEND)
        assert_same_bits([rows[0].cpu(), sums[0].cpu()], [rows[1].cpu(), sums[1].cpu()])


@needs_cuda
def test_graph_replay_of_an_engine_step():
    buffer, flat, grads, step = engine()
    other, expected, more, run = engine()
    step()  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for mine in (buffer, other):
        for tensor in (mine.rows, mine.sumsq, mine.norms, mine.weights):
            tensor.zero_()
    for _ in range(5):
        for mine, others in zip(grads, more, strict=True):
            for grad, same in zip(mine, others, strict=True):
                same.copy_(grad.normal_())
        graph.replay()
        run()
        pairs = [(flat, expected), *((getattr(buffer, n), getattr(other, n)) for n in ("rows", "norms", "weights"))]
        for actual, wanted in pairs:
            assert_same_bits([actual.cpu()], [wanted.cpu()])
