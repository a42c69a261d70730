"""What needs a row for each task is refused by name; checkpoints; failures and interrupts in the middle of a step."""

import copy
import io
import os
import pickle
import re
import warnings

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from lines import Interrupt
from problems import assert_same_state, close, flat_grad, flat_gradients, leaf, make, overflowing, quadratics, state_of
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
        one.set_beta(0.5, 0.0)
    assert one.beta == 0.0
    one.set_beta(0.0, 0.5)


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
    assert monitor.as_dict().keys() == {f"{x}/{t}" for x in ("norm", "weight", "nonfinite_steps") for t in range(2)} | {
        "step"
    }


def test_a_grad_of_an_earlier_step_put_back_between_two_tasks():
    """Its memory has the sum of the open step by now."""
    p = leaf(4)
    balancer = one_row(p)
    balancer(quadratics(p)).backward()
    earlier, p.grad = p.grad, None
    with balancer.task(0):
        dbk.log_transform(quadratics(p)[0]).backward()
    p.grad = earlier
    with pytest.raises(RuntimeError, match=r"clone what is to be kept.*keep_rows=True"), balancer.task(1):
        dbk.log_transform(quadratics(p)[1]).backward()
    p.grad = None
    balancer(quadratics(p)).backward()
    close(p.grad.numpy(), expected_of(quadratics(p), [p]))


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


# --- failures and interrupts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("before", [None, 1.0])
def test_a_pass_that_fails_leaves_nothing_and_may_be_made_again(failing, before):
    p = leaf(5)
    balancer = one_row(p, num_tasks=3)
    p.grad = mine = None if before is None else torch.full_like(p, before)
    losses = quadratics(p, num_tasks=3)
    losses[failing].register_hook(lambda _: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost, nothing is said
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                balancer(losses, retain_graph=True).backward()
            assert p.grad is mine
    balancer(quadratics(p, num_tasks=3)).backward()
    close(p.grad.numpy(), expected_of(quadratics(p, num_tasks=3), [p]) + (before or 0.0))
    assert balancer.step == 1


def test_a_task_that_fails_costs_the_others_nothing():
    p = leaf(5)
    balancer = one_row(p, num_tasks=3)
    losses = quadratics(p, num_tasks=3)

    def body(task, fail=False):
        with balancer.task(task):
            dbk.log_transform(losses[task]).backward(retain_graph=True)
            assert not fail

    body(0)
    with pytest.raises(AssertionError):
        body(1, fail=True)
    for task in (1, 2):
        body(task)
    close(p.grad.numpy(), expected_of(losses, [p]))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["call", "task"])
@pytest.mark.parametrize("before", ["nothing", "regulariser"])
def test_an_interrupt_at_every_line(how, before):
    """Nothing or the whole; what of tasks that waited is lost is named. Then the step is made again, or ended."""

    def fresh():
        torch.manual_seed(2)
        p, q = leaf(4), leaf(3)
        balancer = one_row(p, q, num_tasks=3)
        balancer(losses(p, q)).backward()
        p.grad = q.grad = None
        if before == "regulariser":
            (p.sum() * 3).backward()
        return p, q, balancer

    def losses(p, q):
        return quadratics(p, q, num_tasks=3)

    def step(p, q, balancer, tasks=range(3)):
        if how == "call":
            balancer(losses(p, q)).backward()
            return
        for task in tasks:
            with balancer.task(task):
                dbk.log_transform(losses(p, q)[task]).backward()

    def there(p):
        return np.zeros(p.numel()) if p.grad is None else p.grad.numpy().copy()

    p, q, balancer = fresh()
    was = np.concatenate([there(p), there(q)])
    with Interrupt() as lines:
        step(p, q, balancer)
    whole = np.concatenate([there(p), there(q)])
    close(whole - was, expected_of(losses(p, q), [p, q]))
    outcomes = set()
    for line in range(1, lines.count + 1, 1 if os.environ.get("CI") else 5):
        p, q, balancer = fresh()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with pytest.raises(KeyboardInterrupt), Interrupt(line) as at:
                step(p, q, balancer)
        lost = [int(t) for w in said if "begin anew" in str(w.message) for t in re.findall(r"\d", str(w.message))]
        waiting = balancer._engine.steps.pending
        assert not waiting & set(lost), at.where
        now = np.concatenate([there(p), there(q)])
        done = not waiting and not lost and np.allclose(now, whole, rtol=1e-9)
        outcomes.add("done" if done else "lost" if lost else "waits" if waiting else "nothing")
        if done:
            continue
        close(now, was)
        if len(waiting) == 3:
            balancer.balance()
        else:
            step(p, q, balancer, [t for t in range(3) if t not in waiting])
        close(np.concatenate([there(p), there(q)]), whole)
        assert balancer.step == 2, at.where
    assert outcomes == ({"done", "nothing"} if how == "call" else {"done", "nothing", "waits", "lost"})


# --- checkpoints --------------------------------------------------------------------------------------------------


def trained(balancer, p, steps):
    optimizer = sgd(balancer, p)
    for _ in range(steps):
        optimizer.zero_grad()
        balancer(quadratics(p, num_tasks=3)).backward()
        optimizer.step()
    balancer.detach()


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_resumed_run_has_the_same_bits(how):
    p = leaf(6)
    q = p.detach().clone().requires_grad_()
    straight, first = one_row(p, num_tasks=3), one_row(q, num_tasks=3)
    trained(straight, p, 6)
    trained(first, q, 3)
    if how == "pickle":
        first, q = pickle.loads(pickle.dumps((first, q)))
    elif how == "deepcopy":
        state = first.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # there is no average that the copy would lack
            first, q = copy.deepcopy((first, q))
            twin, its = copy.deepcopy((first, q))
            trained(twin, its, 1)
        first.load_state_dict(state)
    else:
        torch.save(first.state_dict(), file := io.BytesIO())
        first = one_row(q, num_tasks=3)
        first.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    trained(first, q, 3)
    assert torch.equal(p, q)
    assert_same_state(straight.state_dict(), first.state_dict())
    assert straight.step == 6
    assert straight.state_dict()["buffer"]["rows"] == {}


def test_a_state_with_rows_is_taken_and_one_without_is_not():
    p = leaf(4)
    one, rows, average = one_row(p), one_row(p, keep_rows=True), make(p, beta=0.5)
    for balancer in (one, rows, average):
        balancer(quadratics(p)).backward()
        p.grad = None
    for state in (rows.state_dict(), average.state_dict()):
        one.load_state_dict(state)
        assert torch.equal(one.norms, state["buffer"]["norms"])
        balancer = one
        balancer(quadratics(p)).backward()
        close(p.grad.numpy(), expected_of(quadratics(p), [p]))
        p.grad = None
    for other in (rows, average):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=r"state_dict lacks buffer.rows.0 .*one row for all tasks.*keep_rows=True"):
            other.load_state_dict(one.state_dict())
        assert_same_state(before, other.state_dict())


def test_states_of_tasks_that_wait():
    p = leaf(4)
    one, rows = one_row(p), one_row(p, keep_rows=True)
    for balancer in (one, rows):
        with balancer.task(1):
            dbk.log_transform(quadratics(p)[1]).backward()
    for call in (one.state_dict, lambda: pickle.dumps((one, p))):
        with pytest.raises(RuntimeError, match=r"state_dict while task\(s\) \[1\] wait needs a row.*keep_rows=True"):
            call()
    with pytest.raises(ValueError, match=r"a state in which task\(s\) \[1\] wait for a balance.*keep_rows=True"):
        one.load_state_dict(rows.state_dict())
    with one.task(0):
        dbk.log_transform(quadratics(p)[0]).backward()
    close(p.grad.numpy(), expected_of(quadratics(p), [p]))
    one.state_dict()


def test_a_state_within_a_step_goes_on_with_grad():
    p = leaf(4)
    balancer = one_row(p)
    former = sgd(balancer, p)
    balancer(quadratics(p)).backward()
    state, before = copy.deepcopy(balancer.state_dict()), p.grad.clone()
    balancer.detach()
    del former
    other = one_row(p)
    optimizer = sgd(other, p)
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="keep_rows=True"):
        other(quadratics(p)).backward()
    assert torch.equal(p.grad, before)
    optimizer.step()
    optimizer.zero_grad()
    other(quadratics(p)).backward()
    close(p.grad.numpy(), expected_of(quadratics(p), [p]))
