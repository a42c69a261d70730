"""Training a CNN with batch norm: every way of calling the balancer against a loop written from the paper."""

import functools
import io

import dbmtl_kernels as dbk
import pytest
import torch
from training import Net, batches, train_by_the_paper

PRECISION = {torch.float64: (200, 1e-9), torch.float32: (20, 1e-5)}


def start(dtype, seed=11, **options):
    torch.manual_seed(seed)
    net = Net(dtype)
    balancer = dbk.DBMTL(net.trunk.parameters(), 3, state_dtype=dtype, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    return net, balancer, optimizer


def scaled(balancer, losses):
    """As a GradScaler would: the loss is scaled, the gradients are unscaled before the step."""
    (balancer(losses) * 1024.0).backward()
    for p in balancer.model_parameters:
        if p.grad is not None:
            p.grad.div_(1024.0)


def by_task(balancer, losses, balance=True):
    """Attached, optimizer.step() balances where this does not."""
    for task, loss in enumerate(losses):
        with balancer.task(task):
            dbk.log_transform(loss).backward(retain_graph=task < len(losses) - 1)
    if balance:
        balancer.balance()


WAYS = {
    "call": (lambda balancer, losses: balancer(losses).backward(), False),
    "call with a tensor": (lambda balancer, losses: balancer(torch.stack(losses)).backward(), False),
    "named": (dbk.DBMTL.backward, False),
    "scaled": (scaled, False),
    "task": (by_task, False),
    "call, attached": (lambda balancer, losses: balancer(losses).backward(), True),
    "task, attached": (functools.partial(by_task, balance=False), True),
    "task and balance, attached": (by_task, True),
}


def train(way, dtype, steps, interrupt=None, **options):
    """Gradients are zeroed in place in two steps of four; after ``interrupt`` all goes through a file."""
    function, attached = WAYS[way]
    net, balancer, optimizer = start(dtype, **options)
    balancer.model_parameters = list(net.parameters())
    if attached:
        balancer.attach(optimizer)
    for step, (x, targets) in enumerate(batches(steps, dtype)):
        optimizer.zero_grad(set_to_none=step % 4 > 1)
        function(balancer, net.losses(x, targets))
        optimizer.step()
        if interrupt == step:
            torch.save([x.state_dict() for x in (net, balancer, optimizer)], file := io.BytesIO())
            states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            net, balancer, optimizer = start(dtype, seed=999, **options)
            for target, state in zip((net, balancer, optimizer), states, strict=True):
                target.load_state_dict(state)
            if attached:
                balancer.attach(optimizer)
            balancer.model_parameters = list(net.parameters())
    return [p.detach().clone() for p in net.parameters()]


def distance(a, b):
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def by_the_paper():
    out = {}
    for dtype, (steps, _) in PRECISION.items():
        torch.manual_seed(11)
        out[dtype] = train_by_the_paper(Net(dtype), steps, dtype)
    return out


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_trains_as_the_paper_says(way, dtype, by_the_paper):
    steps, bound = PRECISION[dtype]
    assert distance(train(way, dtype, steps), by_the_paper[dtype]) <= bound


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_run_is_the_same_bit_for_bit(way, dtype):
    straight = train(way, dtype, 20)
    resumed = train(way, dtype, 20, interrupt=9)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize(("scale", "zero"), [(1.0, True), (4096.0, False)])
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_accumulation_equals_averaged_gradients(dtype, scale, zero):
    """Three micro-batches a step, attached; the loss is divided by 3, and maybe scaled besides.

    The state lacks the factor 1/3: with the default eps weights would differ by 1e-8, more than is allowed here.
    """
    steps, bound = (60, 1e-9) if dtype == torch.float64 else (10, 1e-5)
    torch.manual_seed(11)
    expected = train_by_the_paper(Net(dtype), steps, dtype, accumulate=3, eps=1e-14)
    net, balancer, optimizer = start(dtype, eps=1e-14)
    balancer.attach(optimizer)
    data = batches(steps * 3, dtype)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=zero)
        for x, targets in data[3 * step : 3 * step + 3]:
            (balancer(net.losses(x, targets)) * scale / 3).backward()
        for p in net.parameters():
            p.grad.div_(scale)
        optimizer.step()
    assert balancer.step == steps
    assert distance([p.detach() for p in net.parameters()], expected) <= bound
