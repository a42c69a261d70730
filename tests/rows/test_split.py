"""Shared parameters on several devices: a buffer for each, one set of weights."""

import io

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels.rows import dtensors
from dbmtl_kernels.rows.split import SplitTaskGradientBuffer
from problems import assert_same_state, leaf, quadratics, state_of

SHAPES = ((3, 5), (7,), (1,), (33, 2))


@pytest.fixture
def two_devices(monkeypatch):
    """Every other parameter counts as one on another device."""
    indices = {}
    monkeypatch.setattr(dtensors, "placement_key", lambda p: indices.setdefault(id(p), len(indices)) % 2)


def run(params, steps=4, num_tasks=3, **options):
    balancer = dbk.DBMTL(params, num_tasks, state_dtype=torch.float64, **options)
    optimizer = torch.optim.SGD(params, lr=0.01)
    balancer.attach(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        for factor in (1.0, 0.25):
            losses = quadratics(*params, num_tasks=num_tasks)
            if step == 2:
                losses[1] = losses[1] * float("nan")
            (balancer(losses, tasks=None) * factor).backward()
        optimizer.step()
    return balancer


def tensors(state, at=""):
    """The tensors of a state by name."""
    if not isinstance(state, dict):
        return {at: state} if isinstance(state, torch.Tensor) else {}
    return {name: x for key, value in state.items() for name, x in tensors(value, f"{at}.{key}").items()}


def leaves():
    torch.manual_seed(3)
    return [leaf(*shape) for shape in SHAPES]


def test_parts_do_what_one_buffer_does(two_devices, monkeypatch):
    split = leaves()
    ours = run(split)
    assert isinstance(state_of(ours), SplitTaskGradientBuffer)
    assert [len(part.parameters) for part in state_of(ours).parts] == [2, 2]
    monkeypatch.undo()
    whole = leaves()
    alone = run(whole)
    for p, q in zip(split, whole, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    for name in ("norms", "weights", "nonfinite_steps"):
        torch.testing.assert_close(getattr(ours, name), getattr(alone, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state_of(ours).gramian(), state_of(alone).gramian(), rtol=1e-12, atol=1e-12)


def test_checkpoint_change_of_tasks_and_a_failure(two_devices):
    params = leaves()
    first = run(params)
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    second = dbk.DBMTL(params, 3, state_dtype=torch.float64)
    second.load_state_dict(torch.load(stream, weights_only=True))
    assert_same_state(first.state_dict(), second.state_dict())
    rows = [part.rows.clone() for part in state_of(second).parts]
    second.remove_task(0)
    assert second.add_task() == 2
    for part, before in zip(state_of(second).parts, rows, strict=True):
        assert torch.equal(part.rows[:2], before[1:])
        assert not part.rows[2].any()
    for p in params:
        p.grad = torch.randn_like(p)
    before, losses = [p.grad.clone() for p in params], quadratics(*params, num_tasks=3)
    losses[1].register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        second(losses).backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, before, strict=True))
    second(quadratics(*params, num_tasks=3)).backward()
    assert not any(torch.equal(p.grad, grad) for p, grad in zip(params, before, strict=True))


@pytest.mark.parametrize("split", [False, True])
def test_who_has_a_say_comes_from_the_host_or_the_device(split, request):
    if split:
        request.getfixturevalue("two_devices")
    rows, found = state_of(run(leaves())), []
    before = {name: x.clone() for name, x in tensors(rows.state()).items()}
    for active in ([True, False, True], torch.tensor([True, False, True])):
        for name, x in tensors(rows.state()).items():
            x.copy_(before[name])
        for part in getattr(rows, "parts", [rows]):
            part.stats.sumsq[1] = torch.nan
        flats = rows.new_flats()
        rows.balance(flats, 1e-8, "mean", active=active, loss_scale=torch.tensor(8.0))
        assert rows.stats.nonfinite.tolist() == [False, True, False]
        assert rows.stats.weights.ne(0).tolist() == [True, False, True]
        found.append([view.clone() for view in rows.views(flats)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)  # and no NaN
    rows.stats.nonfinite[1] = True  # found earlier in the step
    rows.balance(flats, 1e-8, "mean", active=torch.ones(3, dtype=torch.bool), propagate_above=-1.0, fresh=False)
    assert all(view.isnan().all() for view in rows.views(flats))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs (gpu)")
def test_on_two_gpus():
    def train(params):
        balancer = dbk.DBMTL(params, 2, state_dtype=torch.float64)
        for _ in range(4):
            for p in params:
                p.grad = None
            terms = [[((p - t) * (1 + 3 * t)).square().sum().to(params[0].device) for p in params] for t in range(2)]
            balancer([sum(terms[0]) + 0.5, sum(terms[1]) + 0.5]).backward()
            with torch.no_grad():
                for p in params:
                    p -= 0.01 * p.grad
        return [p.detach().cpu() for p in params]

    host = leaves()
    spread = [p.detach().to(f"cuda:{i % 2}").requires_grad_() for i, p in enumerate(host)]
    for p, q in zip(train(spread), train(host), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("first", [False, True])
def test_a_regulariser_beside_the_balanced_loss_comes_before_all_is_set_aside(two_devices, monkeypatch, first):
    """Each device runs its part of a backward pass in a thread of its own: none may add to a .grad meanwhile."""
    found = []
    for split in (True, False):
        if not split:
            monkeypatch.undo()
        params, asides = leaves(), []
        balancer = dbk.DBMTL(params, 3, state_dtype=torch.float64)
        grads = balancer._engine.grads
        for step in range(2):
            for p in params:
                p.grad = None
            outer = [p * 1.0 for p in params]
            for x in outer:
                x.register_hook(lambda _, seen=asides, grads=grads: seen.append(grads.aside is not None))
            regulariser = sum(x.sum() for x in outer) if first else 0.0
            balanced = balancer(quadratics(*params, num_tasks=3))
            rest = 0.0 if first else sum(x.sum() for x in outer)
            ((balanced + regulariser + rest) * (1.0 + step)).backward()
        assert len(asides) == 2 * len(params)
        assert not any(asides)
        found.append([p.grad.clone() for p in params])
        named = [params[0], params[1]]
        given = torch.autograd.grad(balancer(quadratics(*params, num_tasks=3)) + params[1].sum(), named)
        found[-1] += given
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_regulariser_through_the_same_graph_with_parts(two_devices, monkeypatch):
    """The passes come last: the graph must be there still, or nothing is done."""
    found = []
    for split in (True, False):
        if not split:
            monkeypatch.undo()
        params = leaves()
        balancer = dbk.DBMTL(params, 3, state_dtype=torch.float64)
        shared = [p * 2.0 for p in params]
        regulariser = shared[0].exp().sum()
        losses = [x.square().sum() for x in shared[:3]]
        losses[2] = losses[2] + (shared[0].exp() + 1).square().sum() + shared[3].sum()
        total = balancer(losses, retain_graph=True) + regulariser
        if split:
            with pytest.raises(RuntimeError, match=r"several devices .* call backward\(retain_graph=True\)"):
                total.backward()
            assert not balancer._engine.steps.open
            for p in params:
                p.grad = None
        total.backward(retain_graph=True)
        found.append([p.grad.clone() for p in params])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_heads_on_another_device_come_last_too():
    params, head = leaves(), torch.nn.Parameter(torch.ones(7, device="cpu"))
    balancer = dbk.DBMTL(params, 3)
    engine = balancer._engine
    order = []
    for devices in (None, {torch.device("cuda", 1)}):
        losses = quadratics(*params, num_tasks=3)
        losses[0] = losses[0] + (head * params[1]).sum()
        losses[0].register_hook(lambda _: order.append("task 0"))
        regulariser = (params[0] * 1.0).sum()
        regulariser.register_hook(lambda _: order.append("regulariser"))
        loss = regulariser + balancer(losses)  # the balanced loss is the last that was made, and first in line
        if devices:
            assert engine.heads.devices == {torch.device("cpu")}
            engine.heads.devices = devices
        loss.backward()
    assert order == ["task 0", "regulariser", "regulariser", "task 0"]


def test_parts_run_after_everything_else_of_the_backward_pass(two_devices):
    """Whatever order autograd has for it: here the balanced loss is the last that was made, and so is first in line."""
    params, order = leaves(), []
    balancer = dbk.DBMTL(params, 3, state_dtype=torch.float64)
    regulariser = sum((p * 1.0).sum() for p in params)
    regulariser.register_hook(lambda _: order.append("regulariser"))
    losses = quadratics(*params, num_tasks=3)
    losses[0].register_hook(lambda _: order.append("task 0"))
    with torch.enable_grad():
        (balancer(losses) + regulariser).backward()
    assert order == ["regulariser", "task 0"]
    losses = quadratics(*params, num_tasks=3)
    losses[1].register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError), pytest.warns(RuntimeWarning, match=r"task\(s\) \[0\]"):
        (balancer(losses) * 2).backward()
    balancer(quadratics(*params, num_tasks=3)).backward()
