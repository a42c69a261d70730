"""What the balancer does to .grad."""

import weakref

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from problems import EPS, close, flat_grad, flat_gradients, leaf, make, quadratics, state_of
from torch import nn


@pytest.mark.parametrize("log", [True, False])
def test_norms_weights_and_gradient(log):
    params = [leaf(3, 4), leaf(5), leaf(1)]
    balancer = make(*params, num_tasks=3, beta=0.5, log_transform=log)
    ema = np.zeros((3, 18))
    for _ in range(3):
        losses = quadratics(*params, num_tasks=3)
        expected, ema, norms = oracle.balance(flat_gradients(losses, params, log), ema, 0.5)
        loss = balancer(losses)
        assert float(loss.detach()) == pytest.approx(
            sum(float(torch.log(x.detach() + EPS) if log else x.detach()) for x in losses)
        )
        loss.backward()
        close(flat_grad(params), expected)
        close(balancer.norms.numpy(), norms)
        close(balancer.weights.numpy(), norms.max() / (norms + EPS))
        for p in params:
            p.grad = None
    assert balancer.step == 3


def test_negative_losses_are_fine_without_the_logarithm():
    p = leaf(4)
    make(p, log_transform=False)([-p.square().sum(), p.sum()]).backward()
    assert p.grad is not None


def test_heads_get_the_plain_gradient():
    p, heads = leaf(4), [leaf(4) for _ in range(2)]
    losses = [(p * h).sum().square() + 1 for h in heads]
    expected = torch.autograd.grad(sum(torch.log(x + EPS) for x in losses), heads, retain_graph=True)
    heads[0].grad = torch.ones_like(heads[0])
    make(p)(losses).backward()
    close(heads[0].grad.numpy(), 1 + expected[0].numpy())
    close(heads[1].grad.numpy(), expected[1].numpy())


def test_grads_lie_in_one_flat_tensor_padded_to_128_bytes():
    params = [leaf(3, 4, dtype=torch.float32), leaf(1, dtype=torch.float32), leaf(33, dtype=torch.float32)]
    balancer = dbk.DBMTL(params, 2)
    balancer(quadratics(*params)).backward()
    addresses = [p.grad.data_ptr() for p in params]
    assert [address - addresses[0] for address in addresses] == [0, 128, 256]
    assert [p.grad.untyped_storage().nbytes() for p in params] == [p.nbytes for p in params]  # one of its own each
    assert state_of(balancer).rows.shape == (2, 128)


def test_an_existing_grad_is_added_to_in_place():
    p, q = leaf(5), leaf(3)
    balancer, twin = make(p, q), make(p, q)
    mine = torch.randn(5, dtype=torch.float64)
    p.grad = mine
    total = mine.numpy().copy()
    for _ in range(3):
        losses = quadratics(p, q)
        balancer(losses).backward()
        kept, p.grad, q.grad = (p.grad, q.grad), None, None
        twin(quadratics(p, q)).backward()
        total += p.grad.numpy()
        p.grad, q.grad = kept
    assert p.grad is mine
    close(p.grad.numpy(), total)


@pytest.mark.parametrize("has_grad", [True, False])
def test_a_parameter_frozen_later_is_left_alone(has_grad):
    a, b = leaf(4), leaf(3)
    balancer = make(a, b, beta=0.5)
    balancer(quadratics(a, b)).backward()
    old, b.grad = a.grad.clone() if has_grad else None, None
    a.grad = a.grad if has_grad else None
    a.requires_grad_(False)
    balancer(quadratics(a, b)).backward()
    assert a.grad is None if old is None else torch.equal(a.grad, old)
    assert b.grad is not None


def test_mixed_parameter_dtypes_keep_their_dtypes_side_by_side():
    params = [leaf(3, dtype=torch.float32), leaf(70, dtype=torch.bfloat16), leaf(5, dtype=torch.float64)]
    params += [leaf(2, 2, dtype=torch.float16), leaf(9, dtype=torch.float32)]
    balancer = dbk.DBMTL(params, 2, beta=0.0)
    losses = quadratics(*[p.float() for p in params])
    expected, _, _ = oracle.balance(flat_gradients(losses, params), np.zeros((2, 91)), 0.0)
    balancer(losses).backward()
    assert [p.grad.dtype for p in params] == [p.dtype for p in params]
    for p in params:
        assert p.grad.untyped_storage().nbytes() == p.nbytes
        assert p.grad.data_ptr() % 128 == params[0].grad.data_ptr() % 128
    close(flat_grad(params), expected, rtol=2e-2)
    close(flat_grad([params[0], params[4]]), np.concatenate([expected[:3], expected[-9:]]), rtol=1e-5)


@pytest.mark.parametrize("dense", [True, False])
def test_parameters_in_an_order_of_their_own(dense):
    """Channels last keeps its strides; a strided view of something larger cannot."""
    p = torch.randn(8, 3, 3, 6, dtype=torch.float64)
    p = p[..., :3].to(memory_format=torch.channels_last) if dense else p[..., ::2]
    p, bias = p.detach().requires_grad_(), leaf(8)
    assert not p.is_contiguous()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    z = nn.functional.conv2d(x, p, bias)
    losses = [z.square().mean(), (z - 1).abs().mean()]
    expected, _, _ = oracle.balance(flat_gradients(losses, [p, bias]), np.zeros((2, 224)), 0.9)
    balancer = make(p, bias)
    balancer(losses).backward()
    assert (p.grad.stride() == p.stride()) == dense
    close(flat_grad([p, bias]), expected)
    assert state_of(balancer).layout.dense == [dense, True]


@pytest.mark.parametrize("attached", [False, True])
def test_a_grad_of_somebody_else_is_not_kept_alive(attached):
    p = leaf(5)
    balancer = make(p)
    optimizer = torch.optim.SGD([p], lr=0.1)
    if attached:
        balancer.attach(optimizer)
    p.grad = torch.ones(5, dtype=torch.float64)
    grad = weakref.ref(p.grad)
    balancer(quadratics(p)).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert grad() is None
