"""Training a CNN with batch norm: every way of calling the balancer against a loop written from the paper."""

import io

import dbmtl_kernels as dbk
import pytest
import torch
from training import Net, batches, train_by_the_paper

PRECISION = {torch.float64: (200, 1e-9), torch.float32: (20, 1e-5)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The net is tiny: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(dtype, **options):
    torch.manual_seed(11)
    net = Net(dtype)
    balancer = dbk.DBMTL(net.trunk.parameters(), 3, state_dtype=dtype, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    return net, balancer, optimizer


def call(balancer, losses):
    balancer(losses).backward()


def call_with_tensor(balancer, losses):
    balancer(torch.stack(losses)).backward()


def named(balancer, losses):
    balancer.backward(losses)


def scaled(balancer, losses):
    """As a GradScaler would: the loss is scaled, the gradients are unscaled before the step."""
    (balancer(losses) * 1024.0).backward()
    for p in balancer.model_parameters:
        if p.grad is not None:
            p.grad.div_(1024.0)


def by_task(balancer, losses):
    for task, loss in enumerate(losses):
        with balancer.task(task):
            dbk.log_transform(loss).backward(retain_graph=task < len(losses) - 1)
    balancer.balance()


def by_task_until_step(balancer, losses):
    """Attached: optimizer.step() balances."""
    for task, loss in enumerate(losses):
        with balancer.task(task):
            dbk.log_transform(loss).backward(retain_graph=task < len(losses) - 1)


WAYS = {
    "call": (call, False),
    "call with a tensor": (call_with_tensor, False),
    "named": (named, False),
    "scaled": (scaled, False),
    "task": (by_task, False),
    "call, attached": (call, True),
    "task, attached": (by_task_until_step, True),
    "task and balance, attached": (by_task, True),
}


def train(way, dtype, steps, backend="auto", interrupt=None, zero=True, **options):
    function, attached = WAYS[way]
    net, balancer, optimizer = start(dtype, backend=backend, **options)
    balancer.model_parameters = list(net.parameters())
    if attached:
        balancer.attach(optimizer)
    for step, (x, targets) in enumerate(batches(steps, dtype)):
        optimizer.zero_grad(set_to_none=zero)
        function(balancer, net.losses(x, targets))
        optimizer.step()
        if interrupt == step:
            net, balancer, optimizer = resume(net, balancer, optimizer, dtype, backend, **options)
            if attached:
                balancer.attach(optimizer)
            balancer.model_parameters = list(net.parameters())
    return [p.detach().clone() for p in net.parameters()]


def resume(net, balancer, optimizer, dtype, backend, **options):
    """Everything through a file, into fresh objects."""
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), balancer.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    torch.manual_seed(999)
    fresh = Net(dtype)
    new_balancer = dbk.DBMTL(fresh.trunk.parameters(), 3, state_dtype=dtype, backend=backend, **options)
    new_optimizer = torch.optim.SGD(fresh.parameters(), lr=0.5)
    for target, state in zip((fresh, new_optimizer, new_balancer), states, strict=True):
        target.load_state_dict(state)
    return fresh, new_balancer, new_optimizer


def distance(a, b):
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def by_the_paper():
    out = {}
    for dtype, (steps, _) in PRECISION.items():
        torch.manual_seed(11)
        out[dtype] = train_by_the_paper(Net(dtype), steps, dtype)
    return out


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_trains_as_the_paper_says(way, dtype, by_the_paper):
    steps, bound = PRECISION[dtype]
    assert distance(train(way, dtype, steps), by_the_paper[dtype]) <= bound


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_the_eager_backend_trains_alike(dtype, by_the_paper):
    steps, bound = PRECISION[dtype]
    assert distance(train("call", dtype, steps, backend="eager"), by_the_paper[dtype]) <= bound


@pytest.mark.parametrize("way", ["call", "task", "call, attached", "task and balance, attached"])
def test_gradients_zeroed_in_place_train_alike(way, by_the_paper):
    assert distance(train(way, torch.float64, 200, zero=False), by_the_paper[torch.float64]) <= 1e-9


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_run_is_the_same_bit_for_bit(way, dtype):
    straight = train(way, dtype, 20)
    resumed = train(way, dtype, 20, interrupt=9)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("beta_sigma", [(0.0, 0.5), (0.5, 0.0), (0.9, 0.0), (0.9, 1.0)])
def test_every_forgetting_rate(beta_sigma):
    beta, sigma = beta_sigma
    torch.manual_seed(11)
    expected = train_by_the_paper(Net(torch.float64), 30, torch.float64, beta=beta, sigma=sigma)
    actual = train("call", torch.float64, 30, beta=beta, beta_sigma=sigma)
    assert distance(actual, expected) <= 1e-9


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("scale", [1.0, 4096.0])
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_accumulation_equals_averaged_gradients(dtype, scale, zero):
    """Three micro-batches a step, attached; the loss is divided by 3, and maybe scaled besides.

    The state is kept without the factor 1/3, so it is three times the reference's and the default eps would weigh a
    third as much: about 1e-8 of a weight, more than this test allows.
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
