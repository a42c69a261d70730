"""What an interrupt leaves when gradients were fed, and norms and weights computed."""

import warnings
from contextlib import contextmanager

import dbmtl_kernels as dbk
import pytest
import torch
from problems import close, leaf, make, overflowing, quadratics, rows_of


@contextmanager
def interrupted_when_computed(balancer):
    """Ctrl-C when the kernel has computed norms, weights and the balanced gradient, which .grad has not got yet."""
    balanced = balancer._engine.parts.balanced
    compute = balanced.compute

    def interrupt(*args):
        balanced.compute = compute
        compute(*args)
        raise KeyboardInterrupt

    balanced.compute = interrupt
    with pytest.raises(KeyboardInterrupt):
        yield


def test_an_interrupt_where_views_are_first_made(monkeypatch):
    p = leaf(3)
    balancer = make(p)
    with monkeypatch.context() as patched:
        patched.setattr(balancer._engine.rows, "views", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            balancer.backward(quadratics(p))
    balancer.backward(quadratics(p))
    assert p.grad is not None


@pytest.mark.parametrize("how", ["backward", "balance"])
def test_an_overflow_is_counted_once_and_passed_on_by_the_step_that_is_made_again(how):
    p = leaf(3)
    balancer = make(p, num_tasks=3)
    losses = [quadratics(p)[0], overflowing(quadratics(p)[1])]

    def step():
        if how == "backward":
            return (balancer(losses, tasks=[0, 1], retain_graph=True) * 1024).backward()
        return balancer.balance()

    if how == "balance":
        for task, loss in enumerate(losses):
            with balancer.task(task, loss_scale=1024.0):
                (dbk.log_transform(loss) * 1024).backward()
    with interrupted_when_computed(balancer):
        step()
    assert p.grad is None
    assert balancer.nonfinite_steps.tolist() == [0, 0, 0]
    assert balancer.weights.tolist() == [0.0, 0.0, 0.0]
    step()
    assert p.grad.isnan().all()
    assert balancer.nonfinite_steps.tolist() == [0, 1, 0]


def test_who_would_have_sat_out_of_a_micro_batch_is_forgotten_with_it():
    p = leaf(4)
    balancer, optimizer = make(p, num_tasks=3), torch.optim.SGD([p], lr=0.1)
    balancer.attach(optimizer)
    balancer.backward(quadratics(p, num_tasks=3))
    rows = rows_of(balancer)
    losses = quadratics(p, num_tasks=3)
    with pytest.warns(RuntimeWarning, match=r"\[0\]: these begin"), interrupted_when_computed(balancer):
        balancer.backward([losses[0], losses[1] * float("nan")], tasks=[0, 1])
    rows[0] = 0.0
    close(rows_of(balancer), rows)
    assert balancer.nonfinite_steps.tolist() == [0, 0, 0]


def test_sums_are_those_of_rows_that_a_balance_has_cleared_before_it_was_interrupted():
    """The row of a task that was not finite earlier in the step: found by tests/engine/test_fuzz.py."""
    p = leaf(3)
    balancer, optimizer = make(p, num_tasks=3), torch.optim.SGD([p], lr=0.1)
    balancer.attach(optimizer)
    losses = quadratics(p, num_tasks=3)
    balancer.backward([losses[0], overflowing(losses[1])], tasks=[0, 1], retain_graph=True)
    with balancer.task(1):
        dbk.log_transform(losses[1]).backward()
    with interrupted_when_computed(balancer):
        balancer.balance()
    stats = balancer._engine.rows.stats
    close(stats.sumsq, (rows_of(balancer) ** 2).sum(1))
    assert stats.sumsq[1] == 0
    balancer.balance()
    assert balancer.nonfinite_steps.tolist() == [0, 1, 0]


@pytest.mark.parametrize("frozen", [False, True])
def test_what_others_added_to_the_flat_tensor_is_kept_or_named(frozen):
    """Interrupted where it was added to: nobody knows what is there. Of a frozen parameter it was a copy that was."""
    p, q = leaf(2), leaf(2)
    balancer, optimizer = make(p, q, num_tasks=3), torch.optim.SGD([p, q], lr=0.1)
    balancer.attach(optimizer)
    balancer.backward(quadratics(p, q, num_tasks=3))
    p.sum().backward()
    before = p.grad.clone()
    p.requires_grad_(not frozen)
    with warnings.catch_warnings(record=True) as said, interrupted_when_computed(balancer):
        warnings.simplefilter("always")
        balancer.backward(quadratics(p, q, num_tasks=3)[:2], tasks=[0, 1])
    lost = [str(one.message) for one in said if "an interrupt came when the .grad of" in str(one.message)]
    if frozen:
        assert torch.equal(p.grad, before)
        assert not any("parameter 0" in message for message in lost)
    else:
        close(p.grad.numpy(), rows_of(balancer)[2][:2], 1e-6)  # balanced again, of the task that is left
        assert "parameter 0" in lost[0]


def test_the_last_task_interrupted_when_all_was_computed_is_balanced(monkeypatch):
    p = leaf(3)
    balancer = make(p, num_tasks=1)
    grads = balancer._engine.grads
    put = grads.put_grads

    def interrupt():
        monkeypatch.setattr(grads, "put_grads", put)
        raise KeyboardInterrupt

    monkeypatch.setattr(grads, "put_grads", interrupt)
    with pytest.raises(KeyboardInterrupt), balancer.task(0):
        dbk.log_transform(quadratics(p)[0]).backward()
    assert p.grad is not None
    balancer.balance()  # done already, by the last task


def test_heads_of_losses_in_one_tensor_are_restored_whatever_came_before():
    """In a step that does not search the graph to its ends, after steps whose losses had a head in common."""
    p, common, *heads = (leaf(2) for _ in range(4))
    balancer = make(p)

    def losses():
        return [((p * h).sum() + common.sum()).square() for h in heads]

    for _ in range(4):
        balancer.backward(losses())
    for x in (p, common, *heads):
        x.grad = None
    both = losses()
    passes = iter([None, ZeroDivisionError])
    p.register_hook(lambda _: (_ for _ in ()).throw(error) if (error := next(passes)) else None)
    with pytest.warns(RuntimeWarning, match="begin anew"), pytest.raises(ZeroDivisionError):
        balancer.backward(torch.stack(both))
    assert all(x.grad is None for x in (p, common, *heads))
