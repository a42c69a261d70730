"""Optimizers: attached, several, with closures, stepping at the wrong time; and who reads .grad before they do."""

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from problems import close, flat_grad, flat_gradients, leaf, make, overflowing, quadratics, state_of
from torch import nn


def sgd(*params, lr=0.1):
    return torch.optim.SGD(params, lr=lr)


def enter(balancer, task, loss, factor=1.0):
    with balancer.task(task, loss_scale=factor):
        (dbk.log_transform(loss) * factor).backward()


def all_tasks(balancer, *params, factor=1.0):
    for task in range(balancer.num_tasks):
        enter(balancer, task, quadratics(*params, num_tasks=balancer.num_tasks)[task], factor)


def expected(*params, num_tasks=2, **options):
    """The gradient of a first step."""
    twins = [p.detach().clone().requires_grad_() for p in params]
    make(*twins, num_tasks=num_tasks, **options)(quadratics(*twins, num_tasks=num_tasks)).backward()
    return flat_grad(twins)


# --- tasks that wait -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_the_last_of_all_tasks_brings_the_gradient(attached, factor):
    """Clippers, loggers and GradScalers that come next see it; balance() has nothing left to do."""
    p, q = leaf(4), leaf(3)
    balancer, optimizer = make(p, q, num_tasks=3), sgd(p, q)
    if attached:
        balancer.attach(optimizer)
    want = expected(p, q, num_tasks=3)
    all_tasks(balancer, p, q, factor=factor)
    close(flat_grad([p, q]), factor * want)
    balancer.balance()
    close(flat_grad([p, q]), factor * want)
    with pytest.raises(RuntimeError, match="nothing to balance"):
        balancer.balance()
    assert balancer.step == 1
    optimizer.step()


@pytest.mark.parametrize("how", ["attached", "not attached", "attached to another", "closure"])
def test_an_optimizer_that_steps_while_tasks_wait_is_refused(how):
    p, q = leaf(4), leaf(3)
    balancer, first, second = make(p, q), sgd(p, q), sgd(q)
    if how != "not attached":
        balancer.attach(first)
    before = [p.detach().clone(), q.detach().clone()]
    if how == "closure":
        with pytest.raises(RuntimeError, match=r"the end of SGD.step\(\) while task\(s\) \[1\] of 2 wait.*balance\(\)"):
            first.step(lambda: enter(balancer, 1, quadratics(p, q)[1]))
        before = [p.detach().clone(), q.detach().clone()]
    else:
        enter(balancer, 1, quadratics(p, q)[1])
    stepping = second if how == "attached to another" else first
    with pytest.raises(RuntimeError, match=r"SGD.step\(\) while task\(s\) \[1\] of 2 wait.*balance\(\)"):
        stepping.step()
    assert all(map(torch.equal, before, (p, q)))
    sgd(leaf(2)).step()  # somebody else's
    balancer.balance()
    stepping.step()
    assert not torch.equal(before[1], q)


def test_tasks_that_wait_are_not_thrown_away_by_detaching():
    p = leaf(4)
    balancer, optimizer = make(p), sgd(p)
    handle = balancer.attach(optimizer)
    enter(balancer, 0, quadratics(p)[0])
    for detach in (balancer.detach, handle.remove):
        with pytest.raises(RuntimeError, match=r"detach\(\) while task\(s\) \[0\]"):
            detach()
    balancer.detach(discard=True)

    def fail():
        with balancer.attach(optimizer):
            enter(balancer, 0, quadratics(p)[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # the error that counts is the user's
        fail()
    assert not balancer._engine.attached


@pytest.mark.parametrize("task", [None, 0])
def test_no_optimizer_steps_inside_a_pass_or_a_task(task):
    p = leaf(4)
    balancer, optimizer = make(p), sgd(p)
    before = p.detach().clone()

    def run():
        if task is None:
            losses = quadratics(p)
            losses[1].register_hook(lambda _: optimizer.step())
            balancer(losses).backward()
        else:
            with balancer.task(task):
                optimizer.step()

    with pytest.raises(RuntimeError, match=r"SGD.step\(\) (within the backward pass|inside the context of task\(0\))"):
        run()
    assert torch.equal(p, before)
    assert balancer.step == 0


# --- several, none of them, another ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_optimizers_that_hold_a_part_each(order):
    p, q, heads = leaf(4), leaf(3), leaf(2)
    balancer, optimizers = make(p, q, beta=0.5), [sgd(p), sgd(q, heads)]
    balancer.attach(*optimizers)
    twins = [p.detach().clone().requires_grad_(), q.detach().clone().requires_grad_()]
    twin, one = make(*twins, beta=0.5), sgd(*twins)
    twin.attach(one)
    for _ in range(3):
        for each, params, steps in ((balancer, (p, q), [optimizers[i] for i in order]), (twin, twins, [one])):
            for optimizer in steps:
                optimizer.zero_grad()
            for _ in range(2):
                (each(quadratics(*params)) / 2).backward()
            for optimizer in steps:
                optimizer.step()
    assert torch.equal(p, twins[0])
    assert torch.equal(q, twins[1])
    assert balancer.step == twin.step == 3


def test_parameters_that_no_attached_optimizer_holds_are_named():
    trunk = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    balancer = dbk.DBMTL(trunk, 2)
    with pytest.warns(
        UserWarning, match=r"no attached optimizer holds.*\('1.weight'\).*\('1.bias'\).*attach\(first, sec"
    ):
        balancer.attach(torch.optim.SGD(trunk[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="one optimizer or several, got none"):
        dbk.DBMTL(trunk, 2).attach()
    with pytest.raises(ValueError, match="Adam holds none"):
        dbk.DBMTL(trunk, 2).attach(sgd(*trunk.parameters()), torch.optim.Adam([leaf(2)]))


def test_a_second_balancer_of_the_same_parameters_is_said():
    p, q = leaf(4), leaf(3)
    optimizer = sgd(p, q)
    first, other, second = make(p, q), make(q), make(p, q)
    first.attach(optimizer)
    with pytest.warns(UserWarning, match=r"another balancer of the same parameters.*SGD.*detach\(\) on the old one"):
        second.attach(optimizer)
    second.detach()
    first.detach()
    make(leaf(4))
    other.attach(optimizer)  # alone now


def test_an_optimizer_that_is_gone_is_no_longer_attached():
    p = leaf(4)
    balancer, optimizer = make(p), sgd(p)
    balancer.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"already attached.*detach\(\)"):
        balancer.attach(sgd(p))
    del optimizer
    balancer(quadratics(p)).backward()
    balancer(quadratics(p)).backward()
    assert balancer.step == 2
    balancer.attach(sgd(p))


# --- closures ------------------------------------------------------------------------------------------------------


class Twice(torch.optim.SGD):
    """Looks at a second point in each step, as SAM and LBFGS do."""

    def step(self, closure):
        params = self.param_groups[0]["params"]
        closure()
        start = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.add_(p.grad, alpha=0.01)
        self.point = [p.detach().clone() for p in params]
        closure()
        with torch.no_grad():
            for p, before in zip(params, start, strict=True):
                p.copy_(before)
        return super().step()


def evaluation(balancer, optimizer, form, *params, micro=1):
    def closure():
        optimizer.zero_grad()
        for _ in range(micro):
            if form == "task":
                all_tasks(balancer, *params)
            else:
                (balancer(quadratics(*params)) / micro).backward()

    return closure


def weighted(balancer, point, losses=quadratics):
    """The gradients of the losses' logs, each with the length that its task had in the last step."""
    point = [x.clone().requires_grad_() for x in point]
    grads = flat_gradients(losses(*point), point)
    return (balancer.weights * balancer.norms).numpy() / np.linalg.norm(grads, axis=1) @ grads


@pytest.mark.parametrize(("form", "micro"), [("call", 1), ("call", 2), ("task", 1)])
def test_the_second_call_of_a_closure_is_no_update(form, micro):
    p, q = leaf(4), leaf(3)
    optimizer = Twice([p, q], lr=0.1)
    balancer, twin = make(p, q, beta=0.5), make(p, q, beta=0.5)
    balancer.attach(optimizer)
    for _ in range(3):
        twin(quadratics(p, q)).backward()
        optimizer.step(evaluation(balancer, optimizer, form, p, q, micro=micro))
        close(state_of(balancer).rows.numpy(), micro * state_of(twin).rows.numpy())
        close(flat_grad([p, q]), weighted(balancer, optimizer.point))
    assert balancer.step == 3


def test_a_closure_whose_first_call_fed_nothing_is_an_update_at_its_second():
    p = leaf(4)

    class Calls(torch.optim.SGD):
        def step(self, closure):
            closure()
            closure()
            return super().step()

    optimizer, balancer, factors = Calls([p], lr=0.0), make(p, beta=0.5), [0.0, 1.0]
    balancer.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        factor = factors.pop(0)  # of the first call all gradients are zero: the tasks count as absent
        balancer([loss * factor + 1.0 - factor for loss in quadratics(p)]).backward()

    with pytest.warns(RuntimeWarning, match="zero"):
        optimizer.step(closure)
    close(flat_grad([p]), expected(p, beta=0.5))


def test_every_call_of_a_closure_is_an_update_if_asked_for():
    p, q = leaf(4), leaf(3)
    optimizer = Twice([p, q], lr=0.1)
    balancer = make(p, q, beta=0.5)
    balancer.attach(optimizer, closures_update=True)
    for _ in range(3):
        optimizer.step(evaluation(balancer, optimizer, "call", p, q))
    assert balancer.step == 6


def test_lbfgs_takes_one_update_a_step():
    p, q = leaf(4), leaf(3)
    balancer = make(p, q, beta=0.5)
    optimizer = torch.optim.LBFGS([p, q], lr=0.05, max_iter=5)
    balancer.attach(optimizer)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = balancer(quadratics(p, q))
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    for _ in range(4):
        optimizer.step(closure)
    same = make(p, q, beta=0.9)  # at the same point the second gradient of a first step is the first one
    p.grad = q.grad = None
    same(quadratics(p, q)).backward()
    first, p.grad, q.grad = flat_grad([p, q]), None, None
    with same.no_update():
        same(quadratics(p, q)).backward()
    close(flat_grad([p, q]), first, rtol=1e-7)
    assert len(calls) > 12
    assert balancer.step == 4
    assert calls[-1] < calls[0]


def test_sam_by_hand():
    """Two gradients a step; the second in no_update()."""
    p, head = leaf(4), leaf(4)
    balancer, optimizer = make(p, beta=0.5), sgd(p, head)
    twin = make(p, beta=0.5)
    for _ in range(3):
        p.grad = None
        twin(quadratics(p)).backward()
        optimizer.zero_grad()
        balancer(quadratics(p)).backward()
        norms, rows = balancer.norms, state_of(balancer).rows.clone()
        with torch.no_grad():
            p.add_(p.grad, alpha=0.01)
        optimizer.zero_grad()
        mine = p.grad = torch.ones_like(p)
        with balancer.no_update():
            balancer([loss + (p * head).sum().square() for loss in quadratics(p)], tasks=[0, 1]).backward()
        assert p.grad is mine
        losses = [loss + (p * head).sum().square() for loss in quadratics(p)]
        with_head = lambda p: [loss + (p * head).sum().square() for loss in quadratics(p)]  # noqa: E731
        close(p.grad.numpy() - 1, weighted(balancer, [p.detach()], with_head))
        close(head.grad.numpy(), flat_gradients(losses, [head]).sum(0))
        assert torch.equal(state_of(balancer).rows, rows)
        assert torch.equal(balancer.norms, norms)
        assert torch.equal(rows, state_of(twin).rows)
    assert balancer.step == 3
    fresh = make(p)
    with fresh.no_update(), pytest.raises(RuntimeError, match="needs the weights of a step before it"):
        fresh(quadratics(p)).backward()


def test_an_evaluation_in_which_a_task_is_not_finite():
    p = leaf(4)
    balancer = make(p, num_tasks=3, beta=0.5)
    balancer(quadratics(p, num_tasks=3)).backward()
    p.grad, counts = None, balancer.nonfinite_steps
    losses = quadratics(p, num_tasks=3)
    with balancer.no_update():
        balancer([losses[0], losses[1] * torch.nan, overflowing(losses[2])]).backward()
    grad = flat_gradients(quadratics(p)[:1], [p])[0]
    close(p.grad.numpy(), float(balancer.weights[0] * balancer.norms[0]) * grad / np.linalg.norm(grad))
    assert torch.equal(balancer.nonfinite_steps, counts)


def test_a_skipped_step_before_a_closure_is_not_taken_for_its_first_call():
    p = leaf(4)
    optimizer = sgd(p)
    balancer = make(p)
    balancer.attach(optimizer)
    balancer(quadratics(p)).backward()
    optimizer.zero_grad()  # no step follows
    optimizer.step(evaluation(balancer, optimizer, "call", p))
    assert balancer.step == 2
