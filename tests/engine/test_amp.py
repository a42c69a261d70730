"""Mixed precision: autocast, parameters of half precision, GradScaler, overflows. Training in fp16 survives them."""

import copy

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from problems import EPS, assert_same_state, close, flat_grad, flat_gradients, rows_of, state_of
from torch import nn

TASKS = 3
BETA, SIGMA = 0.8, 0.5


class Amplify(torch.autograd.Function):
    """The identity; multiplies what is backpropagated, as a badly scaled layer would."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(12, 1) for _ in range(TASKS))

    def losses(self, batch, amplify=(), factor=1e30):
        """Mean squared errors; the gradients of the tasks in ``amplify`` are multiplied by ``factor``."""
        x, y = batch
        z = self.trunk(x)
        branches = [Amplify.apply(z, factor) if task in amplify else z for task in range(TASKS)]
        return [
            (head(branch).squeeze(1) - target).square().mean() * 10**task
            for task, (head, branch, target) in enumerate(zip(self.heads, branches, y, strict=True))
        ]


def data(number, size=16, seed=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(TASKS, 6, generator=generator)
    batches = []
    for _ in range(number):
        x = torch.randn(size, 6, generator=generator)
        batches.append((x.to(dtype), torch.tanh(mix @ x.T).to(dtype)))
    return batches


def start(dtype=torch.float32, lr=0.01, attached=False, **options):
    torch.manual_seed(1)
    net = Net().to(dtype)
    balancer = dbk.DBMTL(net.trunk.parameters(), TASKS, **{"beta": BETA, "beta_sigma": SIGMA, **options})
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    if attached:
        balancer.attach(optimizer)
    return net, list(net.trunk.parameters()), balancer, optimizer


def exact_training():
    return oracle.Training(TASKS, sum(p.numel() for p in Net().trunk.parameters()), BETA, SIGMA)


def task_gradients(losses, params):
    """Those of the logs in float32, as `log_transform` takes them."""
    return flat_gradients([torch.log(loss.float() + EPS) for loss in losses], params, log=False)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, inside):
    net, params, balancer, optimizer = start()
    reference, heads = exact_training(), list(net.heads.parameters())
    for batch in data(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            assert net.trunk(batch[0]).dtype == dtype
            losses = net.losses(batch)
        plain = torch.autograd.grad(sum(torch.log(x.float() + EPS) for x in losses), heads, retain_graph=True)
        expected = reference.update(task_gradients(losses, params))
        with torch.autocast("cpu", dtype=dtype, enabled=inside):
            balancer(losses).backward()
        for head, grad in zip(heads, plain, strict=True):
            close(head.grad.numpy(), grad.numpy(), rtol=1e-4)
        assert {p.grad.dtype for p in params} == {torch.float32}
        close(flat_grad(params), expected, rtol=1e-4)
        close(rows_of(balancer), reference.rows, rtol=1e-4)
        optimizer.step()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_in_bfloat16(state_dtype):
    net, params, balancer, optimizer = start(torch.bfloat16, state_dtype=state_dtype)
    assert state_of(balancer).rows.dtype == state_dtype
    exact = state_dtype == torch.float32
    reference = exact_training()
    for batch in data(12, dtype=torch.bfloat16):
        optimizer.zero_grad()
        losses = net.losses(batch)
        assert {x.dtype for x in losses} == {torch.bfloat16}
        expected = reference.update(task_gradients(losses, params))
        value = balancer(losses)
        assert value.dtype == torch.float32
        close(value.detach().numpy(), sum(torch.log(x.detach().float() + EPS) for x in losses).numpy(), rtol=1e-5)
        value.backward()
        assert {p.grad.dtype for p in params} == {torch.bfloat16}
        close(rows_of(balancer), reference.rows, rtol=1e-6 if exact else 2e-2)
        close(flat_grad(params), expected, rtol=1.01 * 2**-8 if exact else 3e-2)
        optimizer.step()


@pytest.mark.parametrize("attached", [False, True])
def test_a_changing_power_of_two_is_invisible(attached):
    """In float32 a scale of 2**n is exact: state, gradients and parameters have the bits of a run without one."""
    results = []
    for scaling in (False, True):
        net, params, balancer, optimizer = start(attached=attached)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2, enabled=scaling)
        scales, grads = set(), []
        for batch in data(12):
            optimizer.zero_grad()
            scales.add(scaler.get_scale())
            scaler.scale(balancer(net.losses(batch))).backward()
            scaler.unscale_(optimizer)
            grads.append(flat_grad(params))
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert len(scales) == (6 if scaling else 1)
        results.append((balancer.state_dict()["buffer"], np.array(grads), torch.cat([p.view(-1) for p in params])))
    (state, grads, params), (other, theirs, parameters) = results
    assert_same_state(state, other)
    assert np.array_equal(grads, theirs)
    assert torch.equal(params, parameters)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("attached", [False, True])
def test_an_overflow_in_one_task(attached, unscale, zero):
    """Scaled, its gradient is not a float32 any more. The step is skipped, the others' averages go on."""
    net, params, balancer, optimizer = start(attached=attached)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    reference = exact_training()
    for step, batch in enumerate(data(7)):
        broken = [1] if step == 3 else []
        optimizer.zero_grad(set_to_none=zero)
        before = [p.detach().clone() for p in net.parameters()]
        scale = scaler.get_scale()
        expected = reference.update(task_gradients(net.losses(batch), params), broken)
        scaler.scale(balancer(net.losses(batch, broken, factor=1e36))).backward()
        if unscale:
            scaler.unscale_(optimizer)
            if not broken:
                close(flat_grad(params), expected, rtol=1e-5)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 100.0)
        scaler.step(optimizer)
        scaler.update()
        close(rows_of(balancer), reference.rows, rtol=1e-5)
        assert balancer.step == step + 1
        assert balancer.nonfinite_steps.tolist() == [0, int(step >= 3), 0]
        assert torch.isfinite(balancer.norms).tolist() == [True, not broken, True]
        moved = [not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True)]
        assert all(moved) != bool(broken)
        assert any(moved) != bool(broken)
        assert scaler.get_scale() == (scale / 2 if broken else scale)


@pytest.mark.parametrize("weighting", [dbk.MaxNorm(), dbk.EqualWeights()], ids=["norms", "gramian"])
@pytest.mark.parametrize(
    ("above", "scale", "passed_on"),
    [(1.0, 1024.0, True), (1.0, 1.0, False), (float("inf"), 1024.0, False), (-1.0, 0.5, True), (-1.0, 1.0, True)],
)
def test_which_factors_pass_a_nan_on(weighting, above, scale, passed_on):
    """A factor of 1 is no factor. A task that has no part in the step is not passed on, whatever its row holds."""
    net, params, _, optimizer = start()
    balancer = dbk.GradientBalancer(params, TASKS, weighting=weighting, beta=BETA, beta_sigma=SIGMA)
    balancer._engine.grads._balanced.propagate_above = above
    reference = oracle.Training(TASKS, rows_of(balancer).shape[1], BETA, SIGMA, propagate_above=above)
    for tasks, broken in (([0, 1, 2], [1]), ([0, 2], [])):
        optimizer.zero_grad()
        losses = net.losses(data(1)[0], broken, factor=float("inf"))
        exact = flat_gradients(losses, params, log=False)
        reference.feed({task: exact[task] for task in tasks}, scale)
        reference.end()
        if not broken:
            state_of(balancer).stats.sumsq[1] = torch.inf
        (balancer([losses[task] for task in tasks], tasks=tasks) * scale).backward()
        grads = flat_grad(params)
        assert np.isnan(grads).all() if broken and passed_on else np.isfinite(grads).all()
        expected = reference.balance()
        if type(weighting) is dbk.MaxNorm:
            close(grads, expected, rtol=1e-5)
        assert not rows_of(balancer)[1].any()
        assert balancer.weights[1] == 0
    assert balancer.nonfinite_steps.tolist() == [0, 2, 0]


@pytest.mark.parametrize("scaling", [True, False])
@pytest.mark.parametrize("zero", [True, False])
def test_accumulation_of_unequal_micro_batches(scaling, zero):
    """Attached. Each counts by its size; where one overflows its task is out for the step, or the step is skipped."""
    net, params, balancer, optimizer = start(attached=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaling)
    reference, sizes = exact_training(), (4, 10, 2)
    micro_batches = [data(6, size, seed=size) for size in sizes]
    for step in range(6):
        broken = [2] if step == 3 else []
        optimizer.zero_grad(set_to_none=zero)
        before, scale = copy.deepcopy(net.state_dict()), scaler.get_scale()
        total = np.zeros(())
        for number, size in enumerate(sizes):
            batch = micro_batches[number][step]
            total = total + size / sizes[0] * task_gradients(net.losses(batch), params)
            bad = broken if number == 1 else []
            loss = balancer(net.losses(batch, bad, factor=1e36 if scaling else float("inf")))
            scaler.scale(loss * (size / sum(sizes))).backward()
        expected = sizes[0] / sum(sizes) * reference.update(total, broken)
        close(rows_of(balancer), reference.rows, rtol=1e-5)
        scaler.unscale_(optimizer)
        if broken and scaling:
            assert not np.isfinite(flat_grad(params)).any()
        else:
            close(flat_grad(params), expected, rtol=1e-5)
        for p in net.heads.parameters():  # Amplify stands before the heads: theirs are finite
            assert torch.isfinite(p.grad).all()
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(value, before[key]) for key, value in net.state_dict().items()]
        assert all(same) if broken and scaling else not any(same)
        if scaling:
            assert scaler.get_scale() == (scale / 2 if broken else scale * 2 if step in (1, 5) else scale)
        assert balancer.step == step + 1
        assert balancer.nonfinite_steps.tolist() == [0, 0, int(step >= 3)]


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("saved", ["after zero_grad", "before zero_grad", "before zero_grad, .grad is gone"])
def test_a_checkpoint_after_a_skipped_step_resumes_bit_for_bit(saved, zero):
    """Attached: the step that the scaler skipped is over once its gradients are gone, here and where it is loaded."""

    def run(interrupt):
        net, _, balancer, optimizer = start(attached=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        for step, batch in enumerate(data(5)):
            broken = [1] if step == 2 else []
            scaler.scale(balancer(net.losses(batch, broken, factor=1e36))).backward()
            scaler.step(optimizer)
            scaler.update()
            for moment in ("before zero_grad", "after zero_grad"):
                if interrupt and step == 2 and moment == saved.split(",")[0]:
                    state = copy.deepcopy(balancer.state_dict())
                    if "gone" in saved:  # as in a fresh process
                        optimizer.zero_grad()
                    balancer = dbk.DBMTL(net.trunk.parameters(), TASKS, beta=BETA, beta_sigma=SIGMA)
                    balancer.load_state_dict(state)
                    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
                    balancer.attach(optimizer)
                if moment == "before zero_grad":
                    optimizer.zero_grad(set_to_none=zero)
        return balancer, copy.deepcopy(net.state_dict())

    (straight, net), (resumed, other) = run(False), run(True)
    assert resumed.step == straight.step == 5
    assert_same_state(resumed.state_dict(), straight.state_dict())
    assert_same_state(other, net)


@pytest.mark.slow
def test_two_thousand_steps_in_fp16():
    """An initial scale that overflows, an overflow in one task every 97th step: training goes on regardless."""
    net, params, balancer, _ = start()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    balancer.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=25)
    batches, totals, scales, skipped = data(25), [], [], []
    for step in range(2000):
        injected = [step // 97 % TASKS] if step % 97 == 96 else []
        before = params[0].detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            losses = net.losses(batches[step % len(batches)], injected, factor=1e8)
        scales.append(scaler.get_scale())
        scaler.scale(balancer(losses)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        totals.append(float(sum(x.detach() for x in losses)))
        skipped.append(torch.equal(before, params[0]))
        assert torch.isfinite(state_of(balancer).rows).all()
        assert torch.isfinite(state_of(balancer).stats.sumsq).all()
        assert all(torch.isfinite(p).all() for p in net.parameters())
        if injected:
            assert torch.isfinite(balancer.norms).tolist() == [task not in injected for task in range(TASKS)]
    assert np.isfinite(totals).all()
    assert np.mean(totals[-50:]) < 0.5 * np.mean(totals[:50])
    assert balancer.step == 2000
    assert skipped[:3] == [True, True, True]  # the initial scale
    for before, after, skip in zip(scales, scales[1:], skipped, strict=False):
        assert after == before / 2 if skip else after in (before, 2 * before)
    overflows = range(96, 2000, 97)
    assert all(skipped[i] for i in overflows)
    for i in overflows[:-1]:
        assert scales[i + 1] == scales[i] / 2
        assert max(scales[i + 2 : i + 98]) > scales[i + 1]  # recovered
    assert len(overflows) <= sum(skipped) < 150
    assert (balancer.nonfinite_steps >= len(overflows) // TASKS).all()
