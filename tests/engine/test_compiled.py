"""Models under torch.compile, activation checkpointing, tied and idle parameters; a capturable balancer."""

import contextlib
import copy
import functools

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from dbmtl_kernels import ops
from functorch.compile import make_boxed_func
from problems import EPS, assert_same_state, close, flat_grad, flat_gradients, state_of
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

TASKS = 3


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Nothing is left of an earlier test or run: whether a buffer is donated is cached too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with (
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.last = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(TASKS))
        self.reentrant = reentrant

    def trunk(self):
        return [*self.first.parameters(), *self.last.parameters()]

    def forward(self, x):
        z = self.first(x)
        z = self.last(z) if self.reentrant is None else checkpoint(self.last, z, use_reentrant=self.reentrant)
        return [(head(z) - task).square().mean() + 0.1 for task, head in enumerate(self.heads)]


def batches(number):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 6, generator=generator) for _ in range(number)]


def start(reentrant=None, momentum=0.9):
    torch.manual_seed(2)
    net = Net(reentrant)
    return net, dbk.DBMTL(net.trunk(), TASKS), torch.optim.SGD(net.parameters(), lr=0.05, momentum=momentum)


def everything(net, balancer):
    return torch.cat([x.detach().view(-1) for x in (*net.parameters(), state_of(balancer).rows)]).numpy()


def train(net, balancer, optimizer, losses_of, steps=5):
    for x in batches(steps):
        optimizer.zero_grad()
        balancer(losses_of(x)).backward()
        optimizer.step()
    return everything(net, balancer)


def test_a_graph_compiled_for_one_backward_pass_is_explained():
    """The first backward pass had the graph for itself, so PyTorch compiled it to overwrite what it saved."""
    net, balancer, _ = start()
    compiled = torch.compile(net, backend="aot_eager")
    x = batches(1)[0]
    with torch._functorch.config.patch(donated_buffer=True):
        balancer(compiled(x)[:1], tasks=[0]).backward()
        state, grad = copy.deepcopy(balancer.state_dict()), flat_grad(net.trunk())
        for call in (lambda losses: balancer(losses).backward(), balancer.backward):
            with pytest.raises(RuntimeError, match=r"torch\._functorch\.config\.donated_buffer = False"):
                call(compiled(x))
        assert_same_state(balancer.state_dict(), state)
        assert np.array_equal(flat_grad(net.trunk()), grad)
        balancer(compiled(x)[1:2], tasks=[1]).backward()  # a task alone can go on
        assert balancer.step == 2


@pytest.mark.parametrize(
    ("donated", "part", "compiler"),
    [
        pytest.param(False, "model", "inductor", marks=pytest.mark.slow),
        *((d, p, "aot_eager") for d in (False, True) for p in ("trunk", "model")),
    ],
)
def test_compiled_training_equals_the_uncompiled_one(donated, part, compiler):
    """With PyTorch's default too, where all tasks are there from the first step on."""
    net, balancer, optimizer = start()
    expected = train(net, balancer, optimizer, net)
    net, balancer, optimizer = start()
    losses_of = net
    if part == "model":
        losses_of = torch.compile(net, backend=compiler)
    else:
        net.first, net.last = (torch.compile(part, backend=compiler) for part in (net.first, net.last))
    with torch._functorch.config.patch(donated_buffer=donated):
        if not donated:
            balancer(losses_of(batches(1)[0])[:1], tasks=[0]).backward()  # compiled with a single pass
            balancer.load_state_dict(start()[1].state_dict())
        close(train(net, balancer, optimizer, losses_of), expected, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if part == "model" else 2)


@pytest.mark.parametrize("part", ["trunk", "model"])
def test_nothing_is_compiled_again_from_step_to_step(part):
    """Though the learning rate, the loss scale, the tasks present, the number of steps and .grad change."""
    graphs = {"forward": 0, "backward": 0}

    def counting(kind):
        def compiler(graph, example_inputs):
            graphs[kind] += 1
            return make_boxed_func(graph)

        return compiler

    backend = aot_autograd(fw_compiler=counting("forward"), bw_compiler=counting("backward"))
    runs = [start(momentum=0.0), start(momentum=0.0)]  # momentum moves an absent head whose .grad is 0, not None
    for _, balancer, optimizer in runs:
        balancer.attach(optimizer)
    functions = [net for net, _, _ in runs]
    if part == "model":
        functions[0] = torch.compile(functions[0], backend=backend)
    else:
        functions[0].last = torch.compile(functions[0].last, backend=backend)
    present = [[0, 1, 2]] * 4 + [[1]] + [[0, 1, 2]] * 3 + [[2, 0]] + [[0, 1, 2]] * 3
    with torch._dynamo.config.patch(error_on_recompile=True), torch._functorch.config.patch(donated_buffer=False):
        for step, (x, tasks) in enumerate(zip(batches(12), present, strict=True)):
            scale = 2.0 ** (step % 5)
            for (_, balancer, optimizer), losses_of in zip(runs, functions, strict=True):
                optimizer.param_groups[0]["lr"] = 0.05 / (1 + step) / scale
                optimizer.zero_grad(set_to_none=step % 3 > 0)
                for losses in [losses_of(x) for _ in range(1 + step % 2)]:
                    (balancer([losses[task] for task in tasks], tasks=tasks) * scale).backward()
                optimizer.step()
            assert graphs == {"forward": 1, "backward": 1}, step
    close(everything(*runs[0][:2]), everything(*runs[1][:2]), rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, compiled):
    """Recomputed for each task's backward pass over the one graph."""
    net, balancer, optimizer = start()
    expected = train(net, balancer, optimizer, net)
    net, balancer, optimizer = start(reentrant)
    with torch._functorch.config.patch(donated_buffer=False):
        losses_of = torch.compile(net, backend="aot_eager") if compiled else net
        actual = train(net, balancer, optimizer, losses_of)
    close(actual, expected, rtol=1e-5)


class Tied(nn.Module):
    """An embedding that is the first head's weight too; a layer used twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 9, bias=False), nn.Linear(6, 1)])
        self.heads[0].weight = self.embedding.weight
        self.shared = [*self.embedding.parameters(), *self.layer.parameters()]
        self.batches = [((torch.arange(12) * (step + 2)) % 9,) for step in range(4)]

    def forward(self, x):
        z = self.layer(self.layer(self.embedding(x)).tanh())
        return [nn.functional.cross_entropy(self.heads[0](z), (x + 1) % 9), self.heads[1](z).square().mean() + 0.1]


class Experts(nn.Module):
    """Each input goes to some of them, for the second task to one: the others take no part in that step."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 4) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        self.shared = list(self.experts.parameters())
        self.batches = [(torch.randn(7, 5).double(), active) for active in [(0,), (0, 1), (1,), (0, 1)]]

    def forward(self, x, active):
        z = [torch.tanh(self.experts[i](x)) for i in active]
        return [self.heads[0](sum(z)).square().mean() + 0.1, (self.heads[1](z[0]) - 1).square().mean() + 0.1]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", [Tied, Experts])
def test_weights_that_are_used_twice_or_not_at_all(model, compiled):
    """The task gradient is the sum over the uses, the head's included; an idle .grad is of the average, or None."""
    net = model().double()
    balancer = dbk.DBMTL(net.shared, 2, state_dtype=torch.float64, beta_sigma=0.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sizes = [p.numel() for p in net.shared]
    ema = np.zeros((2, sum(sizes)))
    with torch._functorch.config.patch(donated_buffer=False):
        losses_of = torch.compile(net, backend="aot_eager") if compiled else net
        for batch in net.batches:
            optimizer.zero_grad()
            plain = net(*batch)
            expected, ema, _ = oracle.balance(flat_gradients(plain, net.shared), ema)
            head = torch.autograd.grad(torch.log(plain[1] + EPS), net.heads[1].weight)
            balancer(losses_of(*batch)).backward()
            parts = np.split(expected, np.cumsum(sizes)[:-1])
            assert [p.grad is not None for p in net.shared] == [bool(part.any()) for part in parts]
            written = [(p.grad, part) for p, part in zip(net.shared, parts, strict=True) if p.grad is not None]
            close(torch.cat([grad.flatten() for grad, _ in written]).numpy(), np.concatenate([x for _, x in written]))
            close(net.heads[1].weight.grad.numpy(), head[0].numpy())
            optimizer.step()


def sequence(balancer, p, attached=True):
    """Accumulation, partial tasks, factors, task(), an overflow; gives every gradient."""
    optimizer = torch.optim.SGD([p], lr=0.01)
    handle = balancer.attach(optimizer) if attached else contextlib.nullcontext()
    grads = []
    for step in range(6):
        optimizer.zero_grad()
        for micro, tasks in enumerate(([0, 1, 2], [2, 0], [1])[: 1 + step % 3]):
            losses = [((p - t) * (1 + t)).square().sum() + 0.5 + micro for t in range(3)]
            losses[2] = losses[2] * (float("nan") if step == 4 else 1.0)
            factor = (1.0, 0.5, 4.0)[step % 3]
            (balancer([losses[t] for t in tasks], tasks=tasks) * factor).backward()
            grads.append(p.grad.clone())
        if step == 3:
            with balancer.task(1):
                dbk.log_transform(p.square().sum() + 1).backward()
            balancer.balance()
            grads.append(p.grad.clone())
        optimizer.step()
    with handle:  # detaches
        return grads


def parameter():
    torch.manual_seed(4)
    return torch.randn(300, requires_grad=True)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_capturable_gives_the_same_numbers(state_dtype, sigma, attached):
    """With a constant beta bit for bit."""
    runs = []
    for capturable in (False, True):
        p = parameter()
        balancer = dbk.DBMTL([p], 3, capturable=capturable, beta_sigma=sigma, state_dtype=state_dtype)
        runs.append((sequence(balancer, p, attached), balancer))
    (grads, host), (others, device) = runs
    assert device.step == host.step == (6 if attached else 13)
    assert device.nonfinite_steps.tolist() == host.nonfinite_steps.tolist()
    if sigma == 0.0:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(grads, others, strict=True))
        assert_same_state(device.state_dict(), host.state_dict())
    for mine, theirs in zip(others, grads, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        close(mine.nan_to_num().numpy(), theirs.nan_to_num().numpy(), rtol=1e-6)


@pytest.mark.parametrize("first", [False, True])
def test_a_state_dict_goes_from_capturable_to_not_and_back(first):
    """In the middle of an accumulated step."""
    results = []
    for changing in (False, True):
        p = parameter()
        options = {"state_dtype": torch.bfloat16, "beta_sigma": 0.0}
        balancer = dbk.DBMTL([p], 3, capturable=first, **options)
        sequence(balancer, p)
        handle = balancer.attach(torch.optim.SGD([p], lr=0.01))
        p.grad = None
        balancer([(p - t).square().sum() for t in range(3)]).backward()
        state = copy.deepcopy(balancer.state_dict())
        assert state["steps"]["step"] == 7
        handle.remove()
        balancer = dbk.DBMTL([p], 3, capturable=first != changing, **options)
        balancer.load_state_dict(state)
        assert balancer.step == 7
        optimizer = torch.optim.SGD([p], lr=0.01)
        balancer.attach(optimizer)
        for target in (1, 2):
            balancer([(p * t - target).square().sum() for t in range(3)]).backward()
            optimizer.step()
        results.append((copy.deepcopy(balancer.state_dict()), p.grad.clone()))
    (state, grad), (other, changed) = results
    assert_same_state(other, state)
    assert torch.equal(changed, grad)


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_number_on_the_host_changes_from_step_to_step(state_dtype, capturable, monkeypatch):
    """What a CUDA graph would freeze: the arguments of the ops that are not tensors. The tensors change instead."""
    calls = {"numbers": [], "coefficients": []}

    def numbers_in(value):
        if isinstance(value, (list, tuple)):
            return [number for part in value for number in numbers_in(part)]
        return [] if isinstance(value, torch.Tensor) else [value]

    def spy(implementation, *args):
        calls["numbers"].append(numbers_in(args))
        if implementation is accumulate:
            calls["coefficients"].append(torch.as_tensor(args[4], dtype=torch.float64).clone())
        return implementation(*args)

    accumulate = ops.accumulate_
    for name in ("accumulate_", "balance_rows_"):
        monkeypatch.setattr(ops, name, functools.partial(spy, getattr(ops, name)))
    p = parameter()
    balancer = dbk.DBMTL([p], 3, capturable=capturable, state_dtype=state_dtype)
    optimizer = torch.optim.SGD([p], lr=0.01)
    balancer.attach(optimizer)
    steps = []
    for _ in range(4):
        optimizer.zero_grad()
        for tasks in ([0, 1, 2], [1]):
            balancer([((p - t) * (1 + t)).square().sum() for t in tasks], tasks=tasks).backward()
        optimizer.step()
        steps.append(calls["numbers"])
        calls["numbers"] = []
    assert len(steps[0]) == 6
    assert all(step == steps[0] for step in steps) == capturable
    coefficients = torch.stack(calls["coefficients"]).view(4, 4, 2)  # step, update in it, (decay, gain)
    beta = 0.9 / torch.arange(1, 5, dtype=torch.float64).sqrt()
    for update, decay in enumerate((beta, beta, beta, torch.ones(4))):
        close(coefficients[:, update, 0].numpy(), decay.numpy(), rtol=1e-15)
        close(coefficients[:, update, 1].numpy(), (1 - beta).numpy(), rtol=1e-15)
    assert balancer.step == 4


def test_the_count_of_a_capturable_balancer_is_a_tensor_that_stays_where_it_is():
    """A captured graph counts in place; `step` reads. One loaded mid-step brings its own beta."""
    p = parameter()
    balancer = dbk.DBMTL([p], 3, capturable=True)
    optimizer = torch.optim.SGD([p], lr=0.0)
    balancer.attach(optimizer)
    count, states = balancer._engine.steps._count, []
    for step in range(1, 4):
        optimizer.zero_grad()
        balancer([(p - t).square().sum() for t in range(3)]).backward()
        assert count == step
        assert balancer.step == step
        states.append((copy.deepcopy(balancer.state_dict()), p.grad))
        optimizer.step()
    state, p.grad = states[0]
    balancer.load_state_dict(state)
    assert balancer._engine.steps._count is count
    balancer([(p - t).square().sum() for t in range(3)]).backward()
    rows = state["buffer"]["rows"]["0"].flatten(1)
    close(state_of(balancer).rows.numpy(), 2 * rows.numpy(), rtol=1e-6)
    count += 1  # as a replayed graph would
    assert balancer.step == 2
