"""Each ``.grad`` is a part of one flat tensor, and all the same a tensor by itself: to save, to copy, to change."""

import copy
import io
import pickle

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from problems import close, leaf, make, quadratics
from torch import nn


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()


def several():
    """Parameters of two dtypes, one in another memory order, one with gaps, one that is empty."""
    channels_last = torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last)
    gaps = torch.randn(6, 4)[:, ::2]
    tensors = [torch.randn(10), torch.randn(500, 20), channels_last, torch.randn(7).bfloat16(), gaps, torch.ones(0)]
    return [nn.Parameter(x) for x in tensors]


def squares(parameters):
    return [sum((p.float() - t).square().sum() for p in parameters) for t in range(2)]


def test_what_is_saved_copied_and_pickled_is_one_gradient():
    parameters = several()
    dbk.DBMTL(parameters, 2).backward(squares(parameters))
    for p in parameters:
        alone = p.grad.clone(memory_format=torch.preserve_format)
        assert len(saved(p.grad)) == len(saved(alone))
        assert len(pickle.dumps(p.grad)) <= len(pickle.dumps(alone))
        twin = copy.deepcopy(p.grad)
        assert twin.untyped_storage().nbytes() == p.grad.nbytes
        for again in (twin, torch.load(io.BytesIO(saved(p.grad)))):
            assert torch.equal(again, p.grad)
            assert again.stride() == p.grad.stride()


def test_they_share_one_allocation():
    parameters = several()
    dbk.DBMTL(parameters, 2).backward(squares(parameters))
    addresses = [p.grad.data_ptr() for p in parameters if p.dtype == torch.float32 and p.numel()]
    assert all(address % 64 == 0 for address in addresses)
    assert max(addresses) - min(addresses) < 2 * sum(p.nbytes for p in parameters)
    kept = parameters[1].grad
    expected = kept.clone()
    del parameters
    assert torch.equal(kept, expected)  # one that is kept keeps the memory alive


def test_a_change_of_one_marks_no_other():
    p, q = leaf(4), leaf(3)
    balancer = make(p, q, beta=0.5)
    balancer.backward(quadratics(p, q))
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    of_q = (q.grad * weight).sum()  # a graph that needs q's as it is
    version = q.grad._version
    p.grad.mul_(2.0)
    assert q.grad._version == version
    of_q.backward()
    assert torch.equal(weight.grad, q.grad)


def test_a_graph_that_saved_one_notices_the_next_balance():
    p, q = leaf(4), leaf(3)
    balancer = make(p, q, beta=0.5)
    balancer.backward(quadratics(p, q))
    outs = [(x.grad * torch.ones(len(x), requires_grad=True)).sum() for x in (p, q)]
    p.grad = q.grad = None
    balancer.backward(quadratics(p, q))
    for out in outs:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_a_compiled_step_of_an_optimizer():
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        p, q = leaf(4), leaf(3)
        balancer, optimizer = make(p, q, beta=0.5), torch.optim.SGD([p, q], lr=0.1, momentum=0.9, foreach=True)

        def step(p=p, q=q, optimizer=optimizer):
            for x in (p, q):
                x.grad.clamp_(-1.0, 1.0)
            optimizer.step()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for _ in range(3):
            optimizer.zero_grad()
            balancer.backward(quadratics(p, q))
            run()
        found.append(torch.cat([p, q]).detach())
    assert torch.equal(*found)


def test_one_sent_to_another_process_does_not_disturb_the_next_step():
    """PyTorch moves what it sends to shared memory."""
    steps = []
    for send in (False, True):
        torch.manual_seed(0)
        p, q = leaf(4), leaf(3)
        balancer, optimizer = make(p, q, beta=0.5), torch.optim.SGD([p, q], lr=0.1)
        balancer.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                balancer.backward(quadratics(p, q))
                if send:
                    before = p.grad.clone()
                    p.grad.share_memory_()
                    assert torch.equal(p.grad, before)
            optimizer.step()
        steps.append(torch.cat([p, q]).detach())
    close(steps[1].numpy(), steps[0].numpy(), 1e-6)


# --- changes within a step --------------------------------------------------------------------------------------------

SEEN = {
    "in place": lambda g: g.mul_(3.0),
    "through detach": lambda g: g.detach().mul_(3.0),
    "through a slice": lambda g: g[:2].mul_(3.0),
    "out=": lambda g: torch.mul(g, 3.0, out=g),
    "foreach": lambda g: torch._foreach_mul_([g], 3.0),
    "foreach through detach": lambda g: torch._foreach_mul_([g.detach()], 3.0),
    "inference mode": torch.inference_mode()(lambda g: g.mul_(3.0)),
    "compiled": lambda g: torch.compile(lambda x: x.mul_(3.0), backend="aot_eager")(g),
    "other memory": lambda g: setattr(g, "data", g * 3.0),
}
NOT_SEEN = {  # docs/gradients.md#not-noticed
    ".data": lambda g: g.data.mul_(3.0),
    "foreach through .data": lambda g: torch._foreach_mul_([g.data], 3.0),
    "NumPy": lambda g: np.multiply(g.numpy(), 3.0, out=g.numpy()),
    "DLPack": lambda g: torch.from_dlpack(g).mul_(3.0),
    "unscale": lambda g: torch._amp_foreach_non_finite_check_and_unscale_([g], torch.zeros(1), torch.tensor(3.0)),
}


def changed_by(change, attached=True):
    """How far a change between two backwards is from what they leave without it, and the change."""
    found = []
    for do in (change, lambda g: None):
        torch.manual_seed(0)
        p, q = leaf(4), leaf(3)
        balancer = make(p, q, beta=0.5)
        optimizer = torch.optim.SGD([p, q], lr=0.1)
        if attached:
            balancer.attach(optimizer)
        balancer.backward(quadratics(p, q))
        before = p.grad.clone()
        do(p.grad)
        difference = p.grad - before
        balancer.backward(quadratics(p, q))
        found.append((p.grad.clone(), q.grad.clone(), difference))
    (p1, q1, wanted), (p2, q2, _) = found
    assert torch.equal(q1, q2)
    assert wanted.abs().max() > 0
    return p1 - p2, wanted


@pytest.mark.parametrize("way", SEEN)
def test_a_change_within_a_step_stays(way):
    found, wanted = changed_by(SEEN[way])
    close(found.numpy(), wanted.numpy(), 1e-5)


@pytest.mark.parametrize("way", NOT_SEEN)
def test_a_change_that_pytorch_does_not_count_is_lost_within_a_step(way):
    found, _ = changed_by(NOT_SEEN[way])
    assert not found.any()


@pytest.mark.parametrize("way", NOT_SEEN)
def test_and_stays_if_pytorch_is_told_of_it(way):
    found, wanted = changed_by(lambda g: (NOT_SEEN[way](g), torch.autograd.graph.increment_version(g)))
    close(found.numpy(), wanted.numpy(), 1e-5)


@pytest.mark.parametrize("way", {**SEEN, **NOT_SEEN})
def test_any_change_stays_where_a_backward_is_a_step(way):
    found, wanted = changed_by({**SEEN, **NOT_SEEN}[way], attached=False)
    close(found.numpy(), wanted.numpy(), 1e-5)


def test_other_memory_full_of_zeros_is_a_gradient_thrown_away():
    p, q = leaf(4), leaf(3)
    balancer, optimizer = make(p, q, beta=0.0, keep_rows=True), torch.optim.SGD([p, q], lr=0.1)
    balancer.attach(optimizer)
    balancer.backward(quadratics(p, q))
    wanted = torch.cat([p.grad, q.grad]).clone()
    for x in (p, q):
        x.grad.data = torch.zeros_like(x)
    balancer.backward(quadratics(p, q))
    assert balancer.step == 2
    close(torch.cat([p.grad, q.grad]).numpy(), wanted.numpy(), 1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda grad: grad.t_(),
        lambda grad: grad.as_strided_((2, 2), (0, 1)),
        lambda grad: grad.unsqueeze_(0),
        lambda grad: setattr(grad, "data", grad.data.t()),
        lambda grad: grad.zero_(),
    ],
)
@pytest.mark.parametrize("beta", [0.9, 0.0])
def test_another_shape_of_a_grad_is_not_that_of_the_next(change, beta):
    found = []
    for changes in (False, True):
        torch.manual_seed(0)
        p = torch.randn(2, 2).requires_grad_()
        balancer = dbk.DBMTL([p], 2, beta=beta)
        for step in range(3):
            p.grad = None
            balancer.backward([(p**2).sum() + 1, ((p - 3) ** 2).sum() + 1])
            found.append(p.grad.clone())
            if changes and step < 2:
                change(p.grad)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[:3], found[3:], strict=True))
