"""Every refusal: its type, that its message holds the offending value, and that nothing was written."""

import copy

import dbmtl_kernels as dbk
import pytest
import torch
from problems import assert_same_state, state_of
from torch import nn


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.fixture
def model():
    trunk = nn.Linear(4, 5)
    heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
    balancer = dbk.DBMTL(trunk.parameters(), 3)
    balancer(losses(trunk, heads)).backward()
    return trunk, heads, balancer


def losses(trunk, heads):
    z = trunk(torch.randn(8, 4))
    return [head(z).square().mean() + 0.1 for head in heads]


def snapshot(balancer):
    return copy.deepcopy(balancer.state_dict()), [p.grad.clone() for p in balancer.shared_parameters]


def assert_untouched(balancer, before):
    state, grads = before
    assert_same_state(state, balancer.state_dict())
    for p, grad in zip(balancer.shared_parameters, grads, strict=True):
        assert torch.equal(p.grad, grad)


LOSSES = {
    "too few": (lambda t, h: losses(t, h)[:2], ValueError, r"expected 3 losses.*got 2"),
    "too many, tensor": (lambda t, h: torch.stack(losses(t, h) * 2), ValueError, r"expected 3 losses.*got 6"),
    "matrix": (lambda t, h: torch.stack(losses(t, h))[None], ValueError, r"shape \(3,\), got \(1, 3\)"),
    "not a sequence": (lambda t, h: sum(losses(t, h)).item(), TypeError, "got float"),
    "a set": (lambda t, h: set(losses(t, h)), TypeError, "in an order.*got set"),
    "not a tensor": (lambda t, h: [*losses(t, h)[:2], 1.5], TypeError, "loss of task 2 must be a tensor, got float"),
    "not a scalar": (
        lambda t, h: [*losses(t, h)[:2], h[2](t(torch.randn(8, 4)))], ValueError,
        r"loss of task 2 must be a scalar, got shape \(8, 1\)",
    ),
    "integer": (lambda t, h: [torch.tensor(3), *losses(t, h)[1:]], TypeError, r"loss of task 0.*torch.int64"),
    "no graph": (
        lambda t, h: [*losses(t, h)[:1], torch.tensor(1.0), losses(t, h)[2]], RuntimeError, "task 1 has no gr",
    ),
    "negative": (lambda t, h: [*losses(t, h)[:2], losses(t, h)[2] - 9.5], ValueError, r"loss of task 2 is -\d"),
}  # fmt: skip


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, named, model):
    trunk, heads, balancer = model
    make, kind, message = LOSSES[name]
    bad = make(trunk, heads)
    before = snapshot(balancer)
    with pytest.raises(kind, match=message):
        balancer.backward(bad) if named else balancer(bad)
    assert_untouched(balancer, before)


def test_backward_a_second_time(model):
    trunk, heads, balancer = model
    loss = balancer(losses(trunk, heads))
    loss.backward()
    before = snapshot(balancer)
    with pytest.raises(RuntimeError, match=r"second time.*retain_graph=True"):
        loss.backward()
    assert_untouched(balancer, before)


repeated = leaf(3)
PARAMETERS = {
    "empty": (list, ValueError, "empty"),
    "repeated": (lambda: [leaf(2), repeated, repeated], ValueError, r"\[2\] repeats shared_parameters\[1\]"),
    "not a leaf": (lambda: [leaf(2), leaf(2, 3) * 2], ValueError, r"\[1\] of shape \(2, 3\) is not a leaf"),
    "no grad": (lambda: [leaf(2), torch.zeros(7)], ValueError, r"\[1\] of shape \(7,\) does not require grad"),
    "not a tensor": (lambda: [leaf(2), "weight"], TypeError, r"\[1\] must be a tensor, got str"),
    "complex": (lambda: [leaf(2, dtype=torch.complex64)], TypeError, "complex64"),
    "several devices": (
        lambda: [leaf(2), torch.zeros(2, device="meta").requires_grad_()], ValueError,
        "must hold data: they are on cpu, meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    make, kind, message = PARAMETERS[name]
    with pytest.raises(kind, match=message):
        dbk.DBMTL(make(), 2)


OPTIONS = {
    "num_tasks 0": ({"num_tasks": 0}, ValueError, "got 0"),
    "num_tasks float": ({"num_tasks": 2.0}, TypeError, "got float"),
    "beta 1": ({"beta": 1.0}, ValueError, r"beta must be in \[0, 1\), got 1.0"),
    "beta negative": ({"beta": -0.1}, ValueError, "got -0.1"),
    "beta nan": ({"beta": float("nan")}, ValueError, "got nan"),
    "beta_sigma": ({"beta_sigma": -1.0}, ValueError, "beta_sigma.*-1.0"),
    "eps 0": ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
    "eps negative": ({"eps": -1e-8}, ValueError, "-1e-08"),
    "scale": ({"scale": "maximum"}, ValueError, "'maximum'"),
    "scale type": ({"scale": None}, TypeError, "NoneType"),
    "scale negative": ({"scale": -2.0}, ValueError, "-2.0"),
    "backend": ({"backend": "cudnn"}, ValueError, "unknown backend.*'cudnn'.*native"),
    "state_dtype": ({"state_dtype": torch.float16}, TypeError, "float16"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    options, kind, message = OPTIONS[name]
    with pytest.raises(kind, match=message):
        dbk.DBMTL([leaf(3)], **{"num_tasks": 2, **options})


CALLS = {  # tasks entered before, call, error, message
    "balance without a task": ([], lambda b, ls: b.balance(), RuntimeError, "no task"),
    "remove_task 3": ([], lambda b, ls: b.remove_task(3), ValueError, "task index 3 is out of range for 3 tasks"),
    "a task more within a step": ([1], lambda b, ls: b.add_task(), RuntimeError, "within a step; end it first"),
    "a task less within a step": ([1], lambda b, ls: b.remove_task(1), RuntimeError, "within a step; end it first"),
    "task twice": ([1], lambda b, ls: b.task(1).__enter__(), RuntimeError, "task 1 was entered already"),
    "backward before balance": ([1], lambda b, ls: b.backward(ls), RuntimeError, r"task\(s\) \[1\] wait for balance"),
    **{
        f"task {index}": ([], lambda b, ls, index=index: b.task(index).__enter__(), kind, "task index")
        for index, kind in ((3, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError))
    },
}


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_calls(name, attached, model):
    trunk, heads, balancer = model
    tasks, call, kind, message = CALLS[name]
    optimizer = torch.optim.SGD(trunk.parameters(), lr=0.1)
    if attached:
        balancer.attach(optimizer)
    for again in (False, True):
        for task in tasks:
            with balancer.task(task):
                losses(trunk, heads)[task].log().backward()
        if not again:
            before = snapshot(balancer)
            with pytest.raises(kind, match=message):
                call(balancer, losses(trunk, heads))
            assert_untouched(balancer, before)
        if tasks:
            balancer.balance()
        optimizer.step()


def test_nothing_inside_a_task(model):
    trunk, heads, balancer = model
    with balancer.task(0):
        losses(trunk, heads)[0].log().backward()
        for call in (
            balancer.balance,
            lambda: balancer.backward(losses(trunk, heads)),
            lambda: balancer(losses(trunk, heads)).backward(),
            lambda: balancer.task(1).__enter__(),
            balancer.add_task,
            lambda: balancer.remove_task(1),
        ):
            with pytest.raises(RuntimeError, match=r"inside the context of task\(0\)") as caught:
                call()
    assert "a change of tasks inside" in str(caught.value)
    balancer.balance()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"memory_format": torch.channels_last}, "strides"), ({"dtype": torch.float64}, "float64")],
)
def test_parameters_changed_since(change, message):
    conv = nn.Conv2d(3, 4, 3)
    balancer = dbk.DBMTL(conv.parameters(), 1)
    conv.to(**change)
    x = torch.randn(1, 3, 5, 5, dtype=conv.weight.dtype)
    with pytest.raises(RuntimeError, match=f"shared parameter 0 of shape .* was .*{message}.*model.to"):
        balancer([conv(x).square().mean()]).backward()
    assert (state_of(balancer).rows == 0).all()
    assert balancer.step == 0
    assert conv.weight.grad is None


def test_state_of_another_memory_order():
    conv, other_conv = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    state = dbk.DBMTL(conv.parameters(), 2).state_dict()
    with pytest.raises(
        ValueError, match=r"\['parameters'\]\[0\]: .*memory order \[0, 2, 3, 1\] here and \[0, 1, 2, 3\]"
    ):
        dbk.DBMTL(other_conv.parameters(), 2).load_state_dict(state)


def test_attach(model):
    trunk, heads, balancer = model
    with pytest.raises(ValueError, match="SGD holds none of the shared parameters"):
        balancer.attach(torch.optim.SGD(heads.parameters(), lr=0.1))
    first, second = (torch.optim.SGD(trunk.parameters(), lr=0.1) for _ in range(2))
    handle = balancer.attach(first)
    with pytest.raises(RuntimeError, match="already attached"):
        balancer.attach(second)
    handle.remove()
    handle.remove()
    balancer.attach(second).remove()


def test_sparse_gradient():
    embedding = nn.Embedding(10, 3, sparse=True)
    balancer = dbk.DBMTL(embedding.parameters(), 1)
    with pytest.raises(TypeError, match=r"shared parameter 0 of shape \(10, 3\).*sparse"):
        balancer([embedding(torch.tensor([1])).square().sum()]).backward()
    assert embedding.weight.grad is None
    assert (state_of(balancer).rows == 0).all()
    assert balancer.step == 0


def other(shapes=((4, 5), (3,)), num_tasks=3, dtype=torch.float32, **options):
    return dbk.DBMTL([leaf(*s, dtype=dtype) for s in shapes], num_tasks, **options).state_dict()


def changed(part, key, value):
    state = other()
    return state | {part: state[part] | {key: value}}


STATES = {
    "number": (lambda: other(((4, 5),)), r"of 1 shared parameters.*2 here"),
    "shape": (lambda: other(((5, 4), (3,))), r"shared parameter 0.*\[4, 5\] here.*\[5, 4\]"),
    "order": (lambda: other(((3,), (4, 5))), "shared parameter 0"),
    "dtype": (lambda: other(dtype=torch.float64), "shared parameter 0.*float32.*float64"),
    "num_tasks": (lambda: other(num_tasks=2), "num_tasks"),
    "state_dtype": (lambda: other(state_dtype=torch.bfloat16), r"\['rows'\]\['0'\]: in torch.bfloat16.*float32"),
    "version": (lambda: other() | {"version": 99}, "99"),
    "not ours": (dict, r"state_dict\['version'\] is missing"),
    "incomplete": (
        lambda: {k: v for k, v in other().items() if k not in ("touched", "steps")},
        r"state_dict\['steps'\] is missing",
    ),
    "touched": (lambda: other() | {"touched": [True]}, r"\['touched'\]: 1 entries, not 2"),
    "norms": (lambda: changed("buffer", "norms", torch.zeros(2, dtype=torch.float64)), r"\['norms'\]: of shape \(2,\)"),
    "seen": (lambda: changed("steps", "seen", [1]), r"\['seen'\]: 1 entries, not 3"),
    "other cut": (
        lambda: changed("buffer", "rows", {}),
        r"state_dict\['buffer'\]\['rows'\]\['0'\] is missing \(saved of replicas",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_load_state_dict(name):
    make, message = STATES[name]
    a, b = leaf(4, 5), leaf(3)
    balancer = dbk.DBMTL([a, b], 3)
    balancer([a.square().sum(), b.square().sum(), (a.sum() + b.sum()).square() + 0.1]).backward()
    before = snapshot(balancer)
    with pytest.raises(ValueError, match=message):
        balancer.load_state_dict(make())
    assert_untouched(balancer, before)
