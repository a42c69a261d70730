"""Steps that are thrown away, not finite, saved in their middle; losses of half precision."""

import copy

import dbmtl_kernels as dbk
import oracle
import pytest
import torch
from problems import assert_same_state, close, flat_gradients, leaf, make, overflowing, quadratics, state_of


@pytest.mark.parametrize("zero", [True, False])
def test_a_thrown_away_step_followed_by_a_regulariser(zero):
    """The regulariser's fresh .grad must not pass for ours, nor lose our non-finite gradient's value."""
    p = leaf(6, dtype=torch.float32)
    balancer = dbk.DBMTL([p], 2, beta_sigma=0.0)
    optimizer = torch.optim.SGD([p], lr=1e-3)
    balancer.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=1000)
    moved = []
    for step in range(6):
        before = p.detach().clone()
        optimizer.zero_grad(set_to_none=zero)
        scaler.scale(p.square().sum()).backward()
        losses = quadratics(p)
        if step == 2:
            losses[1] = overflowing(losses[1])
        scaler.scale(balancer(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(p.detach(), before))
    assert moved == [True, True, False, True, True, True]
    assert scaler.get_scale() == 32768.0
    assert balancer.step == 6
    assert torch.isfinite(p).all()


def test_half_precision_losses():
    p = leaf(6, dtype=torch.float16)
    balancer = dbk.DBMTL([p], 2)
    loss = balancer([(p.float() * s).square().sum().half() + 1 for s in (1, 2)])
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(p.grad).all()
    assert p.grad.dtype == torch.float16
    zero = torch.zeros(4, dtype=torch.float16, requires_grad=True)
    dbk.DBMTL([zero], 2)([zero.square().sum() + 1, zero.square().sum() + 1]).backward()
    assert (zero.grad == 0).all()


def test_the_logarithm_can_be_compiled_in_one_graph():
    compiled = torch.compile(lambda x: dbk.log_transform(x * 2), fullgraph=True, backend="aot_eager")
    x = torch.tensor(3.0, requires_grad=True)
    compiled(x).backward()
    close(x.grad.numpy(), 1 / 3.0, rtol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), None])
def test_a_nonfinite_task_heals(poison):
    """By its loss (then its pass is not run), or by its gradient."""
    p = leaf(6)
    balancer = make(p, beta=0.5)
    balancer(quadratics(p)).backward()
    row = state_of(balancer).rows[0].clone()
    p.grad = None
    good, bad = quadratics(p)
    balancer([good, overflowing(bad) if poison is None else bad * poison]).backward()
    grads = flat_gradients(quadratics(p), [p])
    expected, _, _ = oracle.balance(grads[:1], row[None, :6].numpy(), 0.5)
    close(p.grad.numpy(), expected, rtol=1e-7)  # the oracle leaves a single task unscaled: eps is not in it
    assert balancer.nonfinite_steps.tolist() == [0, 1]
    assert balancer.weights[1] == 0
    assert not torch.isfinite(balancer.norms[1]) if poison is None else balancer.norms[1] == 0
    assert torch.isfinite(state_of(balancer).rows).all()
    p.grad = None
    balancer(quadratics(p)).backward()
    close(state_of(balancer).rows[1, :6].numpy(), 0.5 * flat_gradients(quadratics(p), [p])[1])
    assert torch.isfinite(p.grad).all()
    assert balancer.nonfinite_steps.tolist() == [0, 1]


def test_state_dict_in_the_middle_of_an_accumulated_step():
    def run(interrupt):
        torch.manual_seed(5)
        p = leaf(6)
        balancer = make(p, beta=0.5)
        optimizer = torch.optim.SGD([p], lr=0.1)
        balancer.attach(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            for micro in range(3):
                balancer([x * (1 + micro) for x in quadratics(p)]).backward()
                if interrupt and step == 1 and micro == 1:
                    state = copy.deepcopy(balancer.state_dict())
                    balancer = make(p, beta=0.5)
                    balancer.load_state_dict(state)
                    optimizer = torch.optim.SGD([p], lr=0.1)
                    balancer.attach(optimizer)
            optimizer.step()
        return p.detach(), balancer.state_dict()

    (p, state), (q, other) = run(False), run(True)
    assert torch.equal(p, q)
    assert_same_state(state, other)
