"""What the balancer does to graphs: freed, retained, checkpointed, failing."""

import gc
import weakref

import numpy as np
import oracle
import pytest
import torch
from problems import EPS, close, flat_grad, flat_gradients, leaf, make, quadratics, state_of
from torch import nn
from torch.utils.checkpoint import checkpoint


def test_retain_graph_lets_a_regulariser_share_the_graph():
    p = leaf(5)
    z = p * 2
    losses = [z.square().sum() + 1, (z.sum() - 1).square() + 1]
    rows = flat_gradients(losses, [p])
    expected, _, _ = oracle.balance(rows, np.zeros((2, 5)), 0.9)
    (penalty,) = torch.autograd.grad(z.abs().sum(), p, retain_graph=True)
    (make(p)(losses, retain_graph=True) + z.abs().sum()).backward()
    close(p.grad.numpy(), expected + penalty.numpy())


def test_graphs_are_freed_and_nothing_is_kept_alive():
    p = leaf(5)
    balancer = make(p)
    losses = quadratics(p)
    nodes = [weakref.ref(x) for x in losses]
    loss = balancer(losses)
    loss.backward()
    del losses
    gc.collect()
    assert all(node() is None for node in nodes)
    loss2 = balancer(quadratics(p))
    ref = weakref.ref(loss2)
    del loss2
    assert ref() is None


def test_each_task_grad_is_let_go_before_the_next_pass():
    p = leaf(1000)
    balancer = make(p, num_tasks=3)
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(p.grad)
            return grad

    losses = [Watch.apply(x) for x in quadratics(p, num_tasks=3)]
    balancer(losses).backward()
    assert seen == [None, None, None]


def test_under_no_grad_only_the_value():
    p = leaf(3)
    balancer = make(p)
    with torch.no_grad():
        value = balancer(quadratics(p))
    assert not value.requires_grad
    assert balancer.step == 0


def test_reentrant_checkpointing_meets_a_parameter_twice():
    layer = nn.Linear(300, 300).double()
    x = torch.randn(4, 300, dtype=torch.float64).requires_grad_()

    def losses():
        z = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
        return [z.square().mean() + 1, (z - 1).square().sum()]

    plain = layer(layer(x))
    rows = flat_gradients([plain.square().mean() + 1, (plain - 1).square().sum()], list(layer.parameters()))
    expected, ema, norms = oracle.balance(rows, np.zeros((2, 90300)), 0.9)
    expected, _, norms = oracle.balance(rows, ema, 0.9)
    balancer = make(*layer.parameters())
    for _ in range(2):
        layer.zero_grad()
        # A re-entrant checkpoint cannot be backpropagated twice: one graph for each task.
        with balancer.task(0):
            torch.log(losses()[0] + EPS).backward()
        with balancer.task(1):
            torch.log(losses()[1] + EPS).backward()
        balancer.balance()
    close(flat_grad(list(layer.parameters())), expected)
    close(balancer.norms.numpy(), norms)

    fresh = make(*layer.parameters())
    for _ in range(2):
        layer.zero_grad()
        fresh([losses()[0], losses()[1]]).backward()
    close(flat_grad(list(layer.parameters())), expected)
    close(fresh.norms.numpy(), norms)


def test_a_failing_backward_gives_the_grads_back():
    p = leaf(4)
    balancer = make(p)
    p.grad = torch.ones(4, dtype=torch.float64)
    loss = p.square().sum() + 1
    loss.backward(retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        balancer([loss, loss]).backward()
    assert balancer.step == 0
    close(p.grad.numpy(), 1 + 2 * p.detach().numpy())


def test_an_exception_inside_a_task_leaves_everything_as_it_was():
    p = leaf(4)
    balancer = make(p)
    p.grad = mine = torch.ones(4, dtype=torch.float64)

    def body():
        with balancer.task(0):
            p.square().sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert p.grad is mine
    assert (mine == 1).all()
    assert (state_of(balancer).rows == 0).all()
    with balancer.task(0):
        p.square().sum().backward()
    balancer.balance()


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_reentrant_checkpoint_decays_what_is_reached_once(backend):
    first, shared, last = (nn.Linear(5, 5).double() for _ in range(3))
    x = torch.randn(4, 5, dtype=torch.float64).requires_grad_()

    def loss(reentrant):
        z = first(x)
        for _ in range(2):
            z = checkpoint(shared, z, use_reentrant=True) if reentrant else shared(z)
        return (z - 1).square().mean() + 1

    results = []
    for reentrant in (False, True):
        params = [*first.parameters(), *shared.parameters(), *last.parameters()]
        balancer = make(*params, num_tasks=2, beta=0.5, backend=backend)
        for _ in range(3):
            for p in params:
                p.grad = None
            balancer([loss(reentrant), loss(reentrant) + last(x).square().mean()]).backward()
        results.append((flat_grad(params), balancer.norms.numpy()))
    close(results[1][0], results[0][0])
    close(results[1][1], results[0][1])


def test_a_failure_in_a_later_task_counts_nothing_twice():
    p = leaf(4)
    balancer = make(p, beta=0.0)

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    losses = quadratics(p)
    with pytest.raises(ZeroDivisionError):
        balancer([losses[0], Fail.apply(losses[1])]).backward()
    assert p.grad is None
    expected, _, norms = oracle.balance(flat_gradients(quadratics(p), [p]), np.zeros((2, 4)), 0.0)
    balancer(quadratics(p)).backward()
    close(p.grad.numpy(), expected)
    close(balancer.norms.numpy(), norms)


@pytest.mark.parametrize("how", ["task", "call"])
def test_a_failure_in_a_longer_step_keeps_the_balanced_gradient(how):
    p = leaf(4)
    balancer = make(p, beta=0.0)
    optimizer = torch.optim.SGD([p], lr=0.0)
    balancer.attach(optimizer)
    balancer(quadratics(p)).backward()
    before = p.grad.clone()

    def fail():
        if how == "task":
            with balancer.task(0):
                raise ZeroDivisionError
        loss = p.square().sum() + 1
        torch.autograd.grad(loss, p)  # frees the graph
        balancer([loss, loss]).backward()

    with pytest.raises((ZeroDivisionError, RuntimeError)):
        fail()
    close(p.grad.numpy(), before.numpy())
    assert balancer.step == 1
    balancer(quadratics(p)).backward()
    close(p.grad.numpy(), 2 * before.numpy(), rtol=1e-7)  # eps weighs half as much on the sum of two


def test_losses_that_never_reach_the_shared_parameters():
    p, q = leaf(4), leaf(3)
    balancer = make(p)
    optimizer = torch.optim.SGD([p, q], lr=0.1)
    balancer.attach(optimizer)
    for _ in range(3):
        with pytest.warns(RuntimeWarning, match="no shared parameter got a gradient"):
            balancer(quadratics(q)).backward()
    assert balancer.step == 1
    assert p.grad is None


def test_a_frozen_parameters_old_grad_is_left_alone():
    a, b = leaf(4), leaf(3)
    balancer = make(a, b)
    balancer(quadratics(a, b)).backward()
    a.requires_grad_(False)
    old = a.grad.clone()
    b.grad = None
    balancer(quadratics(a, b)).backward()
    assert torch.equal(a.grad, old)


def test_detaching_ends_the_step():
    p = leaf(4)
    balancer = make(p)
    handle = balancer.attach(torch.optim.SGD([p], lr=0.1))
    balancer(quadratics(p)).backward()
    handle.remove()
    p.grad = None
    balancer(quadratics(p)).backward()
    assert balancer.step == 2


def test_a_first_factor_of_zero_does_not_set_the_unit():
    p = leaf(4)
    balancer = make(p, beta=0.0)
    balancer.attach(torch.optim.SGD([p], lr=0.1))
    (balancer(quadratics(p)) * 0.0).backward()
    assert (p.grad == 0).all()
    (balancer(quadratics(p)) * 0.5).backward()
    expected, _, _ = oracle.balance(flat_gradients(quadratics(p), [p]), np.zeros((2, 4)), 0.0)
    close(p.grad.numpy(), 0.5 * expected)
