"""Tasks, steps, attachment, loss scales."""

import dbmtl_kernels as dbk
import pytest
import torch
from problems import close, leaf, quadratics


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
            losses[1] = losses[1] * float("inf")
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
