"""What the balancer does to graphs: freed, retained, checkpointed, failing."""

import copy
import gc
import weakref
from contextlib import nullcontext

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from dbmtl_kernels.engine import gradients
from dbmtl_kernels.rows import collect
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


def test_each_task_grad_is_let_go_before_the_next_pass():
    p = leaf(1000)
    balancer = make(p, num_tasks=3)
    seen, losses = [], quadratics(p, num_tasks=3)
    for loss in losses:
        loss.register_hook(lambda _: seen.append(p.grad))
    balancer(losses).backward()
    assert seen == [None, None, None]


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


@pytest.fixture(params=["after the pass", "one by one"])
def flushed(request, monkeypatch):
    """Gradients go to their row after the pass, or each as soon as the next has come."""
    if request.param == "one by one":
        monkeypatch.setattr(gradients, "FLUSH_BYTES", 1)
        monkeypatch.setattr(collect, "FLUSH_BYTES", 1)
    return request.param


@pytest.mark.parametrize("how", ["call", "task"])
def test_reentrant_checkpoint_decays_what_is_reached_once(how, flushed):
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
        balancer = make(*params, num_tasks=2, beta=0.5)
        for _ in range(3):
            for p in params:
                p.grad = None
            losses = [loss(reentrant), loss(reentrant) + last(x).square().mean()]
            if how == "call":
                balancer(losses).backward()
                continue
            for task in range(2):
                with balancer.task(task):
                    torch.log(losses[task] + EPS).backward()
            balancer.balance()
        results.append((flat_grad(params), balancer.norms.numpy()))
    close(results[1][0], results[0][0])
    close(results[1][1], results[0][1])


def test_a_pass_that_fails_with_part_of_its_row_written(flushed):
    """The step does not count; a row that was written begins anew, and that is said."""
    parameters = [leaf(4), leaf(3), leaf(2)]  # gradients come from the last to the first
    balancer = make(*parameters, beta=0.5)
    balancer(quadratics(*parameters)).backward()
    before = state_of(balancer).rows.clone()
    handle = parameters[0].register_hook(lambda _: 1 / 0)
    written = flushed == "one by one"
    said = pytest.warns(RuntimeWarning, match=r"of task\(s\) \[0\]: these begin anew") if written else nullcontext()
    with said, pytest.raises(ZeroDivisionError):
        balancer(quadratics(*parameters)).backward()
    handle.remove()
    rows, stats = state_of(balancer).rows, state_of(balancer).stats
    assert torch.equal(rows[1], before[1])
    assert torch.equal(rows[0], torch.zeros_like(rows[0]) if written else before[0])
    assert balancer.step == 1
    close(stats.sumsq.numpy(), rows.square().sum(dim=1).numpy())


@pytest.mark.parametrize(("task", "has_grad"), [(0, True), (1, True), (1, False)])
def test_a_failure_in_a_pass_gives_grad_back_and_counts_nothing_twice(task, has_grad):
    p = leaf(4)
    balancer = make(p, beta=0.0)
    p.grad = mine = torch.ones_like(p) if has_grad else None
    losses = quadratics(p)
    losses[task].register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        balancer(losses).backward()
    assert p.grad is mine
    assert balancer.step == 0
    expected, _, norms = oracle.balance(flat_gradients(quadratics(p), [p]), np.zeros((2, 4)), 0.0)
    balancer(quadratics(p)).backward()
    close(p.grad.numpy(), expected + has_grad)
    close(balancer.norms.numpy(), norms)


@pytest.mark.parametrize("how", ["task", "call"])
def test_a_failure_in_a_longer_step_keeps_the_balanced_gradient(how):
    p = leaf(4)
    balancer = make(p, beta=0.0, keep_rows=True)
    optimizer = torch.optim.SGD([p], lr=0.0)
    handle = balancer.attach(optimizer)
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
    handle.remove()  # ends the step
    balancer(quadratics(p)).backward()
    assert balancer.step == 2


def test_losses_that_never_reach_the_shared_parameters():
    p, q = leaf(4), leaf(3)
    balancer = make(p)
    optimizer = torch.optim.SGD([p, q], lr=0.1)
    balancer.attach(optimizer)
    with pytest.warns(RuntimeWarning, match="no shared parameter got a gradient"):
        balancer(quadratics(q)).backward()
    for _ in range(2):  # said once
        balancer(quadratics(q)).backward()
    assert balancer.step == 1
    assert p.grad is None


def test_a_first_factor_of_zero_does_not_set_the_unit():
    p = leaf(4)
    balancer = make(p, beta=0.0, keep_rows=True)
    optimizer = torch.optim.SGD([p], lr=0.1)
    balancer.attach(optimizer)
    (balancer(quadratics(p)) * 0.0).backward()
    assert (p.grad == 0).all()
    (balancer(quadratics(p)) * 0.5).backward()
    expected, _, _ = oracle.balance(flat_gradients(quadratics(p), [p]), np.zeros((2, 4)), 0.0)
    close(p.grad.numpy(), 0.5 * expected)


def test_a_copy_collects_as_the_original_does():
    """Its parameters are others: hooks of its own, gradients in the order of arrival, the same bits."""
    model = nn.ModuleDict({"trunk": nn.Linear(8, 16), "heads": nn.ModuleList(nn.Linear(16, 1) for _ in range(3))})
    model.balancer = dbk.DBMTL(model["trunk"].parameters(), 3)

    def backward(model, x):
        model.zero_grad()
        features = model["trunk"](x).tanh()
        model.balancer([head(features).square().mean() for head in model["heads"]]).backward()

    xs = torch.randn(4, 6, 8)
    backward(model, xs[0])
    copied = copy.deepcopy(model)
    copied.balancer.load_state_dict(model.balancer.state_dict())
    for x in xs[1:]:
        for each in (model, copied):
            backward(each, x)
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert torch.equal(model.balancer.norms, copied.balancer.norms)


def test_a_balancer_that_is_dropped_lets_its_rows_and_hooks_go():
    p = torch.ones(4, requires_grad=True)
    balancer = dbk.DBMTL([p], 1)
    balancer([(p * 2).sum()]).backward()
    rows = weakref.ref(balancer._engine.rows.rows)
    del balancer
    gc.collect()
    assert rows() is None
    p.grad = None
    (p * 3).sum().backward()
    assert torch.equal(p.grad, torch.full_like(p, 3.0))


def taken(p):
    p.grad = None


def test_a_gradient_that_a_hook_takes_away_is_refused():
    p = leaf(4)
    balancer = make(p)
    handle = p.register_post_accumulate_grad_hook(taken)
    with pytest.raises(RuntimeError, match=r"shared parameter 0 of shape \(4,\) was taken out of .grad"):
        balancer(quadratics(p)).backward()
    handle.remove()
    balancer(quadratics(p)).backward()
    assert balancer.step == 1
    assert p.grad is not None


@pytest.mark.parametrize("late", [False, True])
def test_a_users_hook_sees_the_gradient_of_each_pass(late):
    """Also one that comes after ours, and where gradients go to their rows during the pass (2 MB and more)."""
    parameters = [torch.ones(300_000, requires_grad=True) for _ in range(4)]
    seen = []

    def double(p):
        seen.append(p.grad.numel())
        p.grad.mul_(2)

    def register():
        for p in parameters:
            p.register_post_accumulate_grad_hook(double)

    def norms(balancer):
        balancer.backward([sum((p * (t + 1)).sum() for p in parameters) for t in range(2)])
        return balancer.norms

    balancer = dbk.GradientBalancer(parameters, 2, weighting=dbk.MaxNorm(), backend="native")
    if not late:
        register()
    plain = norms(balancer)
    if late:
        register()
        torch.testing.assert_close(norms(balancer), 2 * plain)
    assert len(seen) == 8


def test_what_fails_before_the_first_pass_leaves_grad_and_step(monkeypatch):
    p = leaf(3)
    balancer = make(p)
    for _ in range(3):
        balancer(quadratics(p)).backward()
    p.grad = mine = torch.full_like(p, 7.0)
    monkeypatch.setattr(balancer._engine.steps, "coefficients_of", lambda count: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        balancer(quadratics(p)).backward()
    assert p.grad is mine
    assert balancer.step == 3


def test_a_scale_of_zero_is_not_forgotten_for_a_pass_that_failed():
    p = leaf(3)
    balancer = make(p)
    with balancer.attach(torch.optim.SGD([p], lr=0.1)):
        (balancer(quadratics(p)) * 0).backward()

        def fail(grad):
            raise ZeroDivisionError

        losses = quadratics(p)
        losses[0].register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            (balancer(losses) * 5).backward()
        assert not p.grad.any()
