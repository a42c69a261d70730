"""What one row costs: bytes held, whatever the number of tasks, and calls of kernels. Counted, not timed."""

import functools

import dbmtl_kernels as dbk
import pytest
import torch
from buffers import defer
from dbmtl_kernels import ops
from dbmtl_kernels.rows.collect import FLUSH_BYTES
from problems import state_of
from torch import nn

LAYERS, WIDTH = 24, 256
P = LAYERS * WIDTH * WIDTH
SMALL = 300_000  # bytes of activations, heads and K numbers; the trunk has 6.3 MB


class Net(nn.Module):
    def __init__(self, num_tasks, dtype):
        super().__init__()
        self.trunk = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS)))
        for layer in self.trunk:
            nn.init.eye_(layer.weight)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1, dtype=dtype) for _ in range(num_tasks))

    def losses(self):
        z = self.trunk(torch.ones(2, WIDTH, dtype=self.heads[0].weight.dtype))
        return [head(z).float().square().mean() + t for t, head in enumerate(self.heads, 1)]


def peak_and_rest(run):
    """Bytes allocated at most, and at the end, more than before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now


def steps(num_tasks, make, dtype=torch.float32, device=False):
    """Of three steps of a fresh balancer, from the first one on: at most, and after the last ``.grad`` is gone."""
    net = Net(num_tasks, dtype)
    balancer = make(net)
    if device:
        balancer._engine.use(defer(balancer._engine.rows))

    def run():
        for _ in range(3):
            net.zero_grad()
            balancer(net.losses()).backward()

    most, rest = peak_and_rest(run)
    return most, rest


def plain_sum(num_tasks, dtype=torch.float32):
    net = Net(num_tasks, dtype)
    return peak_and_rest(lambda: sum(net.losses()).backward())[0]


def one_row(net, **options):
    return dbk.DBMTL(net.trunk.parameters(), len(net.heads), beta=0.0, **options)


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
def test_one_row_and_one_gradient_whatever_the_number_of_tasks(device):
    most = {k: steps(k, one_row, device=device) for k in (2, 3, 11, 40)}
    for k, (peak, rest) in most.items():
        beyond = peak - plain_sum(k)
        # The plain sum has the P numbers of .grad too; what is beyond is the gradient of one task beside, and on a CPU
        # what is on its way there.
        assert 0.8 * 4 * P < beyond <= 4 * P + (0 if device else FLUSH_BYTES) + SMALL, k
        assert 4 * P <= rest <= 4 * P + SMALL, k  # .grad, and K numbers
    peaks = [peak for peak, _ in most.values()]
    assert max(peaks) - min(peaks) <= SMALL


def test_rows_are_what_it_does_without():
    k = 11
    kept, _ = steps(k, lambda net: one_row(net, keep_rows=True))
    assert kept >= (k + 1) * 4 * P
    assert kept - steps(k, one_row)[0] >= (k - 1) * 4 * P


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_a_float32_row_that_goes_with_the_step(dtype):
    for k in (3, 11):
        peak, rest = steps(k, one_row, dtype)
        assert peak - plain_sum(k, dtype) <= (4 + 2) * P + SMALL
        assert 2 * P <= rest <= 2 * P + SMALL


def test_a_grad_that_was_there_is_added_to_from_a_row_that_goes_with_the_step():
    net = Net(3, torch.float32)
    balancer = one_row(net)
    for _ in range(2):
        balancer(net.losses()).backward()

    def run():
        net.zero_grad(set_to_none=False)
        balancer(net.losses()).backward()

    most, rest = peak_and_rest(run)
    assert most <= 2 * 4 * P + FLUSH_BYTES + SMALL
    assert rest <= SMALL


def test_frozen_gradients_take_a_row_for_as_long():
    net = Net(3, torch.float32)
    balancer = one_row(net)
    balancer(net.losses()).backward()

    def run():
        with balancer.no_update():
            balancer(net.losses()).backward()

    assert peak_and_rest(run)[1] <= SMALL
    assert not state_of(balancer).allocated


@pytest.mark.parametrize("num_tasks", [3, 11])
@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
def test_calls_of_a_step(device, num_tasks, monkeypatch):
    """For each task its squares (with a copy on a CPU) and its addition, then alpha: 2 K + 1, and one of K numbers."""
    calls = []

    def spy(name, call, *args):
        calls.append(name if name != "accumulate_" else "squares" if args[0] is None else "row")
        return call(*args)

    for name in ("accumulate_", "balance_rows_", "combine_out", "gramian"):
        monkeypatch.setattr(ops, name, functools.partial(spy, name, getattr(ops, name)))
    net = nn.Linear(8, 32)
    balancer = dbk.DBMTL(net.parameters(), num_tasks, beta=0.0)
    if device:
        balancer._engine.use(defer(balancer._engine.rows))
    z = net(torch.randn(4, 8))
    balancer([(z - t).square().mean() for t in range(num_tasks)]).backward()
    assert calls == ["squares" if device else "row", "row"] * num_tasks + ["balance_rows_", "row"]
