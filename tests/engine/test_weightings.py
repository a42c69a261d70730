"""GradientBalancer with our own weightings and with any other callable."""

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from problems import EPS, close, flat_grad, flat_gradients, leaf, make, overflowing, quadratics, state_of

ALL_SCALES = ["max", "mean", "median", "min", 0.3]


def balance(*params, num_tasks=2, **options):
    return dbk.GradientBalancer(params, num_tasks, **{"state_dtype": torch.float64, **options})


class Spy:
    """A weighting that keeps the Gramians it was given; weights 1, 2, ... by default."""

    def __init__(self, weighting=None):
        self.gramians = []
        self.weighting = weighting or (lambda gramian: torch.arange(1.0, 1 + len(gramian), dtype=gramian.dtype))

    def __call__(self, gramian):
        self.gramians.append(gramian.clone())
        return self.weighting(gramian)


def clear(*params):
    for p in params:
        p.grad = None


@pytest.mark.parametrize("scale", ALL_SCALES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_max_norm_from_the_gramian_is_the_fused_one(scale, dtype, rtol):
    p, q = leaf(5, 3, dtype=dtype), leaf(7, dtype=dtype)
    options = {"num_tasks": 3, "beta": 0.5, "beta_sigma": 0.5, "log_transform": True, "state_dtype": dtype}
    fused = balance(p, q, weighting=dbk.MaxNorm(scale), **options)
    spied = Spy(dbk.MaxNorm(scale))
    general = balance(p, q, weighting=spied, **options)
    for step in range(5):
        tasks = [2, 0] if step == 3 else [0, 1, 2]
        got = []
        for balancer in (fused, general):
            clear(p, q)
            losses = quadratics(p, q, num_tasks=3)
            balancer.backward([losses[t] for t in tasks], tasks=tasks)
            got.append((flat_grad([p, q]), balancer.weights.numpy(), balancer.norms.numpy()))
        for a, b in zip(*got, strict=True):
            close(a, b, rtol)
    assert len(spied.gramians) == 5


def test_max_norm_of_a_single_task_leaves_it_alone():
    assert dbk.MaxNorm()(torch.tensor([[9.0]])).tolist() == [1.0]
    assert dbk.MaxNorm(0.5, eps=1.0)(torch.tensor([[9.0]])).tolist() == [0.125]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("total", [None, 1.0])
def test_equal_weights_are_the_plain_sum(total, log):
    p, q, head = leaf(5, 3), leaf(7), leaf(4)
    balancer = balance(p, q, num_tasks=3, weighting=dbk.EqualWeights(total), log_transform=log)
    for _ in range(3):  # beta is 0: nothing is left of the step before
        clear(p, q, head)
        losses = [loss + head.square().sum() for loss in quadratics(p, q, num_tasks=3)]
        values = [torch.log(loss + EPS) if log else loss for loss in losses]
        expected = torch.autograd.grad(sum(values), [p, q, head], retain_graph=True)
        value = balancer(losses)
        assert value.item() == pytest.approx(sum(values).item())
        value.backward()
        share = 1.0 if total is None else total / 3
        close(flat_grad([p, q]), share * torch.cat([g.reshape(-1) for g in expected[:2]]).numpy())
        close(head.grad.numpy(), expected[2].numpy())  # heads: always the plain sum
        with torch.no_grad():
            p -= 0.1
    assert balancer.weights.tolist() == pytest.approx([share] * 3)


def test_beta_counts_from_the_next_step_on():
    p, q = leaf(6), leaf(6)
    balancer = make(p, q, beta=0.5, beta_sigma=0.5)
    optimizer = torch.optim.SGD([p, q], lr=0.0)
    balancer.attach(optimizer)
    ema = np.zeros((2, 12))
    for step, (beta, sigma) in enumerate([(0.5, 0.5), (0.2, 0.0), (0.9, 1.0)], 1):
        rows = flat_gradients(quadratics(p, q), [p, q])
        factor = beta / step**sigma
        ema = factor * ema + (1 - factor) * 2 * rows
        balancer.beta, balancer.beta_sigma = beta, sigma
        balancer.backward(quadratics(p, q))
        balancer.beta, balancer.beta_sigma = 0.7, 0.3  # within the step: too late for it
        balancer.backward(quadratics(p, q))
        close(balancer.norms.numpy(), np.linalg.norm(ema, axis=1))
        optimizer.step()
        optimizer.zero_grad()
    assert (balancer.beta, balancer.beta_sigma) == (0.7, 0.3)


def test_the_weighting_sees_the_finite_tasks_that_are_there():
    p = leaf(6)
    spy = Spy()
    balancer = balance(p, num_tasks=4, weighting=spy)
    rows = flat_gradients(quadratics(p, num_tasks=4), [p], log=False)
    losses = quadratics(p, num_tasks=4)
    losses[1] = losses[1] * float("nan")
    balancer.backward([*losses[:3], None])
    close(spy.gramians[0].numpy(), rows[[0, 2]] @ rows[[0, 2]].T)
    close(p.grad.numpy(), 1.0 * rows[0] + 2.0 * rows[2])
    assert balancer.weights.tolist() == [1.0, 0.0, 2.0, 0.0]
    assert balancer.nonfinite_steps.tolist() == [0, 1, 0, 0]
    clear(p)
    losses = quadratics(p, num_tasks=4)
    balancer.backward([losses[3], losses[1]], tasks=[3, 1])
    close(spy.gramians[1].numpy(), rows[[1, 3]] @ rows[[1, 3]].T)  # by index, not as given
    close(p.grad.numpy(), 1.0 * rows[1] + 2.0 * rows[3])
    clear(p)
    balancer.backward([loss * float("inf") for loss in quadratics(p, num_tasks=4)])
    assert len(spy.gramians) == 2
    assert balancer.weights.tolist() == [0.0] * 4
    assert not p.grad.any()


def test_attached_the_gramian_is_of_what_came_so_far():
    p = leaf(6)
    spy = Spy(lambda gramian: gramian.diagonal().rsqrt())
    balancer = balance(p, weighting=spy, beta=0.5)
    optimizer = torch.optim.SGD([p], lr=0.05)
    balancer.attach(optimizer)
    ema = np.zeros((2, 6))
    for _ in range(3):
        optimizer.zero_grad()
        (7.0 * p.sum()).backward()  # somebody else's gradient stays
        total = np.zeros((2, 6))
        for micro in range(3):
            losses = [x * (1 + micro) for x in quadratics(p)]
            total += flat_gradients(losses, [p], log=False)
            rows = 0.5 * ema + 0.5 * total
            (balancer(losses) / 4).backward()
            close(p.grad.numpy(), 7.0 + (rows / np.linalg.norm(rows, axis=1)[:, None]).sum(0) / 4)
            close(spy.gramians[-1].numpy(), rows @ rows.T)
        ema = rows
        optimizer.step()
    assert balancer.step == 3


def test_a_loss_scale_reaches_the_gradient_and_not_the_gramian():
    p = leaf(6)
    spy = Spy()
    balancer = balance(p, weighting=spy)
    rows = flat_gradients(quadratics(p), [p], log=False)
    (balancer(quadratics(p)) * 1024.0).backward()
    close(spy.gramians[0].numpy(), rows @ rows.T)
    close(p.grad.numpy(), 1024.0 * (rows[0] + 2.0 * rows[1]))
    clear(p)
    good, bad = quadratics(p)
    (balancer([good, overflowing(bad)]) * 1024.0).backward()
    assert not torch.isfinite(p.grad).any()
    assert spy.gramians[1].shape == (1, 1)


def weights_of(*values, **options):
    return lambda gramian: torch.tensor(values, **options)


@pytest.mark.parametrize(
    ("weighting", "kind", "message"),
    [
        (weights_of(1.0, 2.0, 3.0), ValueError, r"shape \(2,\) for 2 tasks, got \(3,\)"),
        (lambda g: g, ValueError, r"shape \(2,\) for 2 tasks, got \(2, 2\)"),
        (weights_of(1.0, float("nan")), ValueError, r"not finite: \[1.0, nan\]"),
        (weights_of(1.0, float("inf")), ValueError, "not finite"),
        (weights_of(1, 2), TypeError, "tensor of floats, got torch.int64"),
        (lambda g: [1.0, 2.0], TypeError, "tensor of floats, got list"),
        (lambda g: None, TypeError, "got NoneType"),
        (weights_of(1.0, 2.0, device="meta"), ValueError, "weights on cpu, got meta"),
    ],
)
@pytest.mark.parametrize("how", ["call", "task", "attached"])
def test_a_weighting_that_fails_leaves_the_next_step_whole(weighting, kind, message, how):
    p, head = leaf(6), leaf(1)
    spy = Spy(weighting)
    balancer = balance(p, weighting=spy)
    optimizer = torch.optim.SGD([p], lr=0.0)
    if how == "attached":
        balancer.attach(optimizer)
    p.grad = torch.full_like(p, 7.0)

    def run():
        losses = [loss + head.sum() for loss in quadratics(p)]
        if how != "task":
            balancer(losses).backward()
            return
        for task, loss in enumerate(losses):
            with balancer.task(task):
                loss.backward(retain_graph=True)
        balancer.balance()

    with pytest.raises(kind, match=message):
        run()
    assert p.grad.tolist() == [7.0] * 6
    clear(p)
    spy.weighting = weights_of(1.0, 2.0, dtype=torch.float64)
    run()
    rows = flat_gradients(quadratics(p), [p], log=False)
    close(p.grad.numpy(), rows[0] + 2.0 * rows[1])
    assert balancer.step == 2


def test_a_nan_goes_though_the_weighting_fails():
    p = leaf(6)
    spy = Spy(lambda gramian: 1 / 0)
    balancer = balance(p, weighting=spy, beta=0.5)
    good, bad = quadratics(p)
    with pytest.raises(ZeroDivisionError):
        balancer.backward([good, bad * float("nan")])
    assert torch.isfinite(state_of(balancer).rows).all()
    spy.weighting = Spy().weighting
    balancer.backward(quadratics(p))
    assert balancer.weights.tolist() == [1.0, 2.0]
    assert balancer.nonfinite_steps.tolist() == [0, 1]


def test_what_the_gramian_cannot_hold_is_not_given_to_the_weighting():
    p = leaf(6, dtype=torch.float32)
    spy = Spy()
    balancer = dbk.GradientBalancer([p], 2, weighting=spy)
    balancer.backward([p.sum() * 1e20 + 1e30, p.sum() + 10])
    assert spy.gramians[0].tolist() == [[6.0]]
    assert balancer.weights.tolist() == [0.0, 1.0]
    assert balancer.nonfinite_steps.tolist() == [1, 0]


def test_a_subclass_of_max_norm_has_its_own_say():
    p = leaf(6)
    q = p.detach().clone().requires_grad_()
    balance(p, weighting=Half()).backward(quadratics(p))
    balance(q, weighting=dbk.MaxNorm()).backward(quadratics(q))
    close(p.grad.numpy(), q.grad.numpy() / 2)


def test_weights_too_large_for_float32_are_refused():
    p = leaf(6, dtype=torch.float32)
    balancer = dbk.GradientBalancer([p], 2, weighting=weights_of(1.0, 1e39, dtype=torch.float64))
    with pytest.raises(ValueError, match="not finite"):
        balancer.backward(quadratics(p))


class Half(dbk.MaxNorm):
    def __call__(self, gramian):
        return super().__call__(gramian) / 2


REFUSED = [
    (lambda: dbk.MaxNorm("most"), ValueError, "scale must be one of"),
    (lambda: dbk.MaxNorm(eps=0.0), ValueError, "eps must be positive"),
    (lambda: dbk.EqualWeights(float("nan")), ValueError, "total must be"),
    (lambda: dbk.EqualWeights("x"), TypeError, "total must be"),
    (lambda: setattr(make(leaf(3)), "weighting", dbk.MaxNorm()), AttributeError, "weighting"),
    (lambda: dbk.GradNorm(3)(torch.eye(3)), RuntimeError, "must see the losses"),
    (lambda: dbk.GradNorm(3, lr=0.0), ValueError, r"lr must be positive, got 0\.0"),
    (lambda: dbk.GradNorm(2.5), TypeError, "num_tasks must be an int"),
    (lambda: dbk.GradNorm(2, lr=float("inf")), ValueError, "lr must be finite"),
    (lambda: dbk.GradNorm(2, alpha="x"), TypeError, "alpha must be a number"),
    (lambda: dbk.IMTLLoss(2)([None, None, None]), ValueError, "expected 2 losses, got 3"),
    (lambda: dbk.IMTLLoss(0), ValueError, "num_tasks must be at least 1"),
    *((lambda w=w: balance(leaf(6), weighting=w), TypeError, "callable from a Gramian")
      for w in (dbk.EqualWeights, "equal", None)),
    *((lambda w=w: balance(leaf(6), weighting=w, capturable=True), ValueError,
       f"capturable=True needs MaxNorm: {type(w).__name__}")
      for w in (dbk.EqualWeights(), Half())),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("with_tensor", [True, False])
def test_imtl_loss_at_its_minimum_is_the_log_transformation(with_tensor):
    p = leaf(6)
    imtl = dbk.IMTLLoss(2)
    losses = quadratics(p)
    given = torch.stack(losses) if with_tensor else losses
    with torch.no_grad():
        imtl.scales.copy_(-torch.stack(losses).log())
    out = imtl(given)
    for ours, loss in zip(out, losses, strict=True):
        assert ours.item() == pytest.approx(loss.log().item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(ours, p, retain_graph=True)
        (expected,) = torch.autograd.grad(loss.log(), p, retain_graph=True)
        close(gradient.numpy(), expected.numpy(), rtol=1e-6)  # the scales are float32
    slopes = torch.autograd.grad(sum(out), imtl.scales)[0]
    assert slopes.abs().max() < 1e-6
    assert imtl([torch.tensor(1.0, dtype=torch.float16), None])[0].dtype == torch.float32


def test_imtl_loss_learns_its_minimum_in_a_balancer():
    p = leaf(6)
    imtl = dbk.IMTLLoss(3)
    balancer = balance(p, num_tasks=3, weighting=dbk.EqualWeights())
    optimizer = torch.optim.SGD(imtl.parameters(), lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        losses = [*(loss / 30 for loss in quadratics(p)), None]
        balancer(imtl(losses)).backward()
        optimizer.step()
    expected = torch.stack(losses[:2]).log().neg()
    close(imtl.scales[:2].detach().numpy(), expected.detach().float().numpy(), rtol=1e-5)
    assert imtl.scales[2].item() == 0.0
