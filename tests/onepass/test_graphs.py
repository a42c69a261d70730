"""Random graphs: operations with several outputs, in place, views, checkpoints; steps whose structure changes."""

import random
import warnings

import dbmtl_kernels as dbk
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Pair(torch.autograd.Function):
    """Two outputs, and inputs that are no tensors."""

    @staticmethod
    def forward(ctx, name, a, b, number):
        ctx.save_for_backward(a, b)
        return a * b, a + b

    @staticmethod
    def backward(ctx, first, second):
        a, b = ctx.saved_tensors
        return None, first * b + second, first * a + second, None


def in_place(a, c):
    y = a.clone()
    y[1].mul_(c[0])
    return [y]


def views(a, c):
    y = a * 1.0
    view = y.view(-1)
    y.add_(c)
    return [y, view.view(3, 3)]


OPERATIONS = [
    lambda a, c: [torch.tanh(a @ c)],
    lambda a, c: [a * c],
    lambda a, c: list(Pair.apply("", a, c, 2)),
    in_place,
    views,
    lambda a, c: [torch.stack([*a.unbind(1)], 0) + c],
    lambda a, c: [torch.cat([a[:1], c[1:]])],
    lambda a, c: [torch.sin(a)],
    lambda a, c: [checkpoint(lambda u, w: torch.tanh(u @ w) * u, a, c, use_reentrant=False)],
]


def matrix():
    return nn.Parameter(torch.randn(3, 3, dtype=torch.float64) * 0.5)


def losses_of(choice, shared, heads):
    """K losses, each of a few operations on what all share and on a head of its own; some contain another."""

    def grow(pool, others):
        return choice.choice(OPERATIONS)(choice.choice(pool), choice.choice(pool + others))

    pool = [p * 1.0 if choice.random() < 0.5 else p for p in shared] + [torch.randn(3, 3).double() + shared[0] * 0]
    for _ in range(choice.randint(1, 5)):
        pool += grow(pool, shared)
    losses = []
    for head in heads:
        mine = choice.sample(pool, 2)
        for _ in range(choice.randint(0, 3)):
            mine += grow(mine, [head, shared[0]])
        loss = sum(choice.choice([1.0, 3.0]) * (m - 1).square().mean() for m in mine[-2:]) + 0.1
        losses.append(loss + choice.choice(losses) if losses and choice.random() < 0.1 else loss)
    return losses


@pytest.mark.parametrize("seed", range(40))
def test_weights_meet_gradients(seed):
    choice = random.Random(seed)
    torch.manual_seed(seed)
    num_tasks = choice.randint(1, 4)
    shared, heads = [matrix() for _ in range(3)], [matrix() for _ in range(num_tasks)]
    balancer = dbk.OnePassDBMTL(shared, num_tasks, measure_every=1000)
    state, exact = choice.getstate(), False
    for _ in range(6):
        if choice.random() < 0.5:  # the same structure once more
            choice.setstate(state)
        state = choice.getstate()
        losses = losses_of(choice, shared, heads)
        present = [task for task in range(num_tasks) if choice.random() < 0.85] or [0]
        grads = [
            torch.autograd.grad((loss + 1e-8).log(), shared + heads, retain_graph=True, allow_unused=True)
            for loss in losses
        ]
        for p in shared + heads:
            p.grad = None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            balancer([loss if task in present else None for task, loss in enumerate(losses)]).backward()
        exact = exact or any("The exact form takes such steps" in str(one.message) for one in said)
        for index, p in enumerate(shared + heads):
            expected = torch.zeros_like(p)
            for task in present:
                if grads[task][index] is not None:
                    expected += grads[task][index] * (balancer.weights[task] if index < 3 else 1.0)
            found = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found, expected.detach(), rtol=1e-6 if exact else 1e-10, atol=1e-12)
