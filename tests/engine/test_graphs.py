"""Which parameters are shared, read off the graphs of the losses."""

import warnings

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels.engine.graphs import check_shared_parameters
from torch import nn
from torch.utils.checkpoint import checkpoint


class Branching(nn.Module):
    """A trunk of all tasks, a branch that tasks 1 and 2 share, a head each, and a layer nobody uses."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.branch = nn.Linear(5, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
        self.unused = nn.Linear(3, 3)

    def forward(self, x, run=lambda f, z: f(z)):
        z = torch.tanh(run(self.trunk, x))
        b = torch.tanh(self.branch(z))
        return [head(features).square().mean() for head, features in zip(self.heads, (z, b, b), strict=True)]


def ids(parameters):
    return {id(p) for p in parameters}


def test_shared_are_those_that_two_losses_reach():
    net = Branching()
    found = dbk.find_shared_parameters(net(torch.randn(6, 4)))
    assert ids(found) == ids([*net.trunk.parameters(), *net.branch.parameters()])
    assert len(found) == 4
    assert [id(p) for p in found] == [id(p) for p in dbk.find_shared_parameters(net(torch.randn(2, 4)))]


def test_the_graphs_stay_as_they_are():
    net = Branching()
    losses = net(torch.randn(6, 4))
    balancer = dbk.DBMTL.from_losses(losses, beta=0.5)
    assert balancer.num_tasks == 3
    assert balancer.beta == 0.5
    balancer(losses).backward()
    assert all(p.grad is not None for p in [*net.trunk.parameters(), *net.branch.parameters()])
    assert all(p.grad is not None for p in net.heads.parameters())
    assert net.unused.weight.grad is None


def test_tied_weights_and_frozen_ones():
    net = Branching()
    net.heads[2].weight = net.heads[0].weight  # shared now
    net.trunk.bias.requires_grad_(False)
    found = dbk.find_shared_parameters(net(torch.randn(6, 4)))
    assert ids(found) == ids([net.trunk.weight, *net.branch.parameters(), net.heads[0].weight])


def test_a_checkpointed_trunk():
    net, x = Branching(), torch.randn(6, 4, requires_grad=True)
    found = dbk.find_shared_parameters(net(x.detach(), lambda f, z: checkpoint(f, z, use_reentrant=False)))
    assert ids(net.trunk.parameters()) <= ids(found)
    with pytest.raises(RuntimeError, match="task 0 goes through a re-entrant checkpoint"):
        dbk.find_shared_parameters(net(x, lambda f, z: checkpoint(f, z, use_reentrant=True)))


def test_what_was_given_is_checked():
    net = Branching()
    losses = net(torch.randn(6, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer = dbk.DBMTL.from_losses(losses, net.trunk.parameters())
    assert ids(balancer.shared_parameters) == ids(net.trunk.parameters())
    with pytest.raises(ValueError, match=r"no loss depends on shared parameter 2 of shape \(3, 3\)"):
        dbk.DBMTL.from_losses(losses, [*net.trunk.parameters(), *net.unused.parameters()])
    for check in (check_shared_parameters, dbk.DBMTL.from_losses):
        with pytest.warns(UserWarning, match=r"shared parameter\(s\) 1 are reached from one loss only") as caught:
            check(losses, [net.trunk.weight, net.heads[1].weight])
        assert caught[0].filename == __file__
    net.unused.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"\(it is frozen: requires_grad=False\)"):
        dbk.DBMTL.from_losses(losses, [*net.trunk.parameters(), net.unused.weight])


def test_nothing_shared_or_nothing_to_walk():
    a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    x = torch.randn(3, 2)
    loss = a(x).square().mean()
    for losses, kind, message in (
        ([loss, b(x).square().mean()], ValueError, "the 2 losses share no parameter"),
        ([loss], ValueError, "two losses or more, got 1"),
        ([loss, torch.ones(())], RuntimeError, "the loss of task 1 has no graph"),
        ([loss, loss, "loss"], TypeError, "the loss of task 2 must be a tensor, got str"),
        (torch.stack([loss, loss]), ValueError, "must be a sequence of scalars"),
    ):
        for find in (dbk.find_shared_parameters, dbk.DBMTL.from_losses):
            with pytest.raises(kind, match=message):
                find(losses)


class Custom(torch.autograd.Function):
    """Its node has attributes of the names that other nodes have."""

    @staticmethod
    def forward(ctx, x):
        ctx.variable, ctx.name = x.detach(), "custom"
        return x * 2.0

    @staticmethod
    def backward(ctx, grad):
        return grad * 2.0


def test_through_a_custom_function():
    net = Branching()
    found = dbk.find_shared_parameters(net(torch.randn(6, 4), lambda f, z: Custom.apply(f(z))))
    assert ids(found) == ids([*net.trunk.parameters(), *net.branch.parameters()])


def test_through_a_compiled_model():
    net = Branching()
    losses = torch.compile(net, backend="aot_eager")(torch.randn(6, 4))
    with pytest.warns(UserWarning, match="two losses come out of one compiled graph") as caught:
        found = dbk.find_shared_parameters(losses)
    assert caught[0].filename == __file__
    assert ids([*net.trunk.parameters(), *net.branch.parameters()]) <= ids(found)
