"""Gradients asked for by name: backward(inputs=), autograd.grad; create_graph is refused."""

import dbmtl_kernels as dbk
import older
import pytest
import torch
from problems import close, flat_gradients, leaf, make, quadratics, state_of
from torch import nn


@pytest.fixture
def model():
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 5).double(), nn.ModuleList(nn.Linear(5, 1) for _ in range(2)).double()
    return trunk, heads, torch.randn(6, 4, dtype=torch.float64)


def losses(trunk, heads, x):
    z = trunk(x)
    return [(head(z) - t).square().mean() + 0.1 for t, head in enumerate(heads)]


def whole(trunk, heads, x, factor=1.0):
    """All gradients of a first step, by parameter; .grad is None afterwards."""
    (make(*trunk.parameters())(losses(trunk, heads, x)) * factor).backward()
    params = [*trunk.parameters(), *heads.parameters()]
    grads = {p: p.grad.clone() for p in params}
    for p in params:
        p.grad = None
    return grads


NAMED = {
    "everything": lambda t, h: [*t.parameters(), *h.parameters()],
    "trunk": lambda t, h: list(t.parameters()),
    "heads": lambda t, h: list(h.parameters()),
    "some of each": lambda t, h: [t.bias, h[1].weight],
    "one": lambda t, h: t.weight,
}


@pytest.mark.parametrize(
    "how", ["method", pytest.param("function", marks=older.function_sees_losses), "with a regulariser"]
)
@pytest.mark.parametrize("which", NAMED)
def test_backward_reaches_the_inputs_that_are_named_and_no_others(which, how, model):
    trunk, heads, x = model
    expected = whole(*model, factor=2.0)
    named = NAMED[which](trunk, heads)
    wanted = [named] if isinstance(named, torch.Tensor) else named
    balancer = make(*trunk.parameters())
    before = {p: torch.ones_like(p) for p in expected}
    for p in expected:
        p.grad = before[p]
    loss = balancer(losses(trunk, heads, x)) * 2.0
    if how == "with a regulariser":
        loss = loss + sum(p.sum() for p in expected)
    if how == "function":
        torch.autograd.backward([loss], inputs=named)
    else:
        loss.backward(inputs=named)
    for p, grad in expected.items():
        assert p.grad is before[p]
        chosen = any(p is q for q in wanted)
        close(p.grad.numpy(), 1.0 + chosen * (grad.numpy() + (how == "with a regulariser")))
    assert balancer.step == 1


def test_rows_hold_all_shared_parameters_whatever_is_named(model):
    trunk, _heads, _x = model
    balancer, twin = make(*trunk.parameters()), make(*trunk.parameters())
    balancer(losses(*model)).backward(inputs=[trunk.bias])
    twin(losses(*model)).backward()
    assert torch.equal(state_of(balancer).rows, state_of(twin).rows)


@pytest.mark.parametrize("which", NAMED)
def test_autograd_grad_gives_the_same_and_leaves_grad_alone(which, model):
    trunk, heads, _x = model
    expected = whole(*model, factor=3.0)
    named = NAMED[which](trunk, heads)
    balancer = make(*trunk.parameters())
    trunk.weight.grad = mine = torch.ones_like(trunk.weight)
    grads = torch.autograd.grad(3.0 * balancer(losses(*model)) + trunk.weight.sum(), named)
    for p, grad in zip([named] if which == "one" else named, grads, strict=True):
        close(grad.numpy(), expected[p].numpy() + (p is trunk.weight))
    assert trunk.weight.grad is mine
    assert (mine == 1).all()
    assert all(p.grad is None for p in expected if p is not trunk.weight)
    assert balancer.step == 1


def test_what_autograd_grad_gave_outlives_the_next_step(model):
    trunk, heads, x = model
    balancer = make(*trunk.parameters())
    (grad,) = torch.autograd.grad(balancer(losses(*model)), trunk.weight)
    kept = grad.clone()
    balancer(losses(trunk, heads, 2 * x)).backward()
    assert torch.equal(grad, kept)


def test_unused_inputs_are_what_they_are_without_us(model):
    trunk, _heads, _x = model
    stranger = leaf(3)
    balancer = make(*trunk.parameters())
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(balancer(losses(*model)), [trunk.weight, stranger])
    _, none = torch.autograd.grad(balancer(losses(*model)), [trunk.weight, stranger], allow_unused=True)
    assert none is None
    _, zero = torch.autograd.grad(balancer(losses(*model)), [trunk.weight, stranger], materialize_grads=True)
    assert torch.equal(zero, torch.zeros_like(stranger))


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, p: loss.backward(create_graph=True),
        lambda loss, p: torch.autograd.backward(loss, create_graph=True),
        lambda loss, p: torch.autograd.grad(loss * 2, p, create_graph=True),
        lambda loss, p: loss.as_subclass(torch.Tensor).backward(create_graph=True),
    ],
)
def test_create_graph_is_refused(ask, model):
    trunk, heads, _x = model
    balancer = make(*trunk.parameters())
    with pytest.raises(RuntimeError, match=r"create_graph=True is not supported.*sum of the losses"):
        ask(balancer(losses(*model)), trunk.weight)
    assert balancer.step == 0
    assert all(p.grad is None for p in [*trunk.parameters(), *heads.parameters()])


def test_autograd_grad_in_the_middle_of_a_step_is_refused(model):
    trunk, _heads, x = model
    balancer, optimizer = make(*trunk.parameters()), torch.optim.SGD(trunk.parameters(), lr=0.1)
    balancer.attach(optimizer)
    balancer(losses(*model)).backward()
    before = trunk.weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"in the middle of a step.*optimizer.step\(\) first"):
        torch.autograd.grad(balancer(losses(*model)), trunk.weight)
    assert torch.equal(trunk.weight.grad, before)
    optimizer.step()
    first, second = (torch.autograd.grad(balancer(losses(*model)), trunk.weight)[0] for _ in range(2))
    assert balancer.step == 3  # each is a step of its own
    assert not torch.equal(second, 2 * first)
    with pytest.raises(RuntimeError, match="takes leaf tensors"):
        torch.autograd.grad(balancer(losses(*model)), trunk(x))


def test_a_balanced_loss_is_a_plain_tensor_in_all_else(model):
    trunk, _heads, _x = model
    balancer = make(*trunk.parameters())
    loss = balancer(losses(*model))
    assert isinstance(loss, torch.Tensor)
    assert type(loss.detach()) is torch.Tensor
    assert type(torch.stack([loss.detach(), torch.ones((), dtype=torch.float64)])) is torch.Tensor
    assert f"{float(loss.detach()):.3f}" == f"{loss.item():.3f}"
    total = loss.clone()
    total += 1.0
    total /= 2
    total.backward()
    values = [float(torch.log(v.detach() + 1e-8)) for v in losses(*model)]
    close(torch.tensor(loss.item()).numpy(), torch.tensor(sum(values)).numpy(), rtol=1e-6)
    p = leaf(4)
    both = make(p)(quadratics(p)) + make(p)(quadratics(p))  # two balancers in one expression
    (grad,) = torch.autograd.grad(both, p)
    twin = make(p)
    (half,) = torch.autograd.grad(twin(quadratics(p)), p)
    close(grad.numpy(), 2 * half.numpy())
    assert flat_gradients(quadratics(p), [p]).shape == (2, 4)
    assert dbk.DBMTL([p], 2)(quadratics(p)).requires_grad
