"""A whole training step under torch.compile, and backward passes under compiled autograd: as without."""

import dbmtl_kernels as dbk
import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo import compiled_autograd


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads = nn.Linear(4, 5), nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
        self.x = torch.randn(8, 4)

    def losses(self):
        return [(head(self.trunk(self.x)) - i).square().mean() for i, head in enumerate(self.heads)]


def called(model, balancer):
    balancer(model.losses()).backward()


def scaled(model, balancer):
    (balancer(model.losses()) * 0.5).backward()


def named(model, balancer):
    balancer.backward(model.losses())


def by_task(model, balancer):
    for task, loss in enumerate(model.losses()):
        with balancer.task(task):
            dbk.log_transform(loss).backward()


def some_tasks(model, balancer):
    with balancer.task(1):
        dbk.log_transform(model.losses()[1]).backward()
    balancer.balance()


def asked(model, balancer):
    parameters = [*model.trunk.parameters()]
    for p, grad in zip(parameters, torch.autograd.grad(balancer(model.losses()), parameters), strict=True):
        p.grad = grad


KINDS = {
    "rows": dbk.DBMTL,
    "one row": lambda p, k: dbk.DBMTL(p, k, beta=0.0),
    "Gramian": lambda p, k: dbk.GradientBalancer(p, k, weighting=dbk.EqualWeights(), log_transform=True),
    "one pass": dbk.OnePassDBMTL,
}


def trained(kind, way, steps=2, around=lambda step: step):
    model = Model()
    balancer = KINDS[kind](model.trunk.parameters(), 3)

    def step():
        way(model, balancer)

    step = around(step)
    for _ in range(steps):
        model.zero_grad()
        step()
    assert balancer.step == steps
    return [p.grad for p in model.trunk.parameters()]


def compiled(step):
    return torch.compile(step, backend="eager")


def under_compiled_autograd(step):
    def run():
        with compiled_autograd._enable(torch.compile(backend="eager")):
            step()

    return run


def both(step):
    def run():
        with torch._dynamo.config.patch(compiled_autograd=True):
            compiled(step)()

    return run


CASES = [("rows", way, compiled) for way in (called, scaled, named, by_task, some_tasks, asked)]
CASES += [(kind, called, compiled) for kind in ("one row", "Gramian", "one pass")]
CASES += [("rows", called, both), ("Gramian", named, both), ("rows", scaled, under_compiled_autograd)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "way", "around"), CASES)
def test_the_same_gradients(kind, way, around):
    for ours, wanted in zip(trained(kind, way, around=around), trained(kind, way), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_a_balanced_loss_that_is_a_view_has_a_plain_base():
    """Else it would have a base in turn, and so on for ever, which is what Dynamo walked along."""
    model = Model()
    value = dbk.DBMTL(model.trunk, 3)(model.losses())
    assert type(value) is not torch.Tensor
    assert type(value._base) is torch.Tensor
    assert value._base._base is None
