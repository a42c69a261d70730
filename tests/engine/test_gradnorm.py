"""GradNorm against NumPy float64, written from Algorithm 1 of arXiv 1711.02257."""

import copy

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from problems import assert_same_state, close, flat_gradients, leaf, quadratics

K = 3


class Paper:
    """The weights of Algorithm 1: plain gradient descent on the weights, the targets held fixed."""

    def __init__(self, alpha, lr):
        self.alpha, self.lr = alpha, lr
        self.w, self.first = np.ones(K), {}

    def step(self, losses, norms, tasks):
        """The weights for this step; those for the next one are learnt."""
        w = self.w[tasks]
        for t, loss in zip(tasks, losses, strict=True):
            self.first.setdefault(t, loss)
        ratio = losses / np.array([self.first[t] for t in tasks])
        r = ratio / ratio.mean()
        weighted = w * norms
        target = weighted.mean() * r**self.alpha
        slope = np.where(weighted > target, 1.0, np.where(weighted < target, -1.0, 0.0)) * norms
        new = np.maximum(w - self.lr * slope, 1e-6)
        self.w[tasks] = new * w.sum() / new.sum()
        return w


def make(p, alpha=1.5, lr=0.01, **options):
    weighting = dbk.GradNorm(K, alpha, lr)
    return dbk.GradientBalancer([p], K, weighting=weighting, state_dtype=torch.float64, **options)


def losses_at(p, step):
    """Losses whose training rates differ."""
    return [loss * (1.0 + t * step / 10) for t, loss in enumerate(quadratics(p, num_tasks=K))]


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
def test_twenty_steps_as_in_the_paper(alpha):
    p = leaf(6)
    balancer, paper = make(p, alpha), Paper(alpha, 0.01)
    for step in range(20):
        p.grad = None
        losses = losses_at(p, step)
        tasks = [0, 2] if step in (3, 11) else [0, 1, 2]
        rows = flat_gradients(losses, [p], log=False)
        given = [losses[t] * float("nan") if (step, t) == (7, 1) else losses[t] for t in tasks]
        finite = [0, 2] if step == 7 else tasks
        values = np.array([losses[t].item() for t in finite])
        weights = paper.step(values, np.linalg.norm(rows[finite], axis=1), finite)
        balancer.backward(given, tasks=tasks)
        close(p.grad.numpy(), weights @ rows[finite])
        close(balancer.weighting.weights.numpy(), paper.w)
        assert paper.w.sum() == pytest.approx(K)
        with torch.no_grad():
            p -= 0.02 * p.grad
    assert np.abs(paper.w - 1.0).max() > 0.2  # something was learnt
    assert balancer.nonfinite_steps.tolist() == [0, 1, 0]


def train(p, balancer, steps, start=0):
    for step in range(start, start + steps):
        p.grad = None
        balancer.backward(losses_at(p, step))
        with torch.no_grad():
            p -= 0.02 * p.grad


def test_a_state_of_another_number_of_tasks_is_refused():
    balancer = make(leaf(6))
    state = copy.deepcopy(balancer.state_dict())
    state["weighting"]["weights"] = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\['weighting'\]\['weights'\]: of shape \(4,\)"):
        balancer.load_state_dict(state)


def test_accumulated_gradients_are_learnt_from_as_one():
    p = leaf(6)
    balancer, paper = make(p, lr=0.002), Paper(1.5, 0.002)
    optimizer = torch.optim.SGD([p], lr=0.0)
    balancer.attach(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        losses = losses_at(p, step)
        rows = 3 * flat_gradients(losses, [p], log=False)
        weights = paper.step(np.array([x.item() for x in losses]), np.linalg.norm(rows, axis=1), [0, 1, 2])
        for _ in range(3):
            balancer.backward(losses, retain_graph=True)
        close(p.grad.numpy(), weights @ rows)
        close(balancer.weighting.weights.numpy(), paper.w)
        optimizer.step()


@pytest.mark.parametrize("factors", [(0.0, 0.0, 0.0), (1.0, -1.0, -2.0)])
def test_rates_that_mean_nothing_teach_nothing(factors):
    p = leaf(6)
    balancer = make(p)
    train(p, balancer, 2)
    learnt = balancer.weighting.weights.clone()
    for _ in range(2):
        losses = [loss * f for loss, f in zip(quadratics(p, num_tasks=K), factors, strict=True)]
        balancer.backward(losses)
    assert torch.equal(balancer.weighting.weights, learnt)
    train(p, balancer, 1)
    assert torch.isfinite(p.grad).all()


def test_tasks_that_come_and_go_keep_what_was_learnt():
    p = leaf(6)
    balancer = make(p)
    train(p, balancer, 3)
    before, start = balancer.weighting.weights.clone(), balancer.weighting.start.clone()
    balancer.remove_task(0)
    close(balancer.weighting.weights.numpy(), (2.0 * before[1:] / before[1:].sum()).numpy())
    assert torch.equal(balancer.weighting.start, start[1:])
    assert balancer.add_task() == 2
    weights = balancer.weighting.weights.clone()
    assert weights.sum().item() == pytest.approx(3.0)
    losses = quadratics(p, num_tasks=4)[1:]
    rows = flat_gradients(losses, [p], log=False)
    p.grad = None
    balancer.backward(losses)
    close(p.grad.numpy(), weights.numpy() @ rows)
    assert torch.equal(balancer.weighting.start[:2], start[1:])
    assert balancer.weighting.start[2].item() == pytest.approx(losses[2].item())


def test_losses_are_needed():
    p = leaf(6)
    balancer = make(p)
    p.grad = torch.full_like(p, 7.0)
    losses = quadratics(p, num_tasks=K)
    for task in (0, 2):
        with balancer.task(task):
            losses[task].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"GradNorm needs the losses, and those of task\(s\) \[0, 2\]"):
        balancer.balance()
    assert p.grad.tolist() == [7.0] * 6
    p.grad = None
    balancer.attach(torch.optim.SGD([p], lr=0.1))
    balancer.backward(losses, retain_graph=True)
    with balancer.task(1):
        losses[1].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"those of task\(s\) \[1\]"):
        balancer.balance()


def test_a_first_loss_of_zero_is_not_where_a_task_started():
    weighting = dbk.GradNorm(3)
    gramian = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
    for losses in ([0.0, 1.0, 3.0], [2.0, 0.9, 2.9], [1.0, 0.8, 2.8]):
        weighting.begin(range(3), dict(enumerate(torch.tensor(losses))), False)
        weighting(gramian)
    assert weighting.start.tolist() == pytest.approx([2.0, 1.0, 3.0])
    assert weighting.weights.tolist() != [1.0] * 3


def test_a_run_resumed_in_the_middle_of_a_step_goes_on_bit_for_bit():
    p = leaf(6)
    balancer = make(p)
    train(p, balancer, 5)
    learnt = balancer.weighting.weights.clone()
    q = p.detach().clone().requires_grad_()
    other = make(q)
    optimizers = [torch.optim.SGD([x], lr=0.1) for x in (p, q)]
    for each, optimizer in zip((balancer, other), optimizers, strict=True):
        each.attach(optimizer)
    p.grad = None
    balancer.backward(losses_at(p, 5)[:2], tasks=[0, 1])
    q.grad = p.grad.clone()
    other.load_state_dict(copy.deepcopy(balancer.state_dict()))
    for each, x in ((balancer, p), (other, q)):
        each.backward(losses_at(x, 5)[1:], tasks=[1, 2])
    assert torch.equal(balancer.weights, other.weights)
    assert torch.equal(p.grad, q.grad)
    assert_same_state(balancer.state_dict(), other.state_dict())
    assert not torch.equal(learnt, balancer.weighting.weights)
