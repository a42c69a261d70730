"""What may be set between steps: beta, eps, scale, task_weights, enabled; checked, in force from the next step on."""

import copy
import pickle
from functools import partial

import dbmtl_kernels as dbk
import numpy as np
import oracle
import problems
import pytest
import torch
from problems import EPS, flat_grad, flat_gradients, leaf, quadratics
from torch import nn

F16, F64 = torch.float16, torch.float64


def steps_of(balancer, params, count, before=lambda step: None):
    """The gradients that ``count`` steps leave, and the tasks' own of each."""
    ours, tasks = [], []
    for step in range(count):
        for p in params:
            p.grad = None
        losses = quadratics(*params, num_tasks=balancer.num_tasks)
        tasks.append(flat_gradients(losses, params))
        before(step)
        balancer.backward(losses)
        ours.append(flat_grad(params))
        with torch.no_grad():
            for p in params:
                p.sub_(0.05 * p.grad)
    return ours, tasks


def test_a_beta_schedule_written_the_obvious_way():
    torch.manual_seed(0)
    params = [leaf(7), leaf(3, 2)]
    balancer, betas = problems.make(*params), [0.9, 0.5, 0.5, 0.1, 0.0, 0.3]

    def before(step):
        balancer.beta = betas[step]
        balancer.beta_sigma = 0.5 if step > 2 else 0.0

    ours, tasks = steps_of(balancer, params, len(betas), before)
    ema = np.zeros_like(tasks[0])
    for k, (grad, rows, beta) in enumerate(zip(ours, tasks, betas, strict=True), 1):
        beta_k = beta / k ** (0.5 if k > 3 else 0.0)
        expected, ema, _ = oracle.balance(rows, ema, beta_k, EPS)
        np.testing.assert_allclose(grad, expected, rtol=1e-9)


@pytest.mark.parametrize("beta", [0.5, 0.0])
def test_scale_and_eps_are_those_of_a_balancer_made_with_them(beta):
    torch.manual_seed(0)
    params = [leaf(7), leaf(3, 2)]
    twins = copy.deepcopy(params)
    changed, made = problems.make(*params, beta=beta), problems.make(*twins, beta=beta, scale="mean", eps=0.1)
    changed.scale, changed.eps = "mean", 0.1
    assert (changed.weighting.scale, changed.weighting.eps) == ("mean", 0.1)
    for ours, theirs in zip(steps_of(changed, params, 3)[0], steps_of(made, twins, 3)[0], strict=True):
        assert np.array_equal(ours, theirs)


def test_settings_of_one_pass():
    torch.manual_seed(0)
    params = [leaf(7), leaf(3, 2)]
    twins = copy.deepcopy(params)
    changed = dbk.OnePassDBMTL(params, 2)
    made = dbk.OnePassDBMTL(twins, 2, scale=0.3, eps=0.1, measure_every=2, task_weights=[1.0, 2.0])
    changed.scale, changed.eps, changed.measure_every, changed.task_weights = 0.3, 0.1, 2, [1.0, 2.0]
    for ours, theirs in zip(steps_of(changed, params, 140)[0], steps_of(made, twins, 140)[0], strict=True):
        assert np.array_equal(ours, theirs)
    changed.scale = "max"  # between measurements too
    steps_of(changed, params, 1)
    weights = changed.weights / torch.tensor([1.0, 2.0])
    torch.testing.assert_close(weights * (changed.norms + 0.1), changed.norms.max().expand(2))
    for name in ("beta", "beta_sigma"):
        assert getattr(changed, name) == 0.0
        with pytest.raises(RuntimeError, match="no moving average"):
            setattr(changed, name, 0.0)
    with pytest.raises(ValueError, match="measure_every must be at least 1"):
        changed.measure_every = 0


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("beta", 1.0, ValueError),
        ("beta", float("nan"), ValueError),
        ("beta_sigma", -1.0, ValueError),
        ("eps", 0.0, ValueError),
        ("scale", "maen", ValueError),
        ("scale", True, TypeError),
        ("task_weights", [1.0], ValueError),
        ("task_weights", [1.0, -1.0], ValueError),
        ("task_weights", [1.0, float("inf")], ValueError),
        ("task_weights", [1.0, 1e30], ValueError),
        ("beta_sigma", 1e6, ValueError),
        ("log_transform", "no", TypeError),
        ("task_weights", ["a", 1.0], TypeError),
        ("num_tasks", 3, AttributeError),
        ("step", 3, AttributeError),
    ],
)
def test_what_is_wrong_is_refused_and_changes_nothing(name, wrong, error):
    balancer = problems.make(leaf(3))
    before = getattr(balancer, name)
    with pytest.raises(error):
        setattr(balancer, name, wrong)
    assert getattr(balancer, name) == before


def test_one_row_takes_no_beta():
    balancer = dbk.DBMTL([leaf(3)], 2, beta=0.0)
    with pytest.raises(ValueError, match="keep_rows=True"):
        balancer.beta = 0.5
    balancer.beta, balancer.beta_sigma = 0.0, 0.5
    assert balancer.beta == 0.0


def test_settings_go_with_copies_and_pickles():
    balancer = problems.make(leaf(3))
    balancer.beta, balancer.eps, balancer.scale, balancer.task_weights = 0.3, 0.1, "mean", [1, 2]
    for twin in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert (twin.beta, twin.eps, twin.scale, twin.task_weights) == (0.3, 0.1, "mean", [1.0, 2.0])
        twin.beta = 0.4
        assert balancer.beta == 0.3


# --- priorities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 0.0])
@pytest.mark.parametrize("given", ["numbers", "function", "tensor"])
def test_task_weights_multiply_the_weights_of_the_algorithm(given, beta):
    torch.manual_seed(0)
    params = [leaf(7), leaf(3, 2)]
    factors = [lambda k: [1.0, 1.0], lambda k: [2.0, 0.0], lambda k: [1.0 / k, 3.0]]
    fixed = {"numbers": [2.0, 0.5], "tensor": torch.tensor([2.0, 0.5])}
    for factor in factors if given == "function" else [fixed[given]]:
        start = copy.deepcopy(params)
        balancer = problems.make(*start, beta=beta, task_weights=factor)
        ours, tasks = steps_of(balancer, start, 3)
        ema = np.zeros_like(tasks[0])
        for k, (grad, rows) in enumerate(zip(ours, tasks, strict=True), 1):
            ema = beta * ema + (1.0 - beta) * rows
            norms = np.linalg.norm(ema, axis=1)
            by_hand = np.array(factor(k) if callable(factor) else [2.0, 0.5]) * norms.max() / (norms + EPS)
            np.testing.assert_allclose(grad, by_hand @ ema, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(balancer.weights.numpy(), by_hand, rtol=1e-9)


def test_task_weights_of_any_weighting_and_heads_left_alone():
    torch.manual_seed(0)
    trunk, heads = leaf(4), [leaf(4), leaf(4)]
    balancer = dbk.GradientBalancer([trunk], 2, weighting=dbk.EqualWeights(), task_weights=[3.0, 0.25])
    losses = [(trunk * head).square().sum() for head in heads]
    expected = torch.autograd.grad(3.0 * losses[0] + 0.25 * losses[1], trunk, retain_graph=True)
    plain = torch.autograd.grad(losses[0] + losses[1], heads, retain_graph=True)
    balancer.backward(losses)
    torch.testing.assert_close(trunk.grad, expected[0], rtol=1e-6, atol=1e-6)
    for head, grad in zip(heads, plain, strict=True):
        torch.testing.assert_close(head.grad, grad)


def test_task_weights_of_a_function_that_gives_something_else():
    params = [leaf(3)]
    balancer = problems.make(*params, task_weights=lambda step: [1.0])
    with pytest.raises(ValueError, match="task_weights must be 2 numbers"):
        balancer.backward(quadratics(*params))
    assert params[0].grad is None
    with pytest.raises(ValueError, match="capturable"):
        problems.make(*params, task_weights=[1.0, 1.0], capturable=True)


def test_all_task_weights_one_is_no_change():
    torch.manual_seed(0)
    for beta in (0.5, 0.0):
        params = [leaf(7), leaf(3, 2)]
        twins = copy.deepcopy(params)
        ours = steps_of(problems.make(*params, beta=beta, task_weights=[1, 1]), params, 3)[0]
        theirs = steps_of(problems.make(*twins, beta=beta), twins, 3)[0]
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


# --- paused -------------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(4, 5), "a": nn.Linear(5, 1), "b": nn.Linear(5, 1)})
    x = torch.randn(6, 4)
    return model, lambda: [model[head](model["trunk"](x)).square().mean() for head in "ab"]


@pytest.mark.parametrize("kind", [dbk.DBMTL, dbk.OnePassDBMTL])
@pytest.mark.parametrize("log", [True, False])
def test_paused_is_the_plain_sum_and_changes_nothing(kind, log):
    model, losses = small()
    balancer = kind(model["trunk"], 2, log_transform=log)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    balancer.attach(optimizer)
    balancer.backward(losses())
    optimizer.step()
    before = copy.deepcopy(balancer.state_dict())
    plain = sum(torch.log(loss + EPS) if log else loss for loss in losses())
    expected = torch.autograd.grad(plain, list(model.parameters()))
    for backward in (lambda: balancer(losses()).backward(), lambda: balancer.backward(losses())):
        optimizer.zero_grad()
        with balancer.paused():
            assert not balancer.enabled
            backward()
        assert balancer.enabled
        for p, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad)
    with balancer.paused():
        torch.testing.assert_close(balancer(losses()), plain)
        assert type(balancer(losses())) is torch.Tensor
    after = balancer.state_dict()
    for key, value in problems.entries(before).items():
        other = problems.entries(after)[key]
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert value == other, key


def test_paused_task_by_task():
    model, losses = small()
    balancer = dbk.DBMTL(model["trunk"], 2)
    balancer.enabled = False
    expected = torch.autograd.grad(sum(torch.log(x + EPS) for x in losses()), list(model.parameters()))
    for index in range(2):
        with balancer.task(index):
            dbk.log_transform(losses()[index]).backward()
    balancer.balance()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert balancer.step == 0
    balancer.enabled = True
    with balancer.task(0):
        with pytest.raises(RuntimeError, match="inside the context of task"):
            balancer.enabled = False
        dbk.log_transform(losses()[0]).backward()
    balancer.enabled = False  # what waits is still balanced
    balancer.balance()
    assert balancer.step == 1


def test_paused_is_undone_by_an_error():
    balancer = dbk.DBMTL([leaf(3)], 2)
    with pytest.raises(KeyError), balancer.paused():
        raise KeyError
    assert balancer.enabled


@pytest.mark.parametrize(
    ("name", "says"),
    [(name, "fixed when a balancer is made") for name in ("state_dtype", "backend", "capturable", "nonfinite")]
    + [(name, "fixed when a balancer is made") for name in ("process_group", "zero_gradients", "keep_rows")]
    + [("betta", "'beta'"), ("taskweights", "'task_weights'"), ("log_transforms", "'log_transform'")]
    + [
        ("num_tasks", "num_tasks|set attribute"),
        ("weighting", "weighting|set attribute"),
        ("norms", "norms|set attribute"),
    ],
)
def test_what_cannot_be_set_is_refused(name, says):
    """An attribute that is taken and does nothing would be a setting that is ignored."""
    for make in (dbk.DBMTL, dbk.OnePassDBMTL, partial(dbk.GradientBalancer, weighting=dbk.EqualWeights())):
        balancer = make([leaf(3)], 2)
        with pytest.raises(AttributeError, match=says):
            setattr(balancer, name, 1)
        assert name not in vars(balancer)


def test_a_setting_that_another_balancer_has_is_refused_and_what_is_nobodys_is_the_users():
    balancer = dbk.GradientBalancer([leaf(3)], 2, weighting=dbk.MaxNorm())
    with pytest.raises(AttributeError, match=r"balancer\.weighting\.scale"):
        balancer.scale = "mean"
    balancer.comment = "mine"
    assert balancer.comment == "mine"

    class Mine(dbk.DBMTL):
        def __init__(self, *args):
            super().__init__(*args)
            self.scaler = "mine"

    assert Mine([leaf(3)], 2).scaler == "mine"


def test_a_function_of_the_step_is_asked_once_a_step():
    torch.manual_seed(0)
    for beta in (0.5, 0.0):
        calls, params = [], [leaf(7), leaf(3, 2)]
        balancer = problems.make(*params, beta=beta, task_weights=lambda k: calls.append(k) or [1.0 + len(calls), 1.0])  # noqa: B023
        steps_of(balancer, params, 3)
        assert calls == [1, 2, 3]


def test_task_weights_are_applied_once_in_a_held_step():
    """Of one pass: after a state was loaded within the step, and after the exact form took its first backward."""
    for first in ("loaded", "exact"):
        torch.manual_seed(0)
        trunk, heads, x = nn.Linear(4, 5), [nn.Linear(5, 1) for _ in range(2)], torch.randn(8, 4)
        losses = lambda: [head(trunk(x)).square().mean() for head in heads]  # noqa: B023, E731
        balancer = dbk.OnePassDBMTL(trunk, 2, task_weights=[4.0, 1.0])
        optimizer = torch.optim.SGD(trunk.parameters(), lr=0.0)
        balancer.attach(optimizer)
        if first == "exact":
            together = torch.stack([head(trunk(x)) for head in heads])
            with pytest.warns(RuntimeWarning, match="exact form"):
                balancer([part.square().mean() for part in together]).backward()
        else:
            balancer(losses()).backward()
            balancer.load_state_dict(copy.deepcopy(balancer.state_dict()))
        before = balancer.weights
        balancer(losses()).backward()
        torch.testing.assert_close(balancer.weights, before)


def test_task_weights_have_an_order():
    for wrong in ({0: 2.0, 1: 3.0}, {2.0, 3.0}):
        with pytest.raises(TypeError, match="in the order of the tasks"):
            problems.make(leaf(3), task_weights=wrong)


def test_a_copy_made_while_paused_is_not():
    balancer = problems.make(leaf(3))
    with balancer.paused(), balancer.paused():
        twins = copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))
    assert balancer.enabled
    assert all(twin.enabled for twin in twins)
    balancer.enabled = False
    assert not copy.deepcopy(balancer).enabled
