"""What may be set, and the names of tasks, in a checkpoint: told by name, in whatever order."""

import copy

import dbmtl_kernels as dbk
import pytest
import torch
from problems import entries, leaf

NAMES = ["a", "b", "c"]


def losses(p, q):
    return {name: ((p - t) * (1 + 2 * t)).square().sum() + (q * (t + 1)).square().sum() for t, name in enumerate(NAMES)}


def make(kind, p, q, names=3, **options):
    if kind == "one pass":
        return dbk.OnePassDBMTL([p, q], names, measure_every=1, **options)
    if kind == "GradNorm":
        weighting = dbk.GradNorm(3)
        return dbk.GradientBalancer([p, q], names, weighting=weighting, beta=0.5, log_transform=True, **options)
    return dbk.DBMTL([p, q], names, beta=0.0 if kind == "one row" else 0.5, **options)


def leaves():
    torch.manual_seed(0)
    return leaf(5, dtype=torch.float32), leaf(3, dtype=torch.float32)


def step(balancer, p, q, order=NAMES):
    p.grad = q.grad = None
    given = losses(p, q)
    balancer.backward({name: given[name] for name in order})
    return p.grad.clone(), q.grad.clone()


KINDS = ("rows", "one row", "one pass", "GradNorm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [3, NAMES, ["c", "a", "b"]], ids=["learnt", "given", "in another order"])
def test_a_run_goes_on_by_the_names(kind, names):
    """Whatever the order of the tasks here, and of the first dict."""
    p, q = leaves()
    saved = make(kind, p, q, task_weights=[1.0, 2.0, 3.0])
    for _ in range(3):
        step(saved, p, q)
    state = copy.deepcopy(saved.state_dict())
    expected = step(saved, p, q)
    resumed = make(kind, p, q, names)
    resumed.load_state_dict(state)
    assert resumed.step == 3
    order = NAMES if names == 3 else names
    assert resumed.task_names == order
    assert resumed.task_weights == [{"a": 1.0, "b": 2.0, "c": 3.0}[name] for name in order]
    for ours, theirs in zip(step(resumed, p, q, ["b", "c", "a"]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0 if order == NAMES else 1e-5, atol=0 if order == NAMES else 1e-6)
    there = dict(zip(NAMES, saved.norms.tolist(), strict=True))
    assert resumed.norms.tolist() == pytest.approx([there[name] for name in order], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_other_names_are_refused_whole(kind):
    p, q = leaves()
    saved = make(kind, p, q)
    step(saved, p, q)
    state, other = copy.deepcopy(saved.state_dict()), make(kind, p, q, ["a", "b", "x"])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"\['settings'\]\['names'\]: the tasks are \['a', 'b', 'c'\], here \['a', 'b', 'x'\]"
    ):
        other.load_state_dict(state)
    now = entries(other.state_dict())
    for key, value in entries(before).items():
        same = (
            torch.equal(value.nan_to_num(), now[key].nan_to_num())
            if isinstance(value, torch.Tensor)
            else value == now[key]
        )
        assert same, key


def test_another_order_within_a_step_is_refused():
    p, q = leaves()
    saved = make("rows", p, q, NAMES)
    optimizer = torch.optim.SGD([p, q])
    saved.attach(optimizer)
    step(saved, p, q)
    with pytest.raises(ValueError, match="in another order"):
        make("rows", p, q, NAMES[::-1]).load_state_dict(saved.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_what_may_be_set_is_in_the_checkpoint(kind):
    p, q = leaves()
    saved = make(kind, p, q)
    if kind in ("rows", "GradNorm"):
        saved.beta, saved.beta_sigma = 0.3, 0.2
    saved.eps, saved.task_weights = 0.1, [3, 2, 1]
    if kind != "GradNorm":
        saved.scale = 0.7
    step(saved, p, q)
    state, resumed = copy.deepcopy(saved.state_dict()), make(kind, p, q)
    resumed.load_state_dict(state)
    for name in ("beta", "beta_sigma", "eps", "task_weights", *(() if kind == "GradNorm" else ("scale",))):
        assert getattr(resumed, name) == getattr(saved, name), name
    for ours, theirs in zip(step(resumed, p, q), step(saved, p, q), strict=True):
        assert torch.equal(ours, theirs)


def test_a_function_stays_and_one_row_keeps_no_average():
    p, q = leaves()
    saved, given = make("rows", p, q, task_weights=[1, 2, 3], scale="mean"), lambda step: [1.0, 1.0, 1.0]
    step(saved, p, q)
    resumed = make("rows", p, q, task_weights=given)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.task_weights is given
    assert resumed.scale == "mean"
    one = make("one row", p, q)
    one.load_state_dict(saved.state_dict())
    assert (one.beta, one.scale) == (0.0, "mean")
    older = saved.state_dict()
    del older["settings"]  # as of earlier releases
    resumed = make("rows", p, q, NAMES, scale="min")
    resumed.load_state_dict(older)
    assert (resumed.scale, resumed.task_names) == ("min", NAMES)


def test_numbers_given_here_stay_with_their_tasks():
    """The state has none, as a function gave them, and its tasks are in another order."""
    p, q = leaves()
    saved = make("rows", p, q, NAMES, task_weights=lambda step: [1.0, 1.0, 1.0])
    step(saved, p, q)
    resumed = make("rows", p, q, ["c", "a", "b"], task_weights=[5.0, 1.0, 2.0])
    resumed.load_state_dict(saved.state_dict())
    assert (resumed.task_names, resumed.task_weights) == (["c", "a", "b"], [5.0, 1.0, 2.0])
