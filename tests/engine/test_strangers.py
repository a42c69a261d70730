"""Parameters that are no longer the model's, hooks that take gradients away, and how to go on."""

import pickle
import re
import warnings

import dbmtl_kernels as dbk
import pytest
import torch
from problems import close, flat_gradients, leaf, make, quadratics, rows_of, state_of
from torch import nn

NONE = "no shared parameter got a gradient"


@pytest.fixture(autouse=True)
def errors():
    """What is said where nothing is wrong fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def losses(self, x=None):
        z = self.trunk(torch.ones(2, 4) if x is None else x)
        return [(head(z) - t).square().mean() + 0.1 for t, head in enumerate(self.heads)]


def replaced_below(net, balancer):
    """Beneath shared ones: the graphs tell, at the next look."""
    net.trunk[0] = nn.Linear(4, 4)
    return r"2 parameter\(s\).*not given to the balancer \(one of shape \(4,.*sum.*rebind", 4


def thawed(net, balancer):
    net.trunk[0].requires_grad_(True)
    return r"2 parameter\(s\).*one of shape \(4, 4\).*replaced, added or thawed\?.*rebind", 4


def replaced_on_top(net, balancer):
    net.trunk[4] = nn.Linear(4, 4)
    return r"shared parameter 4.*had a gradient in an earlier step, and none.*rebind", 1


def all_replaced(net, balancer):
    net.load_state_dict(dict(pickle.loads(pickle.dumps(net.state_dict()))), assign=True)
    return f"{NONE}.*rebind", 1


def another_model(net, balancer):
    other = Net()
    net.trunk, net.heads = other.trunk, other.heads
    return NONE, 1


def adapter(net, balancer):
    """A small module put in between two shared ones."""
    net.trunk[1] = nn.Sequential(nn.Tanh(), nn.Linear(4, 4))
    return r"2 parameter\(s\).*not given", 4


@pytest.mark.parametrize("change", [replaced_below, thawed, replaced_on_top, all_replaced, another_model, adapter])
def test_what_is_not_balanced_any_more_is_said_once(change):
    net = Net()
    if change is thawed:
        net.trunk[0].requires_grad_(False)
    if change is replaced_below:
        net.trunk[1] = nn.Identity()
    balancer = dbk.DBMTL([p for p in net.trunk.parameters() if p.requires_grad], 2)
    for _ in range(2):
        balancer(net.losses()).backward()
    message, within = change(net, balancer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(within):
            balancer(net.losses()).backward()
        count = len(said)
        for _ in range(6):
            balancer(net.losses()).backward()
    assert count == len(said) >= 1  # each once
    assert any(re.search(message, str(each.message)) for each in said)


@pytest.mark.parametrize("change", ["replaced", "thawed", "added"])
def test_a_module_tells_by_name(change):
    """Before the first step already."""
    net = Net()
    if change == "thawed":
        net.trunk[4].requires_grad_(False)
    balancer = dbk.DBMTL(net.trunk, 2)
    if change == "replaced":
        net.trunk[4] = nn.Linear(4, 4)
    elif change == "thawed":
        net.trunk[4].requires_grad_(True)
    else:
        net.trunk.append(nn.Linear(4, 4))
    name = "5" if change == "added" else "4"
    with pytest.warns(RuntimeWarning, match=rf"2 parameter\(s\).*\('{name}.weight', '{name}.bias'\)"):
        balancer(net.losses()).backward()
    balancer(net.losses()).backward()


def test_nothing_is_said_of_heads_whatever_they_share():
    """One output layer for all tasks, losses in a tensor, tied weights, tasks left out, frozen parameters."""
    trunk, last = nn.Linear(4, 4), nn.Linear(4, 3)
    balancer = dbk.DBMTL(trunk, 3)
    for step in range(5):
        z = last(trunk(torch.ones(2, 4)).tanh())
        losses = ((z - 1) ** 2).mean(0)
        balancer(losses if step % 2 else list(losses)).backward()
    balancer([losses_of(trunk, last)[0], None, None]).backward()
    trunk.bias.requires_grad_(False)
    balancer(losses_of(trunk, last)).backward()
    tied = dbk.DBMTL([trunk.weight], 3)
    for _ in range(4):
        z = trunk(torch.ones(2, 4)).tanh() @ trunk.weight + last.bias.sum()
        tied([(z - t).square().mean() + 0.1 for t in range(3)]).backward()


def losses_of(trunk, last):
    return list(((last(trunk(torch.ones(2, 4)).tanh()) - 1) ** 2).mean(0))


@pytest.mark.parametrize("change", ["grown", "reshaped", "dtype"])
def test_a_changed_parameter_is_refused_before_the_pass(change):
    net = Net()
    balancer = dbk.DBMTL(net.trunk, 2)
    balancer(net.losses()).backward()
    before = state_of(balancer).rows.clone()
    weight = net.trunk[2].weight
    losses = net.losses()
    weight.grad = None
    weight.data = {
        "grown": torch.ones(6, 4), "reshaped": weight.data.reshape(2, 8), "dtype": weight.data.double(),
    }[change]  # fmt: skip
    for p in net.parameters():
        p.grad = None
    with pytest.raises(RuntimeError, match=r"shared parameter 2 \('2.weight'\).*was.*and is.*rebind"):
        balancer(losses).backward()
    assert torch.equal(state_of(balancer).rows, before)
    assert all(p.grad is None for p in net.parameters())


# --- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
def test_rebinding_keeps_the_rows_of_those_that_stay(attached):
    a, b, c = leaf(4), leaf(3), leaf(5)
    balancer = make(a, b, beta=0.5)
    optimizer = torch.optim.SGD([a, b, c], lr=0.1)
    if attached:
        balancer.attach(optimizer)
    balancer(quadratics(a, b)).backward()
    optimizer.step()
    before, counts = rows_of(balancer), balancer.nonfinite_steps
    balancer.rebind([c, a])
    close(rows_of(balancer)[:, 5:], before[:, :4])
    assert (rows_of(balancer)[:, :5] == 0).all()
    assert balancer.shared_parameters == [c, a] or balancer.shared_parameters[0] is c
    assert balancer.step == 1
    assert torch.equal(balancer.nonfinite_steps, counts)
    a.grad = c.grad = None
    grads = flat_gradients(quadratics(c, a), [c, a])
    rows = 0.5 * rows_of(balancer) + 0.5 * grads
    balancer(quadratics(c, a)).backward()
    close(rows_of(balancer), rows)
    close(balancer.monitor().norms.numpy() ** 2, (rows**2).sum(1))
    if attached:
        with pytest.raises(RuntimeError, match=r"a change of parameters within a step.*optimizer.step\(\)"):
            balancer.rebind([a])
        optimizer.step()
        with pytest.warns(UserWarning, match=r"no attached optimizer holds shared parameter 0 of shape \(2,\)"):
            balancer.rebind([leaf(2), a])


def test_a_rebound_balancer_watches_no_parameter_that_left():
    a, b = leaf(4), leaf(3)
    balancer = make(a, b)
    balancer(quadratics(a, b)).backward()
    monitor = balancer.monitor()
    balancer.rebind([b])
    assert not a._post_accumulate_grad_hooks
    b.grad = None
    balancer(quadratics(b)).backward()
    assert torch.equal(monitor.norms, balancer.norms)
    state = balancer.state_dict()
    other = make(b)
    other.load_state_dict(state)
    assert other.step == 2


@pytest.mark.parametrize("change", ["replaced", "thawed", "dtype"])
def test_a_module_is_rebound_as_it_is_now(change):
    net = Net()
    if change == "thawed":
        net.trunk[0].requires_grad_(False)
    balancer = dbk.DBMTL(net.trunk, 2)
    balancer(net.losses()).backward()
    if change == "replaced":
        net.trunk[0] = nn.Linear(4, 4)
    elif change == "thawed":
        net.trunk[0].requires_grad_(True)
    else:
        net.double()
    balancer.rebind(net.trunk)
    assert len(balancer.shared_parameters) == 6
    net.zero_grad()
    for _ in range(3):
        balancer(net.losses(torch.ones(2, 4, dtype=net.trunk[0].weight.dtype))).backward()
    assert (rows_of(balancer) != 0).any()


# --- taken away ----------------------------------------------------------------------------------------------------


def stepping(p, optimizer):
    def hook(p):
        optimizer.step()
        optimizer.zero_grad()

    p.register_post_accumulate_grad_hook(hook)


def consuming(p, optimizer):
    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def on_the_node(p, optimizer):
    """As torch.distributed.optim's _apply_optimizer_in_backward."""
    node = torch.autograd.graph.get_gradient_edge(p).node
    p.node = node
    node.register_hook(lambda *_: optimizer.step())


@pytest.mark.parametrize("when", ["before", "after the first step"])
@pytest.mark.parametrize("how", ["call", "task"])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("take", [stepping, consuming, on_the_node])
def test_an_optimizer_in_backward_is_refused_before_anything_moves(take, early, how, when):
    p, q = leaf(4), leaf(3)
    optimizer = torch.optim.SGD([p, q], lr=0.1)
    balancer = make(p, q)
    state_of(balancer).early = balancer._engine.grads._early = early
    if when != "before":
        balancer(quadratics(p, q)).backward()
    p.grad = q.grad = None
    take(q, optimizer)
    before, step = [p.detach().clone(), q.detach().clone()], balancer.step

    def run():
        if how == "call":
            balancer(quadratics(p, q)).backward()
            return
        with balancer.task(0):
            quadratics(p, q)[0].backward()

    message = r"taken out of .grad" if take is consuming else r"step\(\) (within the backward|inside the context)"
    with pytest.raises(RuntimeError, match=message):
        run()
    assert all(map(torch.equal, before, (p, q)))
    assert balancer.step == step
    assert p.grad is None
    assert q.grad is None


def test_hooks_that_only_look_see_every_gradient():
    p, seen = leaf(4), []
    balancer = make(p)
    state_of(balancer).early = balancer._engine.grads._early = False
    balancer(quadratics(p)).backward()
    p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    balancer(quadratics(p)).backward()
    assert len(seen) == 2


def test_a_replaced_grad_within_a_step():
    p, q = leaf(4), leaf(3)
    balancer, optimizer = make(p, q), torch.optim.SGD([p, q], lr=0.1)
    balancer.attach(optimizer)
    balancer(quadratics(p, q)).backward()
    p.grad = p.grad.clone()
    before = [p.grad, q.grad]
    with pytest.raises(RuntimeError, match=r"the .grad of shared parameter 0 of shape \(4,\) was replaced.*in place"):
        balancer(quadratics(p, q)).backward()
    assert p.grad is before[0]
    assert q.grad is before[1]
    q.grad = q.grad.clone()
    with pytest.warns(RuntimeWarning, match="is gone from .grad, and other tensors are in its place"):
        balancer(quadratics(p, q)).backward()
    assert balancer.step == 2
    p.grad = q.grad = None  # thrown away: no word
    balancer(quadratics(p, q)).backward()
