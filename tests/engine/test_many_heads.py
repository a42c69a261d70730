"""Heads of many tasks: a pass looks at its own, and a gradient where none was expected is not lost."""

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels.engine.heads import HeadGradients
from problems import leaf
from torch import nn

K = 50


@pytest.mark.parametrize("attached", [False, True])
def test_a_pass_looks_at_the_heads_of_its_task_alone(monkeypatch, attached):
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 6), nn.ModuleList(nn.Linear(6, 1) for _ in range(K))
    both = nn.Linear(6, 6)  # of two tasks, and no shared parameter
    balancer = dbk.DBMTL(trunk, K)
    if attached:
        balancer.attach(
            optimizer := torch.optim.SGD([*trunk.parameters(), *heads.parameters(), *both.parameters()], lr=0.1)
        )
    looked, collect = [], HeadGradients.collect

    def counted(self, task, smaller=None):
        looked.append(len(self._own.get(task, ())) + len(self._rest))
        return collect(self, task, smaller)

    monkeypatch.setattr(HeadGradients, "collect", counted)
    for _ in range(3):
        looked.clear()
        z = trunk(torch.randn(8, 4)).relu()
        losses = [head(both(z) if task < 2 else z).square().mean() + 0.1 for task, head in enumerate(heads)]
        plain = torch.autograd.grad(
            sum(map(dbk.log_transform, losses)), [*heads.parameters(), *both.parameters()], retain_graph=True
        )
        for p in (*trunk.parameters(), *heads.parameters(), *both.parameters()):
            p.grad = None
        balancer(losses).backward()
        assert looked == [4] * K  # its own two and the common two
        for p, grad in zip([*heads.parameters(), *both.parameters()], plain, strict=True):
            torch.testing.assert_close(p.grad, grad)
        if attached:
            optimizer.step()


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_leaf_that_others_reach_further_down_since_the_last_search(spoilt):
    """Its gradient is that of all tasks; if one sits out, what cannot be told apart is left out."""
    torch.manual_seed(0)
    trunk, tied, heads = leaf(4), leaf(4), [leaf(4) for _ in range(2)]
    balancer = dbk.DBMTL([trunk], 2, log_transform=False)
    for step in range(1, 4):
        z = trunk * (1.0 if step < 3 else tied)  # step 3 is not searched to the end
        losses = [(z * heads[0] * tied).sum(), (z * heads[1]).square().sum()]
        if spoilt and step == 3:
            losses[1] = losses[1] + (0.0 * z).abs().sqrt().sum()  # finite, and its gradient is not
        for p in (trunk, tied, *heads):
            p.grad = None
        if step == 3:
            plain = torch.autograd.grad(
                losses[0] if spoilt else sum(losses), [tied, *heads[: 2 - spoilt]], retain_graph=True
            )
        balancer(losses).backward()
    if spoilt:
        assert heads[1].grad is None
        assert tied.grad.isfinite().all()
    for p, grad in zip([tied, *heads], plain, strict=False):
        torch.testing.assert_close(p.grad, grad)
