"""Exact DB-MTL in one row beside the same with rows: whatever a step may be, the same gradients, norms and weights."""

import random
import warnings

import dbmtl_kernels as dbk
import pytest
import torch
from buffers import defer
from dbmtl_kernels.engine import gradients
from dbmtl_kernels.engine.losses import TaskLosses
from dbmtl_kernels.rows import collect, dtensors
from problems import overflowing, state_of

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
K = 4
KINDS = ("finite",) * 8 + ("zero", "nan", "overflow")
FORMS = ("call", "call", "call", "tasks", "task", "grad", "inputs", "no_update", "nothing")


class Twin:
    """Shared parameters of several shapes, one of which no loss reaches; a head for each task."""

    def __init__(self, keep_rows, dtype, split, device, monkeypatch, **options):
        torch.manual_seed(5)
        square = torch.randn(3, 4, 2, 2, dtype=dtype).to(memory_format=torch.channels_last)
        values = [square, torch.randn(6, 7, dtype=dtype), torch.randn(40).to(F64 if split else dtype), torch.randn(2)]
        self.params = [
            value.detach().to(dtype if i < 2 else value.dtype).requires_grad_() for i, value in enumerate(values)
        ]
        self.params[0] = self.params[0].detach().to(memory_format=torch.channels_last).requires_grad_()
        self.heads = [torch.randn(5, requires_grad=True) for _ in range(K)]
        places = {id(p): index % 2 if split else 0 for index, p in enumerate(self.params)}
        with monkeypatch.context() as patch:  # every other parameter counts as one on another device
            patch.setattr(dtensors, "placement_key", lambda p: places[id(p)])
            self.balancer = dbk.DBMTL(self.params[:3], K, beta=0.0, keep_rows=keep_rows, **options)
        if device:
            self.balancer._engine.use(defer(self.balancer._engine.rows))

    def losses(self, kinds, seed):
        generator = torch.Generator().manual_seed(seed)
        out = []
        for task, kind in enumerate(kinds):
            targets = [torch.randn(p.shape, generator=generator).to(p.dtype) * (1 + 5 * task) for p in self.params[:3]]
            parts = [(p - target).square().float().sum() for p, target in zip(self.params, targets, strict=False)]
            loss = sum(parts) * (0.0 if kind == "zero" else 1.0) + 0.5 + self.heads[task].square().sum()
            if kind == "nan":
                loss = loss * torch.nan
            out.append(overflowing(loss) if kind == "overflow" else loss)
        return out

    def told(self):
        leaves = [*self.params, *self.heads]
        numbers = [self.balancer.norms, self.balancer.weights, self.balancer.nonfinite_steps]
        return [None if p.grad is None else p.grad.clone() for p in leaves], [n.double() for n in numbers]


def step(twin, form, kinds, tasks, factor, seed, given):
    """A step in one of its forms, the same for both."""
    losses, balancer = twin.losses(kinds, seed), twin.balancer
    if form == "call":
        (balancer(losses) * factor).backward()
    elif form == "tasks":
        (balancer([losses[t] for t in tasks], tasks=tasks) * factor).backward()
    elif form == "grad":
        found = torch.autograd.grad(balancer(losses) * factor, [*twin.params[:2], twin.heads[0]], allow_unused=True)
        given.append([None if g is None else g.clone() for g in found])
    elif form == "inputs":
        (balancer(losses) * factor).backward(inputs=[*twin.params[:2], twin.heads[1]])
    elif form == "no_update":
        if balancer.step:
            with balancer.no_update():
                (balancer(losses) * factor).backward()
    elif form == "task":
        for task in tasks:
            with balancer.task(task, loss_scale=factor):
                (dbk.log_transform(losses[task]) * factor).backward()
        if len(tasks) < K:
            balancer.balance()


def assert_alike(ours, theirs, tolerance):
    for some, others in zip(ours, theirs, strict=True):
        for a, b in zip(some, others, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(
                    a, b, rtol=tolerance, atol=tolerance * float(b.nan_to_num(0, 0, 0).abs().max()), equal_nan=True
                )


@pytest.fixture(params=["host", "device"])
def device(request, monkeypatch):
    """What gradients and losses are is known to the host, or as on a GPU to the device alone."""
    if request.param == "device":
        monkeypatch.setattr(TaskLosses, "finite", lambda self: [None] * len(self.tasks))
    return request.param == "device"


OPTIONS = {
    "plain": {},
    "split": {"split": True},
    "bfloat16": {"dtype": BF16},
    "float64": {"dtype": F64},
    "a float64 state": {"state_dtype": F64},
    "eager": {"backend": "eager"},
    "capturable": {"capturable": True},
    "skip": {"nonfinite": "skip", "scale": "mean"},
    "propagate": {"nonfinite": "propagate", "scale": "median"},
    "count": {"zero_gradients": "count", "scale": "min"},
    "as they are": {"log_transform": False, "scale": 0.7},
    "one by one": {"flush": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("attached", [False, True])
def test_any_steps(name, attached, device, monkeypatch):
    options = {"dtype": F32, "split": False, **OPTIONS[name]}
    if options.pop("flush", False):
        monkeypatch.setattr(gradients, "FLUSH_BYTES", 1)
        monkeypatch.setattr(collect, "FLUSH_BYTES", 1)
    twins = [Twin(keep_rows, device=device, monkeypatch=monkeypatch, **options) for keep_rows in (False, True)]
    assert not state_of(twins[0].balancer).allocated
    optimizers = [torch.optim.SGD([*twin.params[:3], *twin.heads], lr=1e-3) for twin in twins]
    for twin, optimizer in zip(twins, optimizers, strict=True):
        if attached:
            twin.balancer.attach(optimizer)
    dice, tolerance = random.Random(name), {BF16: 2.0**-7, F32: 2e-6, F64: 1e-6}[options["dtype"]]
    for number in range(25):
        kinds, form = [dice.choice(KINDS) for _ in range(K)], dice.choice(FORMS)
        tasks, factor = dice.sample(range(K), dice.randint(1, K)), dice.choice((1.0, 1.0, 0.25, 1024.0, 0.0))
        none, before, given = dice.random() < 0.5, dice.random() < 0.3, ([], [])
        for twin, optimizer, found in zip(twins, optimizers, given, strict=True):
            optimizer.zero_grad(set_to_none=none)
            if before and form != "grad":
                sum(p.float().sum() for p in twin.params[1:3]).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step(twin, form, kinds, tasks, factor, number, found)
        assert_alike(given[0], given[1], tolerance)
        assert_alike(*(twin.told() for twin in twins), tolerance)
        for twin, optimizer in zip(twins, optimizers, strict=True):
            for p in twin.params:  # as a GradScaler does
                if p.grad is not None:
                    p.grad.nan_to_num_(0.0, 0.0, 0.0)
            optimizer.step()
        for p, q in zip(*(twin.params for twin in twins), strict=True):
            p.data.copy_(q.data)
    assert not state_of(twins[0].balancer).allocated
