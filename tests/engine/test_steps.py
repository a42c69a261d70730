"""Tasks, steps, attachment, loss scales."""

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from problems import close, flat_grad, flat_gradients, leaf, make, quadratics


def test_attached_a_step_lasts_until_the_optimizer_steps():
    p = leaf(6)
    balancer = make(p, beta=0.5)
    optimizer = torch.optim.SGD([p], lr=0.01)
    handle = balancer.attach(optimizer)
    ema = np.zeros((2, 6))
    for _ in range(3):
        optimizer.zero_grad()
        total = np.zeros((2, 6))
        for micro in range(3):
            losses = [x * (1 + micro) for x in quadratics(p)]
            total += flat_gradients(losses, [p])
            balancer(losses).backward()
            so_far, after, _ = oracle.balance(total, ema, 0.5)
            close(p.grad.numpy(), so_far)
        ema = after
        optimizer.step()
    assert balancer.step == 3
    handle.remove()
    for _ in range(2):
        balancer(quadratics(p)).backward()
    assert balancer.step == 5


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("zero", [True, False])
def test_a_regulariser_beside_accumulated_backwards_stays(when, zero):
    p, q = leaf(6), leaf(40)
    balancer = make(p, q, beta=0.5)
    optimizer = torch.optim.SGD([p, q], lr=0.0)
    balancer.attach(optimizer)
    for step in range(1, 3):
        optimizer.zero_grad(set_to_none=zero)
        if when == "before":
            (3 * (p.square().sum() + q.sum())).backward()
        for micro in range(3):
            balancer(quadratics(p, q)).backward()
            if when == "between":
                (p.square().sum() + q.sum()).backward()
            assert balancer.step == step, micro
        losses = quadratics(p, q)
        rows = 3 * flat_gradients(losses, [p, q])
        ema = np.zeros((2, 46))
        for _ in range(step):
            expected, ema, _ = oracle.balance(rows, ema, 0.5)
        penalty = np.concatenate([6 * p.detach().numpy(), np.full(40, 3.0)])
        close(flat_grad([p, q]), expected + penalty)
        optimizer.step()


@pytest.mark.parametrize("extra_at", [0, 1, 2])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("zero", [True, False])
def test_what_is_added_once_stays_through_later_backwards(zero, first, extra_at):
    """The extra comes in one place only; two steps, so that .grad may be our own zeroed view at the start."""
    p, q = leaf(6), leaf(40)
    balancer = make(p, q, beta=0.5)
    optimizer = torch.optim.SGD([p, q], lr=0.0)
    balancer.attach(optimizer)
    ema = np.zeros((2, 46))
    for _ in range(2):
        optimizer.zero_grad(set_to_none=zero)
        for micro in range(4):
            if first and micro == extra_at:
                (p.sum() + 2 * q.sum()).backward()
            balancer(quadratics(p, q)).backward()
            if not first and micro == extra_at:
                (p.sum() + 2 * q.sum()).backward()
        expected, ema, _ = oracle.balance(4 * flat_gradients(quadratics(p, q), [p, q]), ema, 0.5)
        close(flat_grad([p, q]), expected + np.concatenate([np.ones(6), np.full(40, 2.0)]))
        optimizer.step()
    assert balancer.step == 2


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


def test_tasks_change_after_a_step_that_a_scaler_skipped():
    p = leaf(4)
    balancer = make(p)
    optimizer = torch.optim.SGD([p], lr=0.1)
    balancer.attach(optimizer)
    (balancer([x * float("inf") for x in quadratics(p)]) * 2.0).backward()
    with pytest.raises(RuntimeError, match="within a step"):
        balancer.add_task()
    optimizer.zero_grad()  # as a training loop does after the scaler skipped the step
    assert balancer.add_task() == 2
    balancer(quadratics(p, num_tasks=3)).backward()
    optimizer.step()
    assert balancer.step == 2


def test_the_logarithm_can_be_compiled_in_one_graph():
    compiled = torch.compile(lambda x: dbk.log_transform(x * 2), fullgraph=True, backend="aot_eager")
    x = torch.tensor(3.0, requires_grad=True)
    compiled(x).backward()
    close(x.grad.numpy(), 1 / 3.0, rtol=1e-6)
