"""Whose memory a .grad is, however people came by it, and what is noticed of models that changed."""

import gc
import warnings

import dbmtl_kernels as dbk
import oracle
import pytest
import torch
from problems import close, flat_gradients, leaf, make, quadratics
from torch import nn


def balanced(p, q):
    """Of a balancer with beta = 0."""
    grads = flat_gradients(quadratics(p, q), [p, q])
    return oracle.balance(grads, 0 * grads, 0.0)[0]


def grad_of(*params):
    return torch.cat([p.grad.reshape(-1) for p in params]).numpy()


def clip_data(params):
    for p in params:
        p.grad.data = p.grad.data.clamp(-1e9, 1e9)


def round_trip(params):
    module = nn.ParameterList(params)
    module.to(torch.float32)
    module.to(torch.float64)


def vector(params):
    flat = torch.nn.utils.parameters_to_vector([p.grad for p in params])
    torch.nn.utils.vector_to_parameters(flat * 1.0, [p.grad for p in params])


@pytest.mark.parametrize("change", [clip_data, round_trip, vector])
@pytest.mark.parametrize("none", [True, False])
def test_a_grad_that_was_given_other_memory(change, none):
    """The view that it was is no view any more; the next one is right."""
    p, q = leaf(4), leaf(3)
    balancer, optimizer = make(p, q, beta=0.0), torch.optim.SGD([p, q], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=none)
        balancer.backward(quadratics(p, q))
        close(grad_of(p, q), balanced(p, q), 1e-6)
        change([p, q])
        optimizer.step()


@pytest.mark.parametrize(
    "alias", [lambda g: g.detach(), lambda g: g.data, lambda g: g.view_as(g), lambda g: g[:]], ids=range(4)
)
@pytest.mark.parametrize("attached", [False, True])
def test_another_object_in_the_same_memory_is_added_to(alias, attached):
    p, q = leaf(4), leaf(3)
    balancer = make(p, q, beta=0.0)
    balancer.backward(quadratics(p, q))
    if attached:
        optimizer = torch.optim.SGD([p, q], lr=0.1)
        balancer.attach(optimizer)
        optimizer.step()
    before = grad_of(p, q)
    for x in (p, q):
        x.grad = alias(x.grad)
    balancer.backward(quadratics(p, q))
    close(grad_of(p, q), before + balanced(p, q), 1e-6)


def test_autograd_grad_leaves_what_an_earlier_backward_left():
    p, q = leaf(4), leaf(3)
    balancer = make(p, q)
    balancer.backward(quadratics(p, q))
    before = grad_of(p, q)
    torch.autograd.grad(balancer(quadratics(p, q)), [p])
    assert (grad_of(p, q) == before).all()


def test_inputs_that_would_lose_the_balanced_gradient_of_others_are_refused():
    p, q = leaf(4), leaf(3)
    balancer, optimizer = make(p, q), torch.optim.SGD([p, q], lr=0.1)
    balancer.attach(optimizer)
    balancer(quadratics(p, q)).backward(inputs=[p])  # nothing of q is lost
    assert q.grad is None
    balancer(quadratics(p, q)).backward()
    before = grad_of(p, q)
    with pytest.raises(RuntimeError, match=r"inputs=.* within a step, without shared parameter 1 .*name all"):
        balancer(quadratics(p, q)).backward(inputs=[p])
    assert (grad_of(p, q) == before).all()
    balancer(quadratics(p, q)).backward(inputs=[p, q])
    optimizer.step()
    balancer(quadratics(p, q)).backward(inputs=[p])


def in_place(loss):
    out = torch.zeros_like(loss)
    return out.add_(loss)


@pytest.mark.parametrize(
    "change", [in_place, lambda loss: loss.reshape(1).unbind()[0], lambda loss: loss.reshape(1).max(0)[0]], ids=range(3)
)
def test_what_was_made_of_a_balanced_loss_serves_inputs(change):
    p, q = leaf(4), leaf(3)
    change(make(p, q, beta=0.0)(quadratics(p, q))).backward(inputs=[p])
    close(grad_of(p), balanced(p, q)[:4], 1e-6)
    assert q.grad is None


# --- closures, optimizers -----------------------------------------------------------------------------------------


def test_later_calls_of_a_closure_are_evaluations_whatever_it_zeroes():
    p, q = leaf(4), leaf(3)
    balancer = make(p, q, beta=0.0)
    lbfgs, other = torch.optim.LBFGS([p], lr=0.1, max_iter=4), torch.optim.SGD([q], lr=0.1)
    balancer.attach(lbfgs, other)
    weights, seen = [], []

    def closure():
        lbfgs.zero_grad()  # not that of `other`
        loss = balancer(quadratics(p, q))
        loss.backward()
        weights.append(balancer.weights.numpy())
        seen.append((weights[0] @ flat_gradients(quadratics(p, q), [p]), p.grad.numpy().copy()))
        return loss

    lbfgs.step(closure)
    assert balancer.step == 1
    assert len(seen) > 2
    for expected, found in seen:
        close(found, expected, 1e-6)


def test_an_optimizer_that_is_gone_is_said():
    p = leaf(4)
    balancer = make(p)
    balancer.attach(torch.optim.SGD([p], lr=0.1))
    gc.collect()
    with pytest.warns(RuntimeWarning, match=r"attached to is gone.*balancer.attach"):
        balancer.backward(quadratics(p))
    optimizer = torch.optim.SGD([p], lr=0.1)
    balancer.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.backward(quadratics(p))


# --- parameters that are no longer the model's ----------------------------------------------------------------------


def one_by_one(step):
    return [step % 3]


def one_never(step):
    return [0, 2]


@pytest.mark.parametrize("present", [one_by_one, one_never])
@pytest.mark.parametrize("way", ["backward", "task"])
def test_replaced_parameters_are_named_whoever_is_present(present, way):
    """As soon as every task that ever came has come again."""
    torch.manual_seed(0)
    trunk, heads = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), [nn.Linear(4, 1) for _ in range(3)]
    balancer = dbk.DBMTL(list(trunk.parameters()), 3)

    def step(number):
        tasks = present(number)
        z = trunk(torch.ones(2, 4))
        losses = [heads[task](z).square().mean() for task in tasks]
        if way == "backward":
            balancer.backward(losses, tasks=tasks)
            return
        for task, loss in zip(tasks, losses, strict=True):
            with balancer.task(task):
                dbk.log_transform(loss).backward(retain_graph=True)
        balancer.balance()

    def three_steps():
        for number in range(3):
            step(number)

    three_steps()
    three_steps()
    trunk[2] = nn.Linear(4, 4)
    with pytest.warns(RuntimeWarning, match=r"shared parameter 2 .*shared parameter 3 .*none from any task since"):
        three_steps()
    trunk[0] = nn.Linear(4, 4)  # another layer later: all are gone now
    with pytest.warns(RuntimeWarning, match="no shared parameter got a gradient from any task"):
        three_steps()
