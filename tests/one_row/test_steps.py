"""Steps with one row, and what needs a row for each task: refused by name."""

import warnings

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from problems import close, flat_grad, flat_gradients, leaf, make, overflowing, quadratics, state_of
from torch import nn
from torch.utils.checkpoint import checkpoint


def one_row(*params, **options):
    return make(*params, beta=0.0, **options)


def sgd(balancer, *params):
    optimizer = torch.optim.SGD(params, lr=0.1)
    balancer.attach(optimizer)
    return optimizer


def expected_of(losses, params, scale="max"):
    rows = flat_gradients(losses, params)
    return oracle.balance(rows, np.zeros_like(rows), 0.0, 1e-8, scale)[0]


# --- refusals -----------------------------------------------------------------------------------------------------


def test_only_the_weighting_of_the_paper_without_an_average_takes_one_row():
    p = leaf(3)
    assert not state_of(dbk.DBMTL([p], 2, beta=0.0)).allocated
    for options in ({"beta": 0.5}, {"beta": 0.0, "keep_rows": True}, {}):
        assert state_of(dbk.DBMTL([p], 2, **options)).rows.shape[0] == 2
    assert state_of(dbk.GradientBalancer([p], 2, weighting=dbk.MaxNorm())).rows.shape[0] == 2
    one = dbk.GradientBalancer([p], 2, weighting=dbk.MaxNorm("mean", 1e-6), keep_rows=False)
    one(quadratics(p)).backward()
    rows = flat_gradients(quadratics(p), [p], log=False)
    close(p.grad.numpy(), oracle.balance(rows, np.zeros_like(rows), 0.0, 1e-6, "mean")[0])

    class Mine(dbk.MaxNorm):
        pass

    for weighting, beta in ((dbk.EqualWeights(), 0.0), (Mine(), 0.0), (dbk.MaxNorm(), 0.1)):
        with pytest.raises(ValueError, match=r"(beta=0.1|EqualWeights|Mine) needs a row for each task: keep_rows=True"):
            dbk.GradientBalancer([p], 2, weighting=weighting, beta=beta, keep_rows=False)
    with pytest.raises(ValueError, match=r"beta=0.5 needs a row for each task: .*keep_rows=True"):
        one.beta = 0.5
    assert one.beta == 0.0


@pytest.mark.parametrize("second", ["call", "task", "other tasks"])
def test_a_second_backward_in_a_step(second):
    p, q = leaf(4), leaf(3)
    balancer = one_row(p, q)
    optimizer = sgd(balancer, p, q)
    balancer(quadratics(p, q)).backward()
    before, grads = flat_grad([p, q]), [p.grad, q.grad]

    def again():
        if second == "task":
            with balancer.task(0):
                pass
        elif second == "call":
            balancer(quadratics(p, q)).backward()
        else:
            balancer(quadratics(p, q)[1:], tasks=[1]).backward()

    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"a second backward within a step needs a row for each task.*keep_rows=True"
        ):
            again()
        assert [p.grad, q.grad] == grads or all(a is b for a, b in zip([p.grad, q.grad], grads, strict=True))
        assert (flat_grad([p, q]) == before).all()
    assert balancer.step == 1
    optimizer.step()
    optimizer.zero_grad()
    balancer(quadratics(p, q)).backward()  # of the next step
    close(flat_grad([p, q]), expected_of(quadratics(p, q), [p, q]))
    optimizer.zero_grad()  # thrown away: the step is over
    balancer(quadratics(p, q)).backward()
    close(flat_grad([p, q]), expected_of(quadratics(p, q), [p, q]))
    assert balancer.step == 3


def test_tasks_after_a_balance_of_others_in_the_same_step():
    p = leaf(4)
    balancer = one_row(p, num_tasks=3)
    optimizer = sgd(balancer, p)
    with balancer.task(1):
        dbk.log_transform(quadratics(p)[1]).backward()
    balancer.balance()
    before = p.grad.clone()
    with pytest.raises(RuntimeError, match="keep_rows=True"), balancer.task(0):
        pass
    assert torch.equal(p.grad, before)
    optimizer.step()
    with balancer.task(0):
        pass


def test_the_gramian_and_what_is_made_of_it():
    p = leaf(4)
    balancer = one_row(p)
    balancer(quadratics(p)).backward()
    monitor = balancer.monitor()
    for read in (
        lambda: monitor.gramian, lambda: monitor.cosine, lambda: monitor.conflicts,
        lambda: monitor.as_dict(gramian=True), lambda: monitor.scalars(gramian=True), lambda: state_of(balancer).rows,
        lambda: state_of(balancer).row_of(0),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"needs a row for each task.*keep_rows=True"):
            read()
    kinds = ("norm", "weight", "nonfinite_steps", "loss")
    assert monitor.as_dict().keys() == {f"{x}/{t}" for x in kinds for t in range(2)} | {"step", "loss"}


def test_a_grad_of_an_earlier_step_that_is_kept_stays_till_the_balance():
    p = leaf(4)
    balancer = one_row(p)
    balancer(quadratics(p)).backward()
    earlier, p.grad = p.grad, None
    before, seen = earlier.clone(), []
    handle = p.register_hook(lambda grad: seen.append(earlier.clone()))
    balancer(quadratics(p)).backward()
    handle.remove()
    assert len(seen) == len(quadratics(p))
    assert all(torch.equal(one, before) for one in seen)
    close(p.grad.numpy(), expected_of(quadratics(p), [p]))


def test_a_grad_of_an_earlier_step_put_back_between_two_tasks_is_added_to():
    p = leaf(4)
    balancer = one_row(p)
    balancer(quadratics(p)).backward()
    earlier, p.grad = p.grad, None
    before = earlier.clone()
    for task, loss in enumerate(quadratics(p)):
        with balancer.task(task):
            dbk.log_transform(loss).backward()
        if task == 0:
            p.grad = earlier
    close(p.grad.numpy(), before.numpy() + expected_of(quadratics(p), [p]))


def test_what_shares_memory_with_a_grad_of_an_earlier_step_put_back_between_two_tasks():
    """It has the sum of the open step by now."""
    p = leaf(4)
    balancer = one_row(p)
    balancer(quadratics(p)).backward()
    earlier, p.grad = p.grad.detach(), None
    with balancer.task(0):
        dbk.log_transform(quadratics(p)[0]).backward()
    p.grad = earlier
    with pytest.raises(RuntimeError, match=r"clone what is to be kept.*keep_rows=True"), balancer.task(1):
        dbk.log_transform(quadratics(p)[1]).backward()
    p.grad = None
    balancer(quadratics(p)).backward()
    close(p.grad.numpy(), expected_of(quadratics(p), [p]))


def test_a_step_of_which_nothing_came_is_over():
    p = leaf(4)
    balancer = one_row(p)
    optimizer = torch.optim.SGD([p], lr=0.0)
    balancer.attach(optimizer)
    for number in range(3):
        optimizer.zero_grad()
        losses = [loss * (float("nan") if number == 0 else 1.0) for loss in quadratics(p)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no gradient from any task
            balancer(losses).backward()
        if number:
            close(p.grad.numpy(), expected_of(quadratics(p), [p]))
            optimizer.step()


# --- steps --------------------------------------------------------------------------------------------------------


def test_a_step_that_a_scaler_skips_is_over():
    p, head = leaf(4), leaf(1)
    balancer = one_row(p)
    optimizer = sgd(balancer, p, head)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for number in range(4):
        optimizer.zero_grad()
        losses = [loss + head.square().sum() for loss in quadratics(p)]
        expected = expected_of(quadratics(p), [p]) if number != 1 else None
        if number == 1:
            losses[0] = overflowing(losses[0])
        else:
            expected = expected_of(losses, [p])
        scaler.scale(balancer(losses)).backward()
        scaler.unscale_(optimizer)
        if number == 1:
            assert p.grad.isnan().all()
        else:
            close(p.grad.numpy(), expected)
        scaler.step(optimizer)
        scaler.update()
    assert balancer.step == 4
    assert balancer.nonfinite_steps.tolist() == [1, 0]


def test_lbfgs_calls_its_closure_often():
    def minimised(keep_rows):
        torch.manual_seed(0)
        p = leaf(6)
        balancer, optimizer = one_row(p, keep_rows=keep_rows), torch.optim.LBFGS([p], max_iter=4, lr=0.1)
        balancer.attach(optimizer)

        def closure():
            optimizer.zero_grad()
            losses = quadratics(p)
            balancer(losses).backward()
            return sum(torch.log(loss.detach()) for loss in losses)

        for _ in range(3):
            optimizer.step(closure)
        return p.detach().numpy()

    close(minimised(False), minimised(True))


@pytest.mark.parametrize("how", ["call", "task"])
def test_a_parameter_that_a_checkpoint_reaches_twice(how):
    first, shared = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
    x = torch.randn(4, 5, dtype=torch.float64).requires_grad_()

    def losses(reentrant):
        z = first(x)
        for _ in range(2):
            z = checkpoint(shared, z, use_reentrant=True) if reentrant else shared(z)
        return [(z - t).square().mean() + 1 for t in range(2)]

    params = [*first.parameters(), *shared.parameters()]
    balancer = one_row(*params)
    expected = expected_of(losses(False), params)
    if how == "call":
        balancer([losses(True)[0], losses(True)[1]]).backward()
    else:
        for task in range(2):
            with balancer.task(task):
                dbk.log_transform(losses(True)[task]).backward()
    close(flat_grad(params), expected)


def test_other_tasks_and_other_parameters():
    p, q, r = leaf(4), leaf(3), leaf(5)
    balancer = one_row(p, q)
    balancer(quadratics(p, q)).backward()
    assert balancer.add_task() == 2
    p.grad = q.grad = None
    balancer(quadratics(p, q, num_tasks=3)).backward()
    close(flat_grad([p, q]), expected_of(quadratics(p, q, num_tasks=3), [p, q]))
    balancer.remove_task(0)
    balancer.rebind([r, p])
    p.grad = None
    balancer(quadratics(r, p)).backward()
    close(flat_grad([r, p]), expected_of(quadratics(r, p), [r, p]))
    assert balancer.step == 3
