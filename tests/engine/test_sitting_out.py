"""Tasks that sit out: by their loss, by their gradient, or because it is zero; and what of them is nowhere."""

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from dbmtl_kernels.engine.losses import TaskLosses
from problems import EPS, assert_same_state, close, flat_gradients, leaf, make, overflowing, quadratics, state_of
from torch import nn

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["host", "device"])
def where(request, monkeypatch):
    """Whether a loss is finite is known on the host, or as on a GPU on the device alone."""
    if request.param == "device":
        monkeypatch.setattr(TaskLosses, "finite", lambda self: [None] * len(self.tasks))
    return request.param


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads = nn.Linear(8, 16).double(), nn.ModuleList(nn.Linear(16, 1) for _ in range(3)).double()
        self.both = nn.Parameter(torch.ones(16, dtype=torch.float64))  # of all tasks, and not shared

    def losses(self, x, poison=None, task=1):
        z = self.trunk(x)
        losses = [(head(z * self.both) - t).square().mean() + 0.1 for t, head in enumerate(self.heads)]
        if poison is not None:
            losses[task] = overflowing(losses[task]) if poison == "gradient" else losses[task] * poison
        return losses

    def grads(self):
        return {name: p.grad for name, p in self.named_parameters()}


def backward(net, balancer, losses, how, factor=1.0, tasks=(0, 1, 2)):
    if how == "call":
        (balancer([losses[t] for t in tasks], tasks=list(tasks)) * factor).backward()
        return
    for task in tasks:
        with balancer.task(task, loss_scale=factor):
            (dbk.log_transform(losses[task]) * factor).backward(retain_graph=True)
    if len(tasks) < 3:
        balancer.balance()


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("how", ["call", "task"])
@pytest.mark.parametrize("poison", [NAN, INF, "gradient"])
def test_a_task_that_sits_out_leaves_nothing_anywhere(poison, how, accumulated):
    """Every .grad is what it is without the task, heads that several tasks share included, bit for bit."""
    x, results = torch.randn(4, 8, dtype=torch.float64), []
    for bad in (True, False):
        net = Net()
        balancer = make(*net.trunk.parameters(), num_tasks=3, beta=0.5)
        backward(net, balancer, net.losses(x), how)
        if not accumulated:
            net.zero_grad()
        losses = net.losses(x, poison if bad else None)
        backward(net, balancer, losses, how, tasks=(0, 1, 2) if bad else (0, 2))
        results.append(net.grads())
        assert balancer.nonfinite_steps.tolist() == [0, int(bad), 0]
        assert torch.isfinite(state_of(balancer).rows).all()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    for name, grad in results[0].items():
        other = results[1][name]
        assert (grad is None) == (other is None), name
        assert grad is None or torch.equal(grad, other), name


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("poison", [NAN, INF, "gradient"])
def test_heads_are_cleared_wherever_the_verdict_is_known(poison, monkeypatch, where):
    """On a device heads get zeros, as nobody may ask there whether a loss was finite."""
    net, twin = Net(), Net()
    x = torch.randn(4, 8, dtype=torch.float64)
    balancer = make(*net.trunk.parameters(), num_tasks=3, beta=0.5)
    if where == "device":
        monkeypatch.setattr(balancer._engine.rows, "deferred", True)
    net.heads[1].weight.grad = torch.ones_like(net.heads[1].weight)
    balancer(net.losses(x, poison)).backward()
    other = make(*twin.trunk.parameters(), num_tasks=3, beta=0.5)
    losses = twin.losses(x)
    other([losses[0], None, losses[2]]).backward()
    assert (net.heads[1].weight.grad == 1).all()
    bias = net.heads[1].bias.grad
    assert bias is None if where == "host" else (bias == 0).all()
    close(net.both.grad.numpy(), twin.both.grad.numpy())
    close(net.trunk.weight.grad.numpy(), twin.trunk.weight.grad.numpy())
    assert balancer.nonfinite_steps.tolist() == [0, 1, 0]


def test_a_pass_whose_loss_is_not_finite_is_not_run():
    p, passes = leaf(4), []
    balancer = make(p, num_tasks=3)
    losses = quadratics(p, num_tasks=3)
    for task, loss in enumerate(losses):
        loss.register_hook(lambda _, task=task: passes.append(task))
    losses[2] = losses[2] * NAN
    balancer(losses).backward()
    assert passes == [0, 1]
    with balancer.task(1):
        value = dbk.log_transform(quadratics(p)[1] * NAN)
        value.backward()
    assert value.isnan()
    balancer.balance()


def test_a_task_comes_back_at_its_next_batch():
    net, x = Net(), torch.randn(4, 8, dtype=torch.float64)
    balancer = make(*net.trunk.parameters(), num_tasks=3, beta=0.5)
    for poison in (None, NAN, None):
        net.zero_grad()
        balancer(net.losses(x, poison)).backward()
    assert (balancer.weights > 0).all()
    assert net.heads[1].weight.grad is not None
    assert balancer.nonfinite_steps.tolist() == [0, 1, 0]


# --- whose NaN a GradScaler must see ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["call", "task"])
@pytest.mark.parametrize("weighting", [None, dbk.EqualWeights()])
@pytest.mark.parametrize("option", [None, "skip", "propagate"])
@pytest.mark.parametrize("factor", [0.25, 1.0, 1.0001, 65536.0])
@pytest.mark.parametrize("poison", [NAN, INF, "gradient"])
def test_by_cause_and_not_by_the_size_of_the_factor_alone(poison, factor, option, weighting, how):
    net, x = Net(), torch.randn(4, 8, dtype=torch.float64)
    options = {"beta": 0.5, "nonfinite": option, "state_dtype": torch.float64, "log_transform": True}
    kind = dbk.DBMTL if weighting is None else dbk.GradientBalancer
    if weighting is not None:
        options["weighting"] = weighting
    balancer = kind(net.trunk.parameters(), 3, **options)
    backward(net, balancer, net.losses(x, poison), how, factor)
    passed_on = poison == "gradient" and option != "skip" and (option == "propagate" or factor > 1)
    assert net.trunk.weight.grad.isnan().any() == passed_on
    head = net.heads[1].weight.grad
    assert head is None or not head.isfinite().all() if passed_on else head is None
    assert torch.isfinite(state_of(balancer).rows).all()
    assert balancer.nonfinite_steps.tolist() == [0, 1, 0]


def test_options_that_do_not_exist():
    for name, value in (("nonfinite", "ignore"), ("zero_gradients", True)):
        with pytest.raises(ValueError, match=f"{name} must be one of.*got {value!r}"):
            make(leaf(3), **{name: value})


# --- exactly zero -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["call", "task"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_zero_gradient_counts_as_absent(beta, how):
    """Bit for bit as with None, from the first step on, in all steps; said once, with the remedy."""
    results = []
    for kind in ("none", "zero"):
        torch.manual_seed(1)
        p, q = leaf(4), leaf(3)
        balancer = make(p, q, num_tasks=3, beta=beta)
        grads = []
        with pytest.warns(RuntimeWarning, match="task 1 is exactly zero.*Give None") if kind == "zero" else nothing():
            for step in range(6):
                p.grad = q.grad = None
                losses = quadratics(p, q, num_tasks=3)
                tasks = [0, 1, 2]
                if step % 3 != 2:
                    losses[1], tasks = (0.0 * losses[1] + 0.7, tasks) if kind == "zero" else (None, [0, 2])
                if how == "call":
                    balancer(losses).backward()
                else:
                    for task in tasks:
                        with balancer.task(task):
                            dbk.log_transform(losses[task]).backward()
                    if len(tasks) < 3:
                        balancer.balance()
                grads.append((p.grad.clone(), q.grad.clone()))
        results.append((grads, balancer))
    for (a, b), (c, d) in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    states = [each.state_dict() for _, each in results]
    for state in states:
        state["steps"].pop("losses"), state["steps"].pop("known")
    assert_same_state(*states)


def nothing():
    import contextlib

    return contextlib.nullcontext()


def test_the_letter_of_the_algorithm_on_request():
    p = leaf(4)
    balancer = make(p, beta=0.5, zero_gradients="count")
    ema = np.zeros((2, 4))
    for step in range(4):
        p.grad = None
        losses = quadratics(p)
        if step:
            losses[1] = 0.0 * losses[1] + 1.0
        expected, ema, _ = oracle.balance(flat_gradients(losses, [p]), ema, 0.5)
        balancer(losses).backward()
        close(p.grad.numpy(), expected)


def test_micro_batches_of_which_some_have_no_label():
    """The task takes part if any of them has."""
    p = leaf(4)
    balancer, twin = make(p, beta=0.5), make(p, beta=0.5)
    optimizer = torch.optim.SGD([p], lr=0.0)
    balancer.attach(optimizer)
    for pattern in ((0, 1), (1, 0), (0, 0), (1, 1)):
        p.grad = None
        for labelled in pattern:
            losses = quadratics(p)
            balancer([losses[0] / 2, losses[1] if labelled else 0.0 * losses[1] + 1.0]).backward()
        got = p.grad.clone()
        optimizer.step()
        rows = flat_gradients([quadratics(p)[0] / 2, quadratics(p)[1]], [p])
        losses = [2 * torch.from_numpy(rows[0]) @ p, sum(pattern) * (torch.from_numpy(rows[1]) @ p)]
        p.grad = None
        plain = [loss - loss.detach() + 1 - EPS for loss in losses]
        twin(plain if any(pattern) else [plain[0], None]).backward()
        close(got.numpy(), p.grad.numpy(), rtol=1e-7)


def test_a_zero_in_most_of_a_gradient_is_no_zero_gradient():
    p, q = leaf(100), leaf(3)
    balancer = make(p, q)
    losses = quadratics(p, q)
    losses[1] = (q[-1] - 4).square() + 1
    balancer(losses).backward()
    assert (balancer.weights > 0).all()
