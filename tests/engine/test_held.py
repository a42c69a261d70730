"""Losses and parameters as people hold them: dicts, iterables, zeros without a graph, modules, names."""

import copy
import io
import warnings
from typing import NamedTuple

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels.functional import sum_of_losses
from torch import nn

NAMES = ("depth", "normal", "segmentation")
KINDS = {"rows": {}, "one row": {"beta": 0.0}, "one pass": None}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.heads = nn.ModuleDict({name: nn.Linear(5, 1) for name in NAMES})

    def forward(self, x):
        z = self.backbone(x)
        return {name: head(z).square().mean() + 0.1 for name, head in self.heads.items()}


class Losses(NamedTuple):
    depth: object
    normal: object
    segmentation: object


def make(model, kind, tasks=3):
    if kind == "one pass":
        return dbk.OnePassDBMTL(model.backbone, tasks, measure_every=1)
    return dbk.DBMTL(model.backbone, tasks, **KINDS[kind])


def train(kind, hold, tasks=3, steps=4, by_name=False, present=NAMES):
    """The ``.grad`` of all steps, where the losses are held as ``hold(losses, step)`` says."""
    model, found = Model(), []
    balancer, x = make(model, kind, tasks), torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        model.zero_grad()
        losses = {name: loss if name in present or step == 0 else None for name, loss in model(x * (step + 1)).items()}
        held = hold(losses, step)
        if by_name:
            balancer.backward(held, tasks=[name for name in NAMES if losses[name] is not None])
        elif step % 2:
            balancer.backward(held)
        else:
            balancer(held).backward()
        found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return balancer, found


def same(ours, theirs):
    return all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


FORMS = {
    "dict": lambda losses, step: losses,
    "another order": lambda losses, step: dict(sorted(losses.items(), reverse=bool(step))),
    "values": lambda losses, step: losses.values(),
    "generator": lambda losses, step: (loss for loss in losses.values()),
    "tuple": lambda losses, step: tuple(losses.values()),
    "named tuple": lambda losses, step: Losses(**losses),
    "one missing": lambda losses, step: {name: loss for name, loss in losses.items() if loss is not None},
    "0.0": lambda losses, step: {name: 0.0 if loss is None else loss for name, loss in losses.items()},
    "zeros": lambda losses, step: [torch.zeros(()) if loss is None else loss for loss in losses.values()],
}


@pytest.mark.filterwarnings("ignore:the loss of task")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_losses_in_any_form_are_those_of_a_list(form, kind):
    for present in (NAMES, ("depth", "segmentation")):
        if present == NAMES and form in ("one missing", "0.0", "zeros"):
            continue
        balancer, ours = train(kind, FORMS[form], present=present)
        _, theirs = train(kind, lambda losses, step: list(losses.values()), present=present)
        assert same(ours, theirs)
        named = form in ("dict", "another order", "named tuple", "one missing", "0.0")
        assert balancer.task_names == (list(NAMES) if named else None)


@pytest.mark.parametrize("kind", KINDS)
def test_names_given_beforehand_need_no_whole_dict_and_serve_for_tasks(kind):
    present = ("depth", "segmentation")
    _, theirs = train(kind, lambda losses, step: list(losses.values()), present=present)
    _, ours = train(kind, FORMS["one missing"], tasks=NAMES, present=present)
    assert same(ours, theirs)
    _, ours = train(
        kind, lambda losses, step: [x for x in losses.values() if x is not None], NAMES, by_name=True, present=present
    )
    assert same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_other_names_are_refused_by_name_and_nothing_has_changed(kind):
    model = Model()
    balancer, x = make(model, kind), torch.randn(7, 4)
    with pytest.raises(ValueError, match=r"first dict of losses must name all 3 tasks, got \['depth'\]"):
        balancer({"depth": model(x)["depth"]})
    assert balancer.task_names is None
    balancer.backward(model(x))
    losses = model(x)
    losses["colour"] = losses.pop("normal")
    with pytest.raises(ValueError, match="no task 'colour'; the tasks are 'depth', 'normal', 'segmentation'"):
        balancer.backward(losses)
    assert balancer.step == 1
    with pytest.raises(TypeError, match="tasks= beside a mapping"):
        balancer(model(x), tasks=[0, 1, 2])
    for wrong in (set(model(x).values()), "abc", 3.0):
        with pytest.raises(TypeError, match="losses must be scalars in an order"):
            balancer(wrong)
    for wrong, error in ((["a", "a"], ValueError), ([1, "b"], TypeError), ([], ValueError)):
        with pytest.raises(error):
            dbk.DBMTL(model.backbone, wrong)


def test_messages_name_the_task():
    model = Model()
    balancer, x = dbk.DBMTL(model.backbone, NAMES), torch.randn(7, 4)
    for change, error in (
        (lambda loss: loss.detach(), r"task 1 \('normal'\) has no graph"),
        (lambda loss: loss - 9.0, r"task 1 \('normal'\) is -.*must be positive"),
        (lambda loss: loss.expand(2), r"task 1 \('normal'\) must be a scalar"),
        (lambda loss: 0.3, r"task 1 \('normal'\) must be a tensor, got float"),
    ):
        losses = model(x)
        losses["normal"] = change(losses["normal"])
        with pytest.raises((RuntimeError, ValueError, TypeError), match=error):
            balancer(losses)


def test_zeros_without_a_graph_are_told_once_and_are_not_all():
    model, x = Model(), torch.randn(7, 4)
    balancer = dbk.DBMTL(model.backbone, NAMES)
    with pytest.warns(RuntimeWarning, match=r"task 0 \('depth'\) is a zero without a graph, and counts as absent"):
        balancer.backward({**model(x), "depth": torch.zeros(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.backward({**model(x), "depth": 0})
    with pytest.raises(ValueError, match="every loss is None or a zero without a graph"):
        balancer.backward([0.0, torch.zeros(()), None])
    with torch.no_grad():  # there no loss has a graph
        torch.testing.assert_close(balancer([torch.zeros(()), None, None]), torch.tensor(1e-8).log())


def test_tasks_come_and_go_by_name():
    model, x = Model(), torch.randn(7, 4)
    balancer = dbk.DBMTL(model.backbone, NAMES, task_weights=[1.0, 2.0, 3.0])
    balancer.backward(model(x))
    with pytest.raises(TypeError, match="name of a task must be a string"):
        balancer.add_task(3)
    with pytest.raises(ValueError, match="must differ"):
        balancer.add_task("depth")
    assert balancer.add_task("edges") == 3
    balancer.remove_task("depth")
    assert balancer.task_names == ["normal", "segmentation", "edges"]
    assert balancer.task_weights == [2.0, 3.0, 1.0]
    losses = model(x)
    balancer.backward({"edges": losses["depth"], "normal": losses["normal"], "segmentation": losses["segmentation"]})
    for name in ("edges", "segmentation", "normal"):
        with balancer.task(name):
            dbk.log_transform(model(x)["depth"]).backward()
    assert balancer.step == 3


def test_names_are_in_the_readings_copies_and_pickles(tmp_path):
    import pickle

    model, x = Model(), torch.randn(7, 4)
    balancer = dbk.DBMTL(model.backbone, 3)
    assert "norm/0" in balancer.monitor().as_dict()
    balancer.backward(model(x))
    assert {"norm/depth", "weight/normal"} <= balancer.monitor().as_dict().keys()
    assert {"norm/a", "weight/b"} <= balancer.monitor().as_dict(names="abc").keys()
    for twin in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert twin.task_names == list(NAMES)


def test_from_losses_takes_a_dict():
    model, x = Model(), torch.randn(7, 4)
    for losses in (model(x), iter(model(x).values())):
        balancer = dbk.DBMTL.from_losses(losses)
        assert {id(p) for p in balancer.shared_parameters} == {id(p) for p in model.backbone.parameters()}
        assert balancer.task_names == (list(NAMES) if isinstance(losses, dict) else None)
    balancer = dbk.OnePassDBMTL.from_losses(model(x), model.backbone.parameters())
    assert balancer.task_names == list(NAMES)


def test_an_evaluation_sums_a_dict():
    losses = {name: torch.tensor(float(i)) for i, name in enumerate(NAMES)}
    assert float(sum_of_losses(losses, 3)) == float(sum_of_losses(list(losses.values()), 3)) == 3.0


def test_names_of_a_call_that_is_refused_or_of_an_evaluation_are_not_learnt():
    model, x = Model(), torch.randn(7, 4)
    balancer = dbk.DBMTL(model.backbone, 3)
    with pytest.raises(ValueError, match=r"task 0 \('total'\) must be a scalar"):
        balancer({"total": torch.ones(2), "b": model(x)["depth"], "c": None})
    with torch.no_grad():
        balancer(dict(reversed(model(x).items())))
    assert balancer.task_names is None
    balancer.backward(model(x))
    assert balancer.task_names == list(NAMES)


def test_from_losses_with_one_missing_and_a_module():
    model, x = Model(), torch.randn(7, 4)
    for absent in (None, 0.0):
        balancer = dbk.DBMTL.from_losses({**model(x), "normal": absent}, model.backbone)
        assert balancer.task_names == list(NAMES)
        assert balancer._engine.rows.names[0] == "0.weight"
        assert len(dbk.DBMTL.from_losses({**model(x), "normal": absent}).shared_parameters) == 4


# --- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_in_any_form(kind):
    model, x = Model(), torch.randn(7, 4)
    for given, named in (
        (model.backbone, True),
        (model.backbone.parameters(), False),
        (model.backbone.named_parameters(), True),
        (dict(model.backbone.named_parameters()), True),
        (list(model.backbone.parameters()), False),
    ):
        options = {} if kind == "one pass" else KINDS[kind]
        balancer = (dbk.OnePassDBMTL if kind == "one pass" else dbk.DBMTL)(given, 3, **options)
        assert [id(p) for p in balancer.shared_parameters] == [id(p) for p in model.backbone.parameters()]
        assert balancer._engine.rows.describe(0).startswith("shared parameter 0 ('0.weight')") == named
        balancer.backward(model(x))
        balancer.rebind(given if isinstance(given, (nn.Module, dict, list)) else model.backbone[0])
    single = torch.randn(3, 4, requires_grad=True)
    balancer = dbk.DBMTL(single, 2)
    assert balancer.shared_parameters[0] is single
    balancer.backward([single.square().sum(), single.exp().sum()])
    assert single.grad.shape == (3, 4)


@pytest.mark.parametrize("kinds", [("rows", "rows"), ("one row", "rows"), ("one pass", "one pass")], ids=str)
def test_two_balancers_of_parts_of_one_model_are_refused(kinds):
    model, x = Model(), torch.randn(7, 4)
    parts = [
        dbk.OnePassDBMTL(part, 3) if kind == "one pass" else dbk.DBMTL(part, 3, **KINDS[kind])
        for kind, part in zip(kinds, (model.backbone[0], model.backbone[2]), strict=True)
    ]
    for hold in (lambda losses: losses, lambda losses: torch.stack(list(losses.values()))):
        losses = hold(model(x))
        parts[0](losses, retain_graph=True).backward(retain_graph=kinds[0] == "one pass")
        with pytest.raises(RuntimeError, match="another balancer, of other parameters, was given the same losses"):
            parts[1](losses).backward()
    same_parameters = dbk.DBMTL(model.backbone[0], 3)
    losses = model(x)
    parts[0](losses, retain_graph=True).backward(retain_graph=True)
    same_parameters(losses).backward()  # to compare two methods, say
    losses = list(model(x).values())
    parts[0](losses).item()  # the value alone
    dbk.DBMTL(model.backbone[2], 3).backward(losses)
    copy.deepcopy(losses[0].detach())
    torch.save(losses[0].detach(), io.BytesIO())
    assert not losses[0].__dict__


def test_repr_says_what_it_is():
    model = Model()
    shown = repr(dbk.DBMTL(model.backbone, NAMES))
    for part in (
        "DBMTL(num_tasks=['depth', 'normal', 'segmentation']", "parameters=4, P=65", "beta=0.9", "scale=max", "step=0",
        "form=a row for each task (float32)", "state=0.0 MB", "device=cpu",
    ):  # fmt: skip
        assert part in shown
    assert "one row for all tasks" in repr(dbk.DBMTL(model.backbone, 3, beta=0.0))
    shown = repr(dbk.OnePassDBMTL(model.backbone, 3))
    assert shown.startswith("OnePassDBMTL(num_tasks=3")
    assert "form=one pass, state=3 norms, device=cpu" in shown
    assert "measure_every=10" in shown
    large = [torch.zeros(1 << 20, requires_grad=True)]
    assert "state=12.6 MB" in repr(dbk.DBMTL(large, 3))
    assert "state=6.3 MB" in repr(dbk.DBMTL(large, 3, state_dtype=torch.bfloat16))
    balancer = dbk.DBMTL(large, 1)
    optimizer = torch.optim.SGD(large)
    balancer.attach(optimizer)
    balancer.enabled = False
    assert repr(balancer).endswith("attached=True, enabled=False, scale=max)")


def test_a_name_where_others_have_none_is_refused():
    balancer = dbk.DBMTL(Model().backbone, 3)
    with pytest.raises(ValueError, match="the other tasks have no names"):
        balancer.add_task("edges")
    assert balancer.num_tasks == 3
