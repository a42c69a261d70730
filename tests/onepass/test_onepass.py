"""What a training loop may do with the one-pass form: when it measures, who sits out, what is kept, what is refused."""

import copy
import gc
import warnings
import weakref

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels.onepass.frontier import find_frontier
from dbmtl_kernels.onepass.weighing import _all_finite
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import K, Setting, each, grads, same

# --- measuring ----------------------------------------------------------------------------------------------------


def measured(setting, steps, monkeypatch):
    """Which tasks were measured, in which step."""
    found = {}
    observe = setting.balancer._weigher.levels.observe

    def spy(norms):
        if norms:
            found[setting.balancer.step] = sorted(norms)
        observe(norms)

    monkeypatch.setattr(setting.balancer._weigher.levels, "observe", spy)
    for _ in range(steps):
        setting.step()
    return found


def test_when_it_measures(monkeypatch):
    found = measured(Setting(measure_every=5), 80, monkeypatch)
    everyone = {step: [0, 1, 2] for step in (1, 2, 4, 8, 16, 32, 64)}
    turns = {step: [(step // 5 - 1) % K] for step in range(5, 81, 5)}
    assert found == {**turns, **everyone}


def test_a_task_that_comes_late_is_measured_when_it_comes(monkeypatch):
    setting = Setting(measure_every=1000)
    for _ in range(4):
        losses = setting.losses(setting.batch())
        setting.balancer([*losses[:2], None]).backward()
    assert setting.balancer.norms.isnan().tolist() == [False, False, True]
    setting.step()
    assert not setting.balancer.norms.isnan().any()


def walks(monkeypatch):
    """(whole graph?, nodes) of every walk."""
    found = []

    def spy(losses, shared, whole, **more):
        frontier = find_frontier(losses, shared, whole, **more)
        found.append((whole, frontier.walked))
        return frontier

    monkeypatch.setattr("dbmtl_kernels.onepass.balancer.find_frontier", spy)
    return found


def test_the_walk_is_short_however_deep_the_trunk(monkeypatch):
    trunk = nn.Sequential(*[nn.Linear(8, 8) for _ in range(200)])
    heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(K))
    balancer, found = dbk.OnePassDBMTL(trunk, K), walks(monkeypatch)
    for _ in range(3):
        balancer(each(heads, trunk(torch.randn(4, 8)))).backward()
    assert [whole for whole, _ in found] == [True, True, False]
    assert found[0][1] > 200
    assert found[2][1] < 30


def test_a_structure_that_is_new_is_looked_for_in_the_whole_graph(monkeypatch):
    setting, extra, found = Setting(), nn.Linear(32, 16), walks(monkeypatch)
    for _ in range(2):
        setting.step()
    losses = setting.losses(setting.batch())
    losses[1] = losses[1] + setting.trunk(setting.batch()).square().mean()
    setting.balancer(losses).backward()
    assert [whole for whole, _ in found] == [True, True, False, True]
    losses = [loss * extra.weight.sum() for loss in setting.losses(setting.batch())]
    with pytest.warns(RuntimeWarning, match=r"1 parameter\(s\) are reached by several losses"):
        setting.balancer(losses).backward()


# --- the trainer's own backward -----------------------------------------------------------------------------------


def test_inputs_autograd_grad_and_hooks_see_one_pass():
    setting, x = Setting(), torch.randn(16, 8)
    setting.step(x)
    state = copy.deepcopy(setting.balancer.state_dict())
    setting.optimizer.zero_grad()
    calls = []
    handle = setting.shared[0].register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    setting.balancer(setting.losses(x)).backward()
    handle.remove()
    expected = grads(setting.all)
    assert len(calls) == 1
    assert torch.equal(calls[0], expected[0])
    setting.optimizer.zero_grad()
    setting.balancer.load_state_dict(state)
    assert same(torch.autograd.grad(setting.balancer(setting.losses(x)), setting.all), expected)
    setting.balancer.load_state_dict(state)
    setting.balancer(setting.losses(x)).backward(inputs=setting.shared[:1])
    assert torch.equal(setting.shared[0].grad, expected[0])
    assert all(p.grad is None for p in setting.all[1:])


def test_another_pass_through_the_graph_is_left_alone():
    setting, x = Setting(), torch.randn(16, 8)
    losses = setting.losses(x)
    plain = torch.autograd.grad(sum(losses), setting.all, retain_graph=True)
    loss = setting.balancer(losses)
    loss.backward(retain_graph=True)
    assert same(torch.autograd.grad(sum(losses), setting.all), plain)


def test_a_pass_that_failed_leaves_no_weights_behind():
    setting, x = Setting(), torch.randn(16, 8)
    losses = setting.losses(x)
    plain = torch.autograd.grad(sum(losses), setting.all, retain_graph=True)
    handle = setting.shared[0].register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        setting.balancer(losses).backward(retain_graph=True)
    handle.remove()
    assert same(torch.autograd.grad(sum(losses), setting.all), plain)


def test_the_factor_of_the_loss_is_in_grad_and_not_in_the_norms():
    setting, x = Setting(), torch.randn(16, 8)
    setting.balancer(setting.losses(x)).backward()
    norms, one = setting.balancer.norms, grads(setting.all)
    other = Setting()
    (other.balancer(other.losses(x)) * 1024).backward()
    torch.testing.assert_close(other.balancer.norms, norms)
    for a, b in zip(grads(other.all), one, strict=True):
        torch.testing.assert_close(a, b * 1024)


def test_weights_are_held_until_the_optimizer_steps():
    setting = Setting(measure_every=1)
    setting.balancer.attach(setting.optimizer)
    held = []
    for _ in range(2):
        for _ in range(3):
            (setting.balancer(setting.losses(setting.batch())) / 3).backward()
            held.append(setting.balancer.weights)
        setting.optimizer.step()
        setting.optimizer.zero_grad()
    assert setting.balancer.step == 2
    assert torch.equal(held[0], held[2])
    assert torch.equal(held[3], held[5])
    assert not torch.equal(held[2], held[3])
    with pytest.raises(RuntimeError, match="already attached"):
        setting.balancer.attach(setting.optimizer)
    setting.balancer.detach()
    with pytest.raises(ValueError, match="SGD holds none"):
        setting.balancer.attach(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


class Mark:
    """Something that can be watched."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mark):
        ctx.mark = mark
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_a_graph_that_is_not_used_goes_at_once():
    setting, mark = Setting(), Mark()
    setting.step()
    gone = weakref.ref(mark)
    gc.disable()
    try:
        loss = setting.balancer(each(setting.heads, Marked.apply(setting.trunk(setting.batch()), mark)))
        del mark
        assert gone() is not None
        del loss
        assert gone() is None
    finally:
        gc.enable()


# --- who sits out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_a_loss_that_is_not_finite_leaves_nothing(factor):
    setting, twin, x = Setting(), Setting(), torch.randn(16, 8)
    losses = setting.losses(x)
    losses[1] = losses[1] * float("nan")
    (setting.balancer(losses) * factor).backward()
    others = twin.losses(x)
    (twin.balancer([others[0], None, others[2]]) * factor).backward()
    assert same(grads(setting.shared), grads(twin.shared))
    assert (setting.heads[1].weight.grad == 0).all()
    assert setting.balancer.nonfinite_steps.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("nonfinite", "factor", "passed"),
    [(None, 1.0, False), (None, 8.0, True), ("skip", 8.0, False), ("propagate", 1.0, True)],
)
def test_a_gradient_that_is_not_finite(nonfinite, factor, passed):
    setting, x = Setting(nonfinite=nonfinite), torch.randn(16, 8)
    setting.step(x)
    setting.optimizer.zero_grad()
    z = setting.trunk(x)
    losses = [head(z).square().mean() for head in setting.heads]
    losses[2] = losses[2] + (z - z.detach()).sum().sqrt()
    (setting.balancer(losses) * factor).backward()
    assert setting.shared[0].grad.isfinite().all() != passed
    assert setting.balancer.nonfinite_steps.tolist() == [0, 0, 1]
    assert setting.balancer.norms.isfinite().all()


def test_a_grad_scaler_finds_an_overflow_and_goes_on():
    setting = Setting()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        setting.optimizer.zero_grad()
        z = setting.trunk(setting.batch())
        losses = [head(z).square().mean() for head in setting.heads]
        if step == 2:
            losses[0] = losses[0] + (z - z.detach()).sum().sqrt()
        scaler.scale(setting.balancer(losses)).backward()
        scaler.step(setting.optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(p.isfinite().all() for p in setting.all)


def test_the_device_form_of_the_hooks(monkeypatch):
    """What runs off a CPU, where the host must not look."""
    setting, twin, x = Setting(), Setting(), torch.randn(16, 8)
    losses = setting.losses(x)
    losses[1] = losses[1] * float("nan")
    with monkeypatch.context() as patched:
        patched.setattr("dbmtl_kernels.onepass.weighing.may_look", lambda _: False)
        setting.balancer(losses).backward()
    others = twin.losses(x)
    twin.balancer([others[0], None, others[2]]).backward()
    assert all(torch.allclose(a, b) for a, b in zip(grads(setting.shared), grads(twin.shared), strict=True))
    assert (setting.heads[1].weight.grad == 0).all()
    assert setting.balancer.nonfinite_steps.tolist() == [0, 1, 0]


def test_whether_all_is_finite_off_a_cpu():
    nan, inf, most = float("nan"), float("inf"), torch.finfo(torch.float32).max
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64):
        for values, fine in (([], True), ([1, -2], True), ([1, nan], False), ([-inf, 0], False), ([nan, inf], False)):
            assert bool(_all_finite(torch.tensor(values, dtype=dtype))) is fine
    assert _all_finite(torch.tensor([most, -most]))
    assert _all_finite(torch.tensor([complex(most, most)]))  # whose magnitude is not


class Launches(TorchDispatchMode):
    """Counts operators that are no views: on a GPU a launch each, about."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_how_much_more_the_device_form_launches_than_the_sum(monkeypatch):
    for module in ("weighing", "weigher", "levels"):
        monkeypatch.setattr(f"dbmtl_kernels.onepass.{module}.may_look", lambda _: False)

    def beyond(num_tasks):
        trunk, heads = nn.Linear(8, 8), [nn.Linear(8, 1) for _ in range(num_tasks)]
        forms, counts = (dbk.OnePassDBMTL(trunk.parameters(), num_tasks), sum), []
        for form in forms:
            for _ in range(3):  # nothing is measured in the third
                z = trunk(torch.ones(4, 8))
                losses = [head(z).square().mean() for head in heads]
                with Launches() as launched:
                    form(losses).backward()
            counts.append(launched.count)
        return counts[0] - counts[1]

    few, many = beyond(3), beyond(11)
    assert many - few <= 12 * 8  # 35 a task before losses and flags were looked at together
    assert few <= 88


def test_a_dead_head_keeps_its_level():
    setting, x = Setting(measure_every=1), torch.randn(16, 8)
    setting.step(x)
    level = setting.balancer.norms[1]
    losses = setting.losses(x)
    losses[1] = (setting.trunk(x) * 0).sum() + 1.0
    setting.balancer(losses).backward()
    assert setting.balancer.norms[1] == level


# --- losses that cannot be told apart -----------------------------------------------------------------------------


def of_one_tensor(setting, x):
    return (torch.cat([head(setting.trunk(x)) for head in setting.heads], 1) - torch.arange(K)).square().mean(0)


def test_the_exact_form_takes_over_and_says_so_once():
    setting, x = Setting(), torch.randn(16, 8)
    with pytest.warns(RuntimeWarning, match="The exact form takes such steps"):
        setting.balancer(of_one_tensor(setting, x)).backward()
    found = grads(setting.all)
    setting.optimizer.zero_grad()
    dbk.DBMTL(setting.trunk, K, beta=0.0)(of_one_tensor(setting, x)).backward()
    assert same(found, grads(setting.all))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setting.balancer(of_one_tensor(setting, x)).backward()
    strict = Setting(strict=True)
    with pytest.raises(ValueError, match=r"6 parameter\(s\) are reached by several losses"):
        strict.balancer(of_one_tensor(strict, x))
