"""What needs CUDA itself: launches, the host that waits for nothing, streams, devices, graphs, memory."""

import json

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels import backends, ops
from device import (
    BF16,
    DEVICE,
    F64,
    GRADS,
    KERNELS,
    LARGE,
    MARKS,
    STATES,
    EngineStep,
    Net,
    assert_accumulates_as_native,
    assert_dense_as_native,
    assert_same_bits,
    needs_cuda,
    row_problem,
    there,
)  # fmt: skip

pytestmark = [*MARKS, needs_cuda]


def launched(run, path):
    """Names of what the GPU did, in order: kernels, copies and fills. Profiled twice: the first loads the profiler."""
    for _ in range(2):
        with torch.profiler.profile() as profiler:
            run()
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    events = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    known = {k for dense, row, end, gramian in KERNELS.values() for k in (*dense, row, end, *gramian)}
    known |= {"update_kernel", "combine_kernel"}
    names = [e["name"] for e in sorted(events, key=lambda e: e["ts"])]
    # CUDA C++ names come with their namespace and arguments, mangled or not.
    return [max((k for k in known if k in name), key=len, default=name) for name in names]


def network():
    net = Net().to(DEVICE)
    return net, torch.randn(16, 2, 8, 8, device=DEVICE), torch.randn(3, 16, 4, device=DEVICE)


def test_launches(gpu, tmp_path, monkeypatch):
    dense, row, end, gramian = KERNELS[gpu]
    grads, ema = torch.randn(2, 3, LARGE, device=DEVICE)
    trace = tmp_path / "trace.json"
    for asked, kernels in (("1", 1), ("2", 2)) if gpu == "triton" else (("1", 1),):
        monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", asked)
        dbk.balance_(grads, ema, backend=gpu)
        names = launched(lambda: dbk.balance_(grads, ema, backend=gpu), trace)
        assert len(names) == kernels
        assert all(name.endswith("kernel") for name in names)
        assert kernels > 1 or names == dense
    ops.gramian(ema, gpu)
    assert launched(lambda: ops.gramian(ema, gpu), trace) == gramian
    step = EngineStep(gpu)
    step()
    assert launched(step, trace) == [row] * 3 + [end]
    net, x, y = network()
    balancer = dbk.DBMTL(net.trunk.parameters(), 3, backend=gpu)
    net.backward("plain", balancer, x, y)
    names = launched(lambda: net.backward("plain", balancer, x, y), trace)
    assert [n for n in names if n in (row, end)] == [row] * 3 + [end]
    one = dbk.DBMTL(net.trunk.parameters(), 3, beta=0.0, backend=gpu)
    net.backward("plain", one, x, y)
    names = launched(lambda: net.backward("plain", one, x, y), trace)
    assert [n for n in names if n in (row, end)] == [row] * 6 + [end, row]


@pytest.mark.parametrize("beta", [0.9, 0.0])
def test_the_host_waits_for_nothing(gpu, beta):
    net, x, y = network()
    balancer = dbk.DBMTL(net.trunk.parameters(), 3, backend=gpu, beta=beta)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    grads, ema = torch.randn(2, 3, LARGE, device=DEVICE)

    def steps():
        for mode in ("plain", "scaled", "partial"):
            net.backward(mode, balancer, x, y)
            optimizer.step()
        held = [balancer.norms, balancer.weights, dbk.balance_(grads, ema, backend=gpu)]
        del held

    for _ in range(3):
        steps()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("beta", [0.9, 0.0])
def test_memory_held_beside_the_model(gpu, beta):
    """(K + 1) P elements, to 5 %; without an average P."""
    K, parameters = 4, [torch.zeros(1 << 20, device=DEVICE, requires_grad=True) for _ in range(8)]

    def clear():
        for p in parameters:
            p.grad = None

    def peak(run):
        clear()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(DEVICE)

    def losses():
        return [sum(p.sum() for p in parameters) + task for task in range(1, K + 1)]

    def bare():
        for loss in losses():
            loss.backward()
            clear()

    before = peak(bare)
    balancer = dbk.DBMTL(parameters, K, backend=gpu, beta=beta)
    grown = peak(lambda: [(clear(), balancer.backward(losses())) for _ in range(3)]) - before
    assert grown <= 1.05 * 4 * sum(p.numel() for p in parameters) * (K + 1 if beta else 1)


def test_two_streams_at_once(form):
    cases = []
    for size in (1 << 20, 300007):  # both fill the GPU: their barriers must not wait for each other
        grads, ema = torch.randn(5, 3, size), torch.randn(3, size)
        cases.append((torch.cuda.Stream(DEVICE), grads, ema, there(grads), there(ema)))
    torch.cuda.synchronize()
    results = {}
    for round_ in range(50):
        for index, (stream, _, _, grads, ema) in enumerate(cases):
            with torch.cuda.stream(stream):
                results[index] = dbk.balance_(grads[round_ % 5], ema, backend=form)
    torch.cuda.synchronize()
    for index, (_, grads, ema, _, state) in enumerate(cases):
        for round_ in range(50):
            grad, norms = dbk.balance_(grads[round_ % 5], ema, backend="native")
        assert_same_bits([state], [ema])
        torch.testing.assert_close(results[index][1].cpu(), norms, rtol=1.2e-7, atol=0)
        torch.testing.assert_close(results[index][0].cpu(), grad, rtol=1e-6, atol=1e-6 * float(grad.abs().max()))


def test_the_rows_on_a_stream_of_ones_own(gpu):
    """What it waits for is slow: kernels on another stream would come too early."""
    ours, other = EngineStep(gpu), EngineStep(gpu)
    stream = torch.cuda.Stream(DEVICE)
    ours(), other()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for mine, same in zip(ours.grads, other.grads, strict=True):
            for grad, source in zip(mine, same, strict=True):
                grad.copy_(source)
        for target, source in zip((ours.rows, *ours.stats), (other.rows, *other.stats), strict=True):
            target.copy_(source)
        ours()
    stream.synchronize()
    other()
    assert_same_bits(ours.results(), other.results())


def test_every_device_whichever_is_current(gpu, monkeypatch):
    """With one device, that; with two, each while the other is current."""
    count = torch.cuda.device_count()
    for index in range(count):
        monkeypatch.setattr("device.DEVICE", torch.device("cuda", index))
        with torch.cuda.device((index + 1) % count):
            grads, ema = torch.randn(2, 3, 1000)
            assert_dense_as_native(gpu, grads, ema)
            assert_accumulates_as_native(gpu, *row_problem(torch.float32, GRADS))
            assert ops.gramian(there(ema), gpu).device == torch.device("cuda", index)
            assert torch.cuda.current_device() == (index + 1) % count


def captured(run):
    run()  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def test_graph_replay_of_the_dense_op(form):
    start, grads = torch.randn(2, 3, LARGE, device=DEVICE)
    state, mine = torch.zeros(2, 3, LARGE, device=DEVICE)
    graph, (grad, norms) = captured(lambda: dbk.balance_(grads, mine, backend=form))
    state.copy_(start)
    mine.copy_(start)
    for _ in range(5):
        grads.normal_()
        graph.replay()
        expected = dbk.balance_(grads, state, backend=form)
        assert_same_bits([grad, norms, mine], [*expected, state])


@pytest.mark.parametrize("state", STATES)
def test_graph_replay_with_other_coefficients(gpu, state):
    row, segments, grads = row_problem(state, GRADS)
    grads, coefficients = [there(g) for g in grads], there(torch.tensor([0.0, 1.0], dtype=F64))
    rows, sums = there(torch.stack([row, row])), there(torch.zeros(2, 1, dtype=F64))
    graph, _ = captured(lambda: ops.accumulate_(rows[0], sums[0], grads, segments, coefficients, None, gpu))
    rows[0].copy_(rows[1])
    for step in range(5):
        decay, gain = 0.9 / (step + 1), 0.3 * step
        coefficients.copy_(torch.tensor([decay, gain], dtype=F64))
        graph.replay()
        ops.accumulate_(rows[1], sums[1], grads, segments, (decay, gain), None, gpu)
        assert_same_bits([rows[0], sums[0]], [rows[1], sums[1]])


@pytest.mark.parametrize("state", [torch.float32, BF16], ids=str)
def test_graph_replay_of_an_engine_step(gpu, state):
    ours, other = EngineStep(gpu, state=state), EngineStep(gpu, state=state)
    graph, _ = captured(ours)
    for tensor in (ours.rows, *ours.stats):
        tensor.zero_()
    for step in range(5):
        for mine, same in zip(ours.grads, other.grads, strict=True):
            for grad, copied in zip(mine, same, strict=True):
                copied.copy_(grad.normal_())
        for each in (ours, other):
            each.coefficients.copy_(torch.tensor([0.9 / (step + 1), 0.3 * step], dtype=F64))
        graph.replay()
        other()
        assert_same_bits(ours.results(), other.results())


# --- what reading the code found ----------------------------------------------------------------------------------


def test_numbers_first_uploaded_under_capture():
    """Each replay reads them again, from memory that nobody else was given since."""
    ops.upload((0.5,), F64, DEVICE)  # as a step does before a capture
    graph, flags = torch.cuda.CUDAGraph(), (True, False, False, True, True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = ops.upload(flags, torch.bool, DEVICE) * 2.0
        more = ops.upload((3.0, 4.0), F64, DEVICE) * 2.0
    junk = [torch.full((n,), 77, dtype=torch.uint8).pin_memory() for n in (5, 16, 64, 512, 4096) for _ in range(40)]
    for _ in range(3):
        out.zero_(), more.zero_()
        graph.replay()
        assert out.tolist() == [2.0, 0.0, 0.0, 2.0, 2.0]
        assert more.tolist() == [6.0, 8.0]
    del junk


def test_numbers_asked_for_on_a_stream_that_is_ahead():
    """The copy of another stream has not begun."""
    late, ahead, values = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE), (1.25, 2.5, 5.0)
    torch.cuda.synchronize()
    with torch.cuda.stream(late):
        torch.cuda._sleep(200_000_000)
        ops.upload(values, F64, DEVICE)
    with torch.cuda.stream(ahead):
        seen = ops.upload(values, F64, DEVICE).clone()
    ahead.synchronize()
    assert not late.query()
    assert seen.tolist() == list(values)
    torch.cuda.synchronize()


def test_a_captured_step_uploads_and_clears_nothing(gpu, tmp_path):
    """After one outside: its graph is the launches of a step, and no more."""
    step = EngineStep(gpu)
    graph, _ = captured(step)
    _, row, end, _ = KERNELS[gpu]
    assert launched(graph.replay, tmp_path / "trace.json") == [row] * 3 + [end]


@pytest.mark.parametrize("beta", [0.9, 0.0])
def test_a_regulariser_on_another_device_is_no_tasks_gradient(beta):
    """Its thread runs while the passes do; parameters lie on the CPU, on this GPU, and on a second if there is one."""
    others = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]

    def train(devices):
        torch.manual_seed(3)
        start = [torch.randn(n) for n in (40, 7, 300, 64)]
        params = [p.to(devices[i % len(devices)]).requires_grad_() for i, p in enumerate(start)]
        balancer, found = dbk.DBMTL(params, 2, beta=beta, state_dtype=F64), []
        for _ in range(30):
            for p in params:
                p.grad = None
            terms = [[((p - t) * (1 + 3 * t)).square().sum().to(devices[0]) for p in params] for t in range(2)]
            regulariser = params[-1]
            for _ in range(100):
                regulariser = regulariser * 1.001
            loss = balancer([sum(terms[0]) + 0.5, sum(terms[1]) + 0.5])
            (loss + regulariser.sum().to(devices[0])).backward()
            found.append([p.grad.to("cpu", copy=True) for p in params])  # .grad is reused
        return found

    expected = train([torch.device("cpu")])
    for devices in ([DEVICE, torch.device("cpu")], [torch.device("cpu"), DEVICE], others):
        for ours, theirs in zip(train(devices), expected, strict=True):
            for grad, wanted in zip(ours, theirs, strict=True):
                torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


def test_the_backend_is_chosen_for_each_device():
    """Whichever is current: what serves one may lack code for another."""
    count = torch.cuda.device_count()
    for current in range(count):
        backends.clear_cache()
        with torch.cuda.device(current):
            for index in range(count):
                device = torch.device("cuda", index)
                able = [name for name in ("triton", "cuda", "eager") if backends.get(name).missing(device) is None]
                assert backends.resolve("auto", device) is backends.get(able[0])
    backends.clear_cache()
